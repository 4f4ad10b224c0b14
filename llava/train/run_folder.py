"""What an output folder holds, and what a run may do with it: start, resume, or find that everything is done.

A folder belongs to one run at a time (`held`). What an earlier run left in it is resumed from, kept, or removed on request, and never mixed
with what this run writes. A run resumes only from a checkpoint whose files all have the checksums that they were written with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME

from llava.durable import held_alone, remove_folder, remove_unfinished
from llava.model.adapter import ADAPTER_CONFIG
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import CONFIG, MANIFEST, Manifest, checkpoints, complete_publication, damaged_files, read_manifest

logger = logging.getLogger(__name__)

LOCK = ".run.lock"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the folder that it resumes from, `None` to start at the first step.
        lost_state: files of the checkpoint's state whose loss was accepted.
        finished: the finished model that the folder holds, if the run asked for the newest checkpoint; there may be nothing left to do.
    """

    checkpoint: Path | None = None
    lost_state: frozenset[str] = frozenset()
    finished: Manifest | None = None


@contextmanager
def held(args: TrainingArguments) -> Iterator[None]:
    """Lock the output folder while the block runs; in a distributed run the saving process holds the lock for all.

    Raises:
        ValueError: another run is writing there.
    """
    if not args.should_save:
        yield
        return
    with held_alone(args.output_folder / LOCK, f"the output folder {args.output_folder}"):
        yield


def prepare(args: TrainingArguments) -> Start:
    """Clean up after killed runs, look at what the folder holds, and decide where this run starts.

    Raises:
        ValueError: an earlier run that this one neither resumes nor may remove, or a checkpoint that cannot be resumed from.
    """
    output = args.output_folder
    if args.should_save:
        complete_publication(output)
        remove_unfinished(output)
    requested = _requested_checkpoint(args)
    if requested is None:
        _make_room(args)
        return Start()
    if requested == "newest":
        finished = _finished(args)
        return resume_newest(args) if finished is None else Start(finished=finished)
    return _checked(Path(requested), args)


def resume_newest(args: TrainingArguments) -> Start:
    """Resume from the newest checkpoint of the output folder.

    Raises:
        ValueError: there is none, or it cannot be resumed from.
    """
    earlier = checkpoints(args.output_folder)
    if not earlier:
        raise ValueError(
            f"{args.output_folder} holds no checkpoint to resume from; leave --resume_from_checkpoint out to start at the first step."
        )
    return _checked(earlier[-1], args)


def kept(args: TrainingArguments) -> str:
    """What an interrupted run leaves behind, without a full stop."""
    earlier = checkpoints(args.output_folder)
    if not earlier:
        return f"no checkpoint had been written to {args.output_folder}"
    return f"{earlier[-1]} is complete; the same command with --resume_from_checkpoint True resumes from it"


def random_state_file(args: TrainingArguments) -> str:
    """The file of a checkpoint with this process's random state."""
    return f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"


def _requested_checkpoint(args: TrainingArguments) -> str | None:
    """A checkpoint's folder, `newest`, or `None`: the flag takes a folder, or `True` for the newest one of the output folder."""
    value = args.resume_from_checkpoint
    return {"true": "newest", "false": None}.get(value.lower(), value) if value is not None else None


def _make_room(args: TrainingArguments) -> None:
    """Refuse a folder that holds an earlier run, or clear it with `--overwrite_output_dir`.

    An earlier model stays until the new one replaces it, but no longer counts as this run's.
    """
    output = args.output_folder
    earlier = checkpoints(output)
    model = any((output / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    if not earlier and not model:
        return
    if not args.overwrite_output_dir:
        found = earlier[-1].name if earlier else "a finished model"
        raise ValueError(
            f"{output} holds {found} of an earlier run; resume it with --resume_from_checkpoint True, start over with "
            "--overwrite_output_dir True, or choose another --output_dir."
        )
    if args.should_save:
        logger.warning(
            "%s holds an earlier run: %d checkpoints are removed, %s", output, len(earlier),
            "its model is replaced when this run is finished" if model else "there is no finished model",
        )  # fmt: skip
        (output / MANIFEST).unlink(missing_ok=True)
        for folder in earlier:
            remove_folder(folder)


def _finished(args: TrainingArguments) -> Manifest | None:
    """The manifest of a finished model in the output folder whose files are all whole.

    Raises:
        ValueError: the model is of another stage.
    """
    output = args.output_folder
    manifest = read_manifest(output) if (output / CONFIG).is_file() else None
    if manifest is None:
        return None
    _check_stage(output, manifest, args)
    damaged = damaged_files(output, manifest)
    if damaged:
        logger.warning("the finished model in %s is damaged (%s); it is rebuilt from the newest checkpoint", output, ", ".join(damaged))
        return None
    return manifest


def _check_stage(folder: Path, manifest: Manifest, args: TrainingArguments) -> None:
    if manifest.stage != args.stage_plan.name:
        raise ValueError(
            f"{folder} is of stage {manifest.stage}, but this run's stage is {args.stage_plan.name}; resume with the flags it was made "
            "with, or start from its weights: --model_name_or_path takes a checkpoint's folder, --output_dir another one."
        )


def _checked(folder: Path, args: TrainingArguments) -> Start:
    """Resume from a checkpoint, if all of its files are as they were written.

    In a distributed run the saving process checks every file for all.

    Raises:
        ValueError: it is of another stage, weights are damaged, or state is lost and that is not accepted.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder}; give one, or True for the newest one in --output_dir.")
    manifest = read_manifest(folder)
    needed = _state_files(args, manifest)
    if manifest is None:
        damaged: list[str] = [MANIFEST]
    else:
        _check_stage(folder, manifest, args)
        damaged = damaged_files(folder, manifest, None if args.should_save else needed)
    broken = [name for name in damaged if not _is_state(name)]
    if broken:
        raise ValueError(
            f"checkpoint {folder} is damaged: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} missing or not as written. Copy it "
            f"again, {_another(folder)}start over with --overwrite_output_dir True."
        )
    lost = [name for name in needed if name in damaged or not (folder / name).is_file()] + [name for name in damaged if name == MANIFEST]
    if lost and not args.accept_lost_state:
        risk = "lost state is initialised again" if lost != [MANIFEST] else "older versions wrote none, and damage could not be seen"
        raise ValueError(
            f"checkpoint {folder} lacks {', '.join(lost)}, or they are not as written: {risk}. Copy it again, or accept that with "
            "--accept_lost_state True."
        )
    if lost:
        logger.warning("resuming from %s without %s, as --accept_lost_state allows", folder, ", ".join(lost))
    return Start(folder, frozenset(lost))


def _another(folder: Path) -> str:
    others = [path for path in checkpoints(folder.parent) if path != folder]
    return f"resume from another one with --resume_from_checkpoint {others[-1]}, or " if others else "or "


def _state_files(args: TrainingArguments, manifest: Manifest | None) -> list[str]:
    """State files that this run's processes read: those that every such run has, and those that the checkpoint was written with.

    DeepSpeed keeps the optimizer in its own shards, and the schedule too where it created it.
    """
    always = [] if args.deepspeed else [OPTIMIZER_NAME, SCHEDULER_NAME]
    written = [name for name in (SCHEDULER_NAME, SCALER_NAME) if manifest and name in manifest.sha256 and name not in always]
    processes = [f"rng_state_{index}.pth" for index in range(args.world_size)] if args.world_size > 1 else ["rng_state.pth"]
    return always + written + processes


def _is_state(name: str) -> bool:
    """Whether a file of a checkpoint holds state that training can resume without."""
    return name in (MANIFEST, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME) or (name.startswith("rng_state") and name.endswith(".pth"))
