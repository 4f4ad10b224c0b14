"""Checkpoints and finished models with checksums of their files, and files that hold the projector alone.

Beside what it holds, a folder that training wrote has a `checkpoint.json`:

    {"stage": "rglf", "step": 400, "sha256": {"config.json": "9f86d0...", "model.safetensors": "60303a...", ...}}

It is written when everything else is on the disk. A finished model is moved into the output folder, which holds other things too, in an
order in which readers find it either complete or not at all, and which the next run completes after an interruption (`publish_into`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llava.durable import remove_folder, sync, sync_tree, write_whole
from llava.model.adapter import ADAPTER_CONFIG, ADAPTER_FILES, REST_FILES, has_adapter, is_adapter, restore_adapter
from llava.model.projector import PROJECTOR_FILE, name_in_file
from llava.train.stages import part_of

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
CONFIG = "config.json"
FINISHED = "final"
"""Folder within an output folder where a finished model waits to be moved."""

_HASHING_THREADS = 4
_HASHED_BYTES = 2**22


@dataclass(frozen=True)
class Manifest:
    """What a folder that training wrote holds.

    Attributes:
        stage: the stage that was trained.
        step: steps taken so far.
        sha256: checksum of every file, by its path within the folder.
    """

    stage: str
    step: int
    sha256: dict[str, str]


def write_manifest(folder: Path, stage: str, step: int) -> None:
    """Write the checksums of all files of a folder into it."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    write_whole(folder / MANIFEST, json.dumps(asdict(Manifest(stage, step, _checksums(folder, names))), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, `None` where it has none.

    Raises:
        ValueError: the manifest is damaged.
    """
    file = folder / MANIFEST
    try:
        found = Manifest(**json.loads(file.read_text(encoding="utf-8")))
        sound = isinstance(found.step, int) and isinstance(found.stage, str) and isinstance(found.sha256, dict)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{file} is damaged; resume from another checkpoint, or start over with --overwrite_output_dir True.")
    return found


def damaged_files(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> list[str]:
    """The files that are missing or do not have their checksum, among `names` or all."""
    wanted = sorted(manifest.sha256 if names is None else set(names) & manifest.sha256.keys())
    there = [name for name in wanted if (folder / name).is_file()]
    found = _checksums(folder, there)
    return [name for name in wanted if found.get(name) != manifest.sha256[name]]


def _checksums(folder: Path, names: Collection[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing releases the interpreter's lock, so the disk is the bottleneck
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of an output folder, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def keep_newest(folder: Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, except the one with the name of the folder `keep`."""
    if not limit or limit < 1:
        return
    for old in checkpoints(folder)[:-limit]:
        if keep is None or old.name != Path(keep).name:
            remove_folder(old)


def restore_weights(model: Any, folder: Path) -> None:
    """Load the weights of a checkpoint folder into `model`, whatever layout its parameter names have.

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
    """The projector and the newline vector, under their names in a projector file."""
    parts = ("projector", "newline")
    return {name_in_file(name): weight.detach().cpu().contiguous() for name, weight in weights.items() if part_of(name) in parts}


def save_projector(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `mm_projector.safetensors` into `folder`, from a state dict of full weights."""
    save_file(projector_weights(weights), folder / PROJECTOR_FILE, metadata={"format": "pt"})


def publish_into(staging: Path, folder: Path) -> None:
    """Move a finished model with its manifest into a folder that holds other things too.

    Without its config.json a folder is not a checkpoint, so that file is removed first and moved last: a reader finds the old model, none,
    or the new one. The manifest comes last but one, so after a kill it says what belongs to the model, and `complete_publication` goes on.
    """
    sync_tree(staging)
    _move(staging, folder)


def complete_publication(folder: Path) -> None:
    """Complete the move of a finished model that a killed run left unfinished."""
    staging = folder / FINISHED
    if (staging / CONFIG).is_file() and (read_manifest(staging) or read_manifest(folder)):
        logger.info("moving the finished model of a killed run to %s", folder)
        _move(staging, folder)
    elif staging.is_dir() and not any(staging.iterdir()):
        staging.rmdir()


def _move(staging: Path, folder: Path) -> None:
    manifest = read_manifest(staging) or read_manifest(folder)
    assert manifest is not None, f"{staging} has no {MANIFEST}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    of_models = {ADAPTER_CONFIG, *ADAPTER_FILES, *REST_FILES, PROJECTOR_FILE}
    of_models |= {path.name for path in folder.glob("model*.safetensors*")}
    for name in sorted(of_models - manifest.sha256.keys()):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == CONFIG, path.name == MANIFEST, path.name)):
        os.replace(path, folder / path.name)
    staging.rmdir()
    sync(folder)
