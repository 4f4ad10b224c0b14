"""What the programs check about their flags before they begin, each with one sentence for the user."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping


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
