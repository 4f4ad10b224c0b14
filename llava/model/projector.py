"""The projector: vision width to language width."""

from __future__ import annotations

import re

from torch import nn


def build_projector(projector_type: str, vision_width: int, width: int) -> nn.Module:
    """Make a projector (C, P, Dv) -> (C, P, D).

    Args:
        projector_type: `linear`, `mlpNx_gelu` (N linear layers with GELU between) or `identity`.

    Raises:
        ValueError: another type, or `identity` between different widths.
    """
    if projector_type == "linear":
        return nn.Linear(vision_width, width)
    if projector_type == "identity":
        if vision_width != width:
            raise ValueError(f"mm_projector_type is 'identity' but the tower has width {vision_width} and the language model {width}.")
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type)
    if match is None:
        raise ValueError(f"mm_projector_type is {projector_type!r}, expected linear, mlpNx_gelu (such as mlp2x_gelu) or identity.")
    layers: list[nn.Module] = [nn.Linear(vision_width, width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
