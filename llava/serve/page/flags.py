"""Flags of both programs that serve the page: under which names it answers, and what it writes down."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from llava.fetch import literal_address


def add_page_flags(parser: argparse.ArgumentParser) -> None:
    """Under which names the page answers, and what it writes down."""
    group = parser.add_argument_group("visitors")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="name that browsers ask for, such as a reverse proxy's; may be given more than once")  # fmt: skip
    group.add_argument("--log-dir", type=Path, default=Path("logs"), metavar="FOLDER",
                       help="where conversations and votes are written, as lines of JSON")  # fmt: skip
    group.add_argument("--no-log", action="store_true", help="write no conversations and votes")


def check_port(args: argparse.Namespace) -> None:
    """Refuse ports that cannot be announced to others, 0 (any free one) among them.

    Raises:
        ValueError: it is one.
    """
    if not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}, expected 1 to 65535.")


def read_names(args: argparse.Namespace) -> frozenset[str] | None:
    """The names under which the program answers, besides addresses and localhost; `None` for every name.

    Names are asked for where the program listens on this machine alone, so that browsers on it are all that another site could reach it
    through, and wherever one is given.

    Raises:
        ValueError: a name with a scheme, a port or a path.
    """
    for name in args.allow_host:
        if not name or not name.isascii() or set(name) & set("/:@[] *"):
            raise ValueError(f"--allow-host is {name!r}, expected a name alone, such as chat.example.org.")
    if not args.allow_host and not _is_loopback(args.host):
        return None
    return frozenset(name.lower().rstrip(".") for name in (*args.allow_host, args.host))


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return True  # it cannot be listened at; `check_address` says so
    addresses = [literal_address(str(address[0]).partition("%")[0]) for *_, address in found]
    return all(address is not None and address.is_loopback for address in addresses)
