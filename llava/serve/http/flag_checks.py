"""What the programs check about their flags before they begin, each with one sentence for the user."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava.serve.protocol import Limits

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*?#@A-Z]+")


def too_small(args: argparse.Namespace, least: Mapping[str, float]) -> list[str]:
    """What is wrong with flags that have to be finite numbers of at least so much, a part of a sentence for each; a missing one is fine.

    Args:
        least: per flag, by its name among `args`.
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
    """Refuse flags as `too_small` finds them.

    Raises:
        ValueError: naming all of them.
    """
    found = too_small(args, least)
    if found:
        raise ValueError("; ".join(found) + ".")


def check_origins(origins: Sequence[str]) -> None:
    """Refuse origins that no browser would send, and those that stand for every site.

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
    """How request bodies have to arrive, and which web sites may ask from a browser; for every service with an API."""
    defaults = Limits()
    group.add_argument(
        "--body-seconds", type=float, default=defaults.body_seconds, help="that an upload may bring nothing (default: %(default)g)"
    )
    group.add_argument(
        "--body-rate", type=float, default=defaults.body_rate, help="bytes per second that an upload has to keep up (default: %(default)g)"
    )
    group.add_argument(
        "--client-uploads", type=int, default=defaults.client_uploads, help="uploads of one client at once (default: %(default)s)"
    )
    group.add_argument(
        "--client-bodies",
        type=int,
        default=defaults.client_bodies,
        help="what they take together, in bodies of the largest size (default: %(default)s)",
    )
    group.add_argument(
        "--allowed-origins",
        action="extend",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web sites whose pages may ask from a browser, such as https://chat.example.org (default: none)",
    )


def check_body_flags(args: argparse.Namespace) -> None:
    """Refuse numbers and origins of `add_body_flags` that cannot work.

    Raises:
        ValueError: naming them.
    """
    check_at_least(args, {"body_seconds": 0.001, "body_rate": 1, "client_uploads": 1, "client_bodies": 1})
    check_origins(args.allowed_origins)


def body_limits(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Limits` that `add_body_flags` set."""
    return {name: getattr(args, name) for name in ("body_seconds", "body_rate", "client_uploads", "client_bodies")}
