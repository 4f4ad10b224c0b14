"""The projector: vision width to language width."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

PROJECTOR_FILE = "mm_projector.safetensors"
PROJECTOR_PREFIXES = ("mm_projector.", "image_newline")
"""Names of what such a file holds, within the inner model."""
_NATIVE_NAMES = (("multi_modal_projector.", "mm_projector."), ("image_newline.weight", "image_newline"))


def name_in_file(name: str) -> str:
    """A parameter's name in a projector file, which has LLaVA's whichever face wrote it."""
    for own, stored in _NATIVE_NAMES:
        name = name.replace(own, stored)
    return name


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


def load_projector(model: nn.Module, path: Path, allow_bin: bool = False) -> None:
    """Load the projector (and the newline vector, where the file has one) from a projector-only file.

    Args:
        model: the multimodal language model, or its inner model.
        path: a file, or a folder with `mm_projector.safetensors`.
        allow_bin: also read LLaVA's pickled `mm_projector.bin`, weights only.

    Raises:
        ValueError: no such file, a pickle that was not allowed, or weights that do not fit.
    """
    file = path / PROJECTOR_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no projector file {file}; give {PROJECTOR_FILE} or the folder that holds it.")
    if file.suffix == ".safetensors":
        weights = load_file(file)
    elif allow_bin:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{file} is not a safetensors file; pass --allow_bin_weights True to read PyTorch's format.")
    named = {name_in_file(name).removeprefix("model."): parameter for name, parameter in model.named_parameters()}
    own = {name: parameter for name, parameter in named.items() if name.startswith(PROJECTOR_PREFIXES)}
    found = {name.split("model.")[-1]: tensor for name, tensor in weights.items()}
    missing = [name for name in own if name.startswith(PROJECTOR_PREFIXES[0]) and name not in found]
    wrong = [name for name in found if name not in own or own[name].shape != found[name].shape]
    if missing or wrong:
        raise ValueError(
            f"{file} does not fit this projector: missing {missing or 'nothing'}, unexpected or of another shape "
            f"{wrong or 'nothing'}; check --mm_projector_type and the widths."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
