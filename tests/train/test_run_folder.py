"""What is in an output folder and what a run may do with it: kills between any two writes, damage, lost state, a second run.

A kill is acted out in this process: from a chosen change of the disk on, every change raises, so nothing can be cleaned up. The runs are
real ones at toy size; `test_kill_resume.py` kills processes.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.durable import NoSpaceError, held_alone
from llava.train import run_folder
from llava.train.checkpoint import Manifest, checkpoints, damaged_files, read_manifest
from llava.train.llava_trainer import LlavaTrainer
from llava.train.run import make_trainer, parse_arguments, train
from llava.train.run_folder import LOCK, prepare
from llava.train.train import main

Flags = Callable[..., list[str]]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


class KilledError(BaseException):
    """Where the process would be gone."""


class Trap:
    """Counts changes of a folder on the disk and, from the chosen one on, raises instead; hooks cannot be removed, so there is one."""

    def __init__(self) -> None:
        self.folder = ""
        self.left = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        writes = event == "open" and (any(letter in str(arguments[1]) for letter in "wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left <= 0:
                raise KilledError

    def kills(self, folder: Path, change: int, work: Callable[[], object]) -> bool:
        """Do `work`; whether it was killed before the `change`-th change of `folder`, counted from 1."""
        self.left, self.folder = change, str(folder)
        try:
            work()
        except KilledError:
            return True
        finally:
            self.folder = ""
        return False


@pytest.fixture(scope="module")
def trap() -> Trap:
    return Trap()


STEPS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 1,
    "lr_scheduler_type": "constant",  # a schedule that has reached 0 would train nothing in a longer run's first step
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_flags: Flags) -> tuple[LlavaTrainer, Path]:
    """A trainer behind its last step, and its output folder: a checkpoint of the last step, no finished model yet."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    trainer = make_trainer(parse_arguments(run_flags(folder, "rglf", **STEPS)))
    trainer.train()
    return trainer, folder


@pytest.fixture
def work(trained: tuple[LlavaTrainer, Path], tmp_path: Path) -> Iterator[tuple[LlavaTrainer, Path]]:
    """The trainer, writing to a copy of its folder."""
    trainer, source = trained
    folder = tmp_path / "out"
    shutil.copytree(source, folder)
    before = trainer.args.output_dir
    trainer.args.output_dir = str(folder)
    yield trainer, folder
    trainer.args.output_dir = before


def start_of(run_flags: Flags, folder: Path, **changes: object) -> Any:
    return prepare(parse_arguments(run_flags(folder, "rglf", **{**STEPS, **changes}))[2])


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("earlier", ["nothing", "a model"])
def test_a_kill_anywhere_while_the_finished_model_is_written(
    earlier: str, work: tuple[LlavaTrainer, Path], trap: Trap, run_flags: Flags, tmp_path: Path
) -> None:
    """At any moment the folder holds the old model, none, or the new one; the next run finishes what is finished, or begins at the
    checkpoint; and what comes out is the same in every byte."""
    trainer, begun = work
    if earlier == "a model":
        for name in ("config.json", "model-00001-of-00002.safetensors", "adapter_config.json", "mm_projector.safetensors"):
            (begun / name).write_text("old")
    wanted = weights_of(begun / "checkpoint-2")
    outcomes = []
    for change in range(1, 200):
        folder = tmp_path / str(change)
        shutil.copytree(begun, folder)
        trainer.args.output_dir = str(folder)
        killed = trap.kills(folder, change, trainer.save_final)
        if (folder / "config.json").is_file() and (folder / "config.json").read_text() != "old":
            manifest = read_manifest(folder)
            assert manifest is not None and damaged_files(folder, manifest) == []
        start = start_of(run_flags, folder, resume_from_checkpoint=True)
        outcomes.append("finished" if start.finished else "checkpoint")
        if start.finished is None:
            assert start.checkpoint == folder / "checkpoint-2"
            trainer.save_final()
        assert weights_of(folder) == wanted and start_of(run_flags, folder, resume_from_checkpoint=True).finished is not None
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "checkpoint.json", "trainer_state.json"} <= names and not names & {"final", ".unfinished-final"}
        assert not names & {"model-00001-of-00002.safetensors", "adapter_config.json", "mm_projector.safetensors"}
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed and outcomes.count("checkpoint") > 5 and outcomes.count("finished") > 5
    assert outcomes == sorted(outcomes), "once a model is finished, a later kill does not lose it"


def test_a_kill_anywhere_while_a_checkpoint_is_written(
    work: tuple[LlavaTrainer, Path], trap: Trap, run_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before it, or the new one, is whole at any moment, also while the old one is removed."""
    trainer, begun = work
    monkeypatch.setattr(trainer.args, "save_total_limit", 1)
    monkeypatch.setattr(trainer.state, "global_step", 3)
    found = []
    for change in range(1, 300):
        folder = tmp_path / str(change)
        shutil.copytree(begun, folder)
        trainer.args.output_dir = str(folder)
        killed = trap.kills(folder, change, lambda: trainer._save_checkpoint(trainer.model_wrapped, None))
        found.append(start_of(run_flags, folder, resume_from_checkpoint=True, max_steps=5).checkpoint.name)
        assert not list(folder.glob(".unfinished-*"))
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed and set(found) == {"checkpoint-2", "checkpoint-3"} and found == sorted(found) and len(found) > 20


@pytest.mark.parametrize("stage", ["multi_granularity", "rglf"])
def test_a_run_that_was_at_its_end_takes_no_further_step(
    stage: str, trap: Trap, tmp_path: Path, run_flags: Flags, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed behind the last checkpoint, started again, and started once more when all is done: the same steps, bytes and state."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(run_flags(whole, stage, **STEPS))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    trainer = train(run_flags(cut, stage, resume_from_checkpoint=True, **STEPS))
    assert trainer.state.global_step == 2 and weights_of(cut) == weights_of(whole)
    losses = [[entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
              for folder in (whole, cut)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 2

    state = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.name != LOCK}
    logging.getLogger("llava").addHandler(caplog.handler)
    again = train(run_flags(cut, stage, resume_from_checkpoint=True, **STEPS))
    assert "holds the finished model of this run (2 steps); nothing is left to do" in caplog.text and again.state.global_step == 2
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.name != LOCK} == state

    logging.getLogger("llava").removeHandler(caplog.handler)
    longer = train(run_flags(cut, stage, resume_from_checkpoint=True, **{**STEPS, "max_steps": 3}))
    assert longer.state.global_step == 3 and read_manifest(cut).step == 3 and weights_of(cut) != weights_of(whole)  # type: ignore[union-attr]


def test_a_finished_run_without_checkpoints_is_recognised(work: tuple[LlavaTrainer, Path], run_flags: Flags) -> None:
    trainer, folder = work
    with pytest.raises(ValueError, match=r"holds checkpoint-2 of an earlier run; resume it"):
        start_of(run_flags, folder)
    trainer.save_final()
    shutil.rmtree(folder / "checkpoint-2")
    assert start_of(run_flags, folder, resume_from_checkpoint=True).finished.step == 2
    with pytest.raises(ValueError, match=r"holds a finished model of an earlier run; .*--overwrite_output_dir True, or choose another"):
        start_of(run_flags, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        start_of(run_flags, folder, resume_from_checkpoint=True)
    assert start_of(run_flags, folder, overwrite_output_dir=True).checkpoint is None
    assert (folder / "model.safetensors").is_file() and read_manifest(folder) is None


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip], ids=["missing", "flipped"])
def test_damaged_weights_are_never_gone_on_from(
    damage: Callable[[Path], None], work: tuple[LlavaTrainer, Path], run_flags: Flags
) -> None:
    _, folder = work
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-1")
    for name in ("model.safetensors", "config.json"):
        damage(folder / "checkpoint-2" / name)
    for more in ({}, {"accept_lost_state": True}):
        with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: config.json, model.safetensors are missing or not as written.*out/"
                                             r"checkpoint-1, or start over"):  # fmt: skip
            start_of(run_flags, folder, resume_from_checkpoint=True, **more)
    other = folder / "checkpoint-1"
    assert start_of(run_flags, folder, resume_from_checkpoint=other).checkpoint == other


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for damage in (Path.unlink, flip)]
    + [("checkpoint.json", Path.unlink)],  # a manifest with a flipped bit has a sentence of its own, see test_checkpoint.py
)
def test_lost_state_is_an_error_until_it_is_accepted(
    name: str, damage: Callable[[Path], None], work: tuple[LlavaTrainer, Path], run_flags: Flags
) -> None:
    _, folder = work
    damage(folder / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-2 lacks {name}, .* accept that with --accept_lost_state True"):
        start_of(run_flags, folder, resume_from_checkpoint=True)
    start = start_of(run_flags, folder, resume_from_checkpoint=True, accept_lost_state=True)
    assert start.checkpoint == folder / "checkpoint-2" and start.lost_state == {name}


@pytest.mark.parametrize(("written", "needed"), [(True, ["scheduler.pt", "rng_state.pth"]), (False, ["rng_state.pth"])])
def test_deepspeeds_state_lies_among_its_shards(written: bool, needed: list[str], tmp_path: Path, run_flags: Flags) -> None:
    """The schedule is looked for where the checkpoint was written with one."""
    args = parse_arguments(run_flags(tmp_path, "rglf"))[2]
    args.deepspeed = "zero2.json"
    files = {"global_step2/shard.pt": "0", **({"scheduler.pt": "1"} if written else {})}
    assert run_folder._state_files(args, Manifest("rglf", 2, files)) == needed


def test_ctrl_c_says_where_the_run_would_go_on(
    tmp_path: Path, run_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = LlavaTrainer.log

    def pressed(self: LlavaTrainer, *arguments: Any, **options: Any) -> None:
        log(self, *arguments, **options)
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LlavaTrainer, "log", pressed)
    monkeypatch.setattr(sys, "argv", ["train", *run_flags(tmp_path, "rglf", **{**STEPS, "max_steps": 5})])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main() == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    line = f"interrupted: {tmp_path}/checkpoint-2 is complete; the same command with --resume_from_checkpoint True resumes from it.\n"
    assert capsys.readouterr().err.endswith(line)
    with held_alone(tmp_path / LOCK, "it"):
        assert start_of(run_flags, tmp_path, resume_from_checkpoint=True, max_steps=5).checkpoint == tmp_path / "checkpoint-2"


def test_a_checkpoint_of_an_earlier_version_is_called_that(work: tuple[LlavaTrainer, Path], run_flags: Flags) -> None:
    _, folder = work
    (folder / "checkpoint-2" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"lacks checkpoint.json, .* older versions wrote none, and damage could not be seen. Copy"):
        start_of(run_flags, folder, resume_from_checkpoint=True)


def test_only_the_accepted_lost_state_is_initialised_again(tmp_path: Path, run_flags: Flags, caplog: pytest.LogCaptureFixture) -> None:
    """Without its optimizer the run resumes from the weights, at the position and learning rate where it was."""
    flags = {**STEPS, "max_steps": 4, "lr_scheduler_type": "linear"}
    train(run_flags(tmp_path / "whole", "rglf", **flags))
    folder = tmp_path / "lossy"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")
    flip(folder / "checkpoint-2" / "optimizer.pt")
    logging.getLogger("llava").addHandler(caplog.handler)
    trainer = train(run_flags(folder, "rglf", resume_from_checkpoint=True, accept_lost_state=True, **flags))
    logging.getLogger("llava").removeHandler(caplog.handler)
    logged = [[(entry["step"], entry["learning_rate"], entry["loss"])
               for entry in json.loads((path / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
              for path in (tmp_path / "whole", folder)]  # fmt: skip
    assert [entry[:2] for entry in logged[0]] == [entry[:2] for entry in logged[1]]
    assert logged[0][:3] == logged[1][:3] and weights_of(folder) != weights_of(tmp_path / "whole")
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    assert "without optimizer.pt, as --accept_lost_state allows" in caplog.text


def test_a_checkpoint_of_another_stage(work: tuple[LlavaTrainer, Path], run_flags: Flags) -> None:
    trainer, folder = work
    flags = run_flags(folder, "multi_granularity", resume_from_checkpoint=True, **STEPS)
    for _ in ("a checkpoint", "a finished model"):
        with pytest.raises(ValueError, match=r"is of stage rglf, but this run's stage is multi_granularity; .* --model_name_or_path"):
            prepare(parse_arguments(flags)[2])
        trainer.save_final()


def _hold(lock: Path, held: Any, done: Any) -> None:
    with held_alone(lock, "it"):
        held.set()
        done.wait(60)
        os._exit(1)  # as a crash: nothing is released


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, run_flags: Flags) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / LOCK, held, done))
    process.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=r"another process is at work on the output folder .*; wait for it or stop it"):
        train(run_flags(tmp_path, "rglf", **STEPS))
    done.set()
    process.join(60)
    with held_alone(tmp_path / LOCK, "it"), pytest.raises(ValueError, match="another process is at work on it"):
        with held_alone(tmp_path / LOCK, "it"):
            pytest.fail("held twice")


@pytest.mark.parametrize("writes", ["torch.save", "model"])
def test_a_full_disk_while_a_checkpoint_is_written(
    writes: str, work: tuple[LlavaTrainer, Path], run_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence; the checkpoint before stays, nothing half is left, and with room the run goes on from there."""
    import resource

    trainer, folder = work
    monkeypatch.setattr(trainer.state, "global_step", 3)
    size = {"torch.save": (folder / "checkpoint-2" / "model.safetensors").stat().st_size + 1000, "model": 50_000}[writes]
    if writes == "torch.save":
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda value, path, **more: save([value, torch.zeros(size)], path, **more))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(NoSpaceError, match=r"no space for .*/checkpoint-3 \("):
            trainer._save_checkpoint(trainer.model_wrapped, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    assert start_of(run_flags, folder, resume_from_checkpoint=True).checkpoint == folder / "checkpoint-2"
    monkeypatch.undo()
    monkeypatch.setattr(trainer.state, "global_step", 3)
    trainer._save_checkpoint(trainer.model_wrapped, None)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert load_file(folder / "checkpoint-3" / "model.safetensors")
