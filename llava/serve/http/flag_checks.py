"""Flags that several programs share, and checks of flags, each with one sentence for the user."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava.serve.protocol import Limits

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*?#@A-Z]+")


def too_small(args: argparse.Namespace, least: Mapping[str, float]) -> list[str]:
    """Errors in flags that have to be finite numbers with a minimum, a clause for each; `None` is valid.

    Args:
        least: the minimum of each flag, by its name in `args`.
    """
    found = []
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            shown = f"{value:g}" if isinstance(value, float) else value
            expected = "a finite number" if value == math.inf else f"{bound:g} or more"
            found.append(f"--{name.replace('_', '-')} is {shown}, expected {expected}")
    return found


def check_at_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuse flags that `too_small` finds.

    Raises:
        ValueError: naming all of them.
    """
    found = too_small(args, least)
    if found:
        raise ValueError("; ".join(found) + ".")


def check_origins(origins: Sequence[str]) -> None:
    """Refuse origins that no browser would send, and wildcards.

    Raises:
        ValueError: naming the first.
    """
    for origin in origins:
        default_port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0])
        if not _ORIGIN.fullmatch(origin) or (default_port and origin.endswith(default_port)):
            raise ValueError(
                f"--allowed-origins is {origin!r}, expected sites as browsers name them, such as https://chat.example.org or "
                "http://localhost:5173: in lower case, without a path and without the scheme's own port; there is no wildcard."
            )


def add_body_flags(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Flags about how large request bodies may be, how they have to arrive, and which web sites may call from a browser; for every API."""
    defaults = Limits()
    group.add_argument("--max-body-mb", type=float, default=defaults.max_body_bytes / 1e6, metavar="MB", help="largest request")
    group.add_argument(
        "--body-seconds", type=float, default=defaults.body_seconds, metavar="SECONDS", help="how long an upload may stall"
    )
    group.add_argument(
        "--body-rate", type=float, default=defaults.body_rate, metavar="N", help="bytes per second that an upload has to sustain"
    )
    group.add_argument(
        "--client-uploads", type=int, default=defaults.client_uploads, metavar="N", help="uploads of one client at once"
    )
    group.add_argument(
        "--client-bodies",
        type=int,
        default=defaults.client_bodies,
        metavar="N",
        help="their total size, in bodies of the maximum size",
    )
    group.add_argument(
        "--allowed-origins",
        action="extend",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web sites whose pages may call from a browser, such as https://chat.example.org; none without it",
    )


def check_body_flags(args: argparse.Namespace) -> None:
    """Refuse invalid values of the flags of `add_body_flags`.

    Raises:
        ValueError: naming them.
    """
    if not 0.001 <= args.max_body_mb <= 4000:
        raise ValueError(f"--max-body-mb is {args.max_body_mb:g}, expected 0.001 to 4000.")
    check_at_least(args, {"body_seconds": 0.001, "body_rate": 1, "client_uploads": 1, "client_bodies": 1})
    check_origins(args.allowed_origins)


def body_limits(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Limits` that the flags of `add_body_flags` set."""
    others = {name: getattr(args, name) for name in ("body_seconds", "body_rate", "client_uploads", "client_bodies")}
    return {"max_body_bytes": round(1e6 * args.max_body_mb), **others}
