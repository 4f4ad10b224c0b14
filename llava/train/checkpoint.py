"""Checkpoints that are complete or absent, and files that hold the projector alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava.durable import remove_folder, sync, sync_tree
from llava.model.adapter import ADAPTER_CONFIG, ADAPTER_FILES, REST_FILES, has_adapter, is_adapter, restore_adapter
from llava.train.stages import part_of

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of an output folder, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def keep_newest(folder: Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the one named `keep`."""
    if not limit or limit < 1:
        return
    for old in checkpoints(folder)[:-limit]:
        if str(old) != keep:
            remove_folder(old)


def restore_weights(model: Any, folder: Path) -> None:
    """Fill `model` with the weights of a checkpoint folder, whatever layout its parameter names have.

    A model that trains an adapter is restored from an adapter folder, and any other from a full checkpoint.

    Raises:
        ValueError: the folder does not hold exactly this model's parameters.
    """
    if is_adapter(folder) != has_adapter(model):
        kinds = {True: "an adapter", False: "a full model"}
        raise ValueError(
            f"checkpoint {folder} holds {kinds[is_adapter(folder)]}, but this run trains {kinds[has_adapter(model)]}; "
            "resume with the --lora_enable it was made with."
        )
    if has_adapter(model):
        restore_adapter(model, folder)
        return
    stored = type(model).from_pretrained(str(folder), dtype=next(model.parameters()).dtype).state_dict()
    missing = sorted(set(model.state_dict()) ^ set(stored))
    if missing:
        raise ValueError(
            f"checkpoint {folder} and the model differ in {len(missing)} parameters, {missing[0]} among them; resume with "
            "the flags the checkpoint was made with."
        )
    model.load_state_dict(stored)


def projector_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector and the newline vector, under their names in a full checkpoint."""
    parts = ("projector", "newline")
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items() if part_of(name) in parts}


def save_projector(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `mm_projector.safetensors` into `folder`, from a state dict that holds whole weights."""
    save_file(projector_weights(weights), folder / PROJECTOR_FILE, metadata={"format": "pt"})


def load_projector(model: nn.Module, path: Path, allow_bin: bool = False) -> None:
    """Fill the projector (and the newline vector, where the file has one) from a projector-only file.

    Args:
        model: the multimodal language model.
        path: a file, or a folder with `mm_projector.safetensors`.
        allow_bin: also read LLaVA's pickled `mm_projector.bin`, weights only.

    Raises:
        ValueError: no such file, a pickle without leave, or weights that do not fit.
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
    own = {name: parameter for name, parameter in model.named_parameters() if part_of(name) in ("projector", "newline")}
    found = {"model." + name.split("model.")[-1]: tensor for name, tensor in weights.items()}
    missing = [name for name in own if part_of(name) == "projector" and name not in found]
    wrong = [name for name in found if name not in own or own[name].shape != found[name].shape]
    if missing or wrong:
        raise ValueError(
            f"{file} does not fit this projector: missing {missing or 'nothing'}, unexpected or of another shape "
            f"{wrong or 'nothing'}; check --mm_projector_type and the widths."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def publish_into(staging: Path, folder: Path) -> None:
    """Move finished files into a folder that holds other things too; `config.json` goes last and old ones go first.

    Without its config.json a folder is no checkpoint, so a reader finds the old model, none, or the new one.
    """
    sync_tree(staging)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for name in (ADAPTER_CONFIG, *ADAPTER_FILES, *REST_FILES):
        (folder / name).unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    staging.rmdir()
    sync(folder)
