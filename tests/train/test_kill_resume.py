"""`kill -9` in the middle of stage 3, of stage 4 and of scoring: started again, the programs end bit for bit where an unbroken run ends.

Every run is a process of its own with the real command line and one thread. A killed one sends itself the signal at a chosen
place of its work, so that it is cut at the same point on any machine. Nothing is cleaned up: the process is gone at that instant.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

ORACLE = Path(__file__).parents[1] / "oracle"
ROOT = Path(__file__).parents[2]
TRAIN, SCORE = "llava.train.train", "llava.train.score_granularities"
CLOCKS = {"tokens_per_second", "memory_gb"}
"""Logged figures that no two runs share."""

Flags = Callable[..., list[str]]
Start = Callable[..., int]

RUN = "\nfrom {module} import main\nmain()\n"

DIE = "import os, signal\ndef die():\n    os.kill(os.getpid(), signal.SIGKILL)\n"

AFTER_THE_LOG_OF_STEP_3 = """
from llava.train.llava_trainer import LlavaTrainer
log = LlavaTrainer.log
def log_and_die(self, *arguments, **options):
    log(self, *arguments, **options)
    if self.state.global_step == 3:
        die()
LlavaTrainer.log = log_and_die
"""

INSIDE_CHECKPOINT_4 = """
import torch
save = torch.save
def save_or_die(value, path, *arguments, **options):
    if "checkpoint-4" in str(path) and "optimizer" in str(path):
        open(path, "wb").write(b"half a file")
        die()
    save(value, path, *arguments, **options)
torch.save = save_or_die
"""

INSIDE_A_WRITE = """
import pyarrow.parquet as pq
write, written = pq.write_table, []
def write_or_die(table, path, *arguments, **options):
    written.append(path)
    if len(written) == %d:
        open(path, "wb").write(b"PAR1 half a file")
        die()
    write(table, path, *arguments, **options)
pq.write_table = write_or_die
"""
"""Cuts the given write of the process, of a part or of the joined file, counted from 1."""


@pytest.fixture(
    scope="module", params=["warm", pytest.param("cold", marks=pytest.mark.slow)], ids=["imported-once", "fresh-interpreters"]
)
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Run a module's command line in a new process, with code that arms a trap before it; gives the exit code.

    Importing takes longer than the toy runs, so processes are forked from one that has imported, and is otherwise idle; the slow
    form starts a fresh interpreter each time.
    """
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([TRAIN, SCORE, "deepspeed"])  # accelerate imports the last wherever it is installed

    def warm(module: str, flags: list[str], trap: str = "") -> int:
        with pytest.MonkeyPatch.context() as arguments:
            arguments.setattr(sys, "argv", [module, *flags])
            process = context.Process(target=exec, args=(DIE + trap + RUN.format(module=module), {"__name__": "__main__"}))
            process.start()
        process.join(timeout=240)
        assert process.exitcode is not None, f"{module} did not end"
        return process.exitcode

    def cold(module: str, flags: list[str], trap: str = "") -> int:
        code = ["-c", DIE + trap + RUN.format(module=module)] if trap else ["-m", module]
        return subprocess.run([sys.executable, *code, *flags], env=dict(os.environ), timeout=600, check=False).returncode

    yield warm if request.param == "warm" else cold
    patch.undo()


def _logged(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if name not in CLOCKS} for entry in history if "loss" in entry]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize(
    ("stage", "trap", "left"),
    [
        ("multi_granularity", AFTER_THE_LOG_OF_STEP_3, {"checkpoint-2"}),
        ("rglf", INSIDE_CHECKPOINT_4, {"checkpoint-2", ".unfinished-checkpoint-4"}),
    ],
    ids=["stage3-between-checkpoints", "stage4-inside-a-checkpoint"],
)
def test_training_goes_on_where_it_was_killed(
    stage: str, trap: str, left: set[str], start: Start, run_flags: Flags, tmp_path: Path
) -> None:
    """Shuffled and grouped rows, router dropout and AdamW's state all continue: every logged number and every weight is the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def flags(output: Path) -> list[str]:
        return run_flags(
            output, stage, max_steps=5, save_strategy="steps", save_steps=2, learning_rate=1e-3, group_by_modality_length=True,
            index_cache=tmp_path / "index",
        )  # fmt: skip

    assert start(TRAIN, flags(whole)) == 0
    assert start(TRAIN, flags(killed), trap) == -signal.SIGKILL
    assert {path.name for path in killed.iterdir() if "checkpoint" in path.name} == left
    assert not (killed / "config.json").exists()
    kept = _identity(killed / "checkpoint-2")
    assert start(TRAIN, [*flags(killed), "--resume_from_checkpoint", "True"]) == 0
    assert _identity(killed / "checkpoint-2") == kept, "the run started over instead of resuming"
    logged = _logged(killed)
    assert logged == _logged(whole)
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5] and len({entry["loss"] for entry in logged}) > 1
    expected, found = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    untrained = load_file(whole / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(untrained[name], expected[name]) for name in expected)
    assert not list(killed.glob(".unfinished-*"))


def test_scoring_goes_on_where_it_was_killed(start: Start, tmp_path: Path) -> None:
    """Killed in the middle of writing the third part of four; the file that the next pass makes equals an unbroken one's."""
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"

    def flags(output: Path) -> list[str]:
        given = {
            "model_name_or_path": ORACLE / "checkpoint", "data_path": ORACLE / "train_data.json", "image_folder": ORACLE / "images",
            "output_file": output, "index_cache": tmp_path / "index", "batch_size": 2, "part_rows": 2, "device": "cpu",
        }  # fmt: skip
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]

    assert start(SCORE, flags(whole)) == 0
    assert start(SCORE, flags(killed), INSIDE_A_WRITE % 3) == -signal.SIGKILL
    assert len(list((tmp_path / "killed.parquet.parts").glob("part-*"))) == 2 and not killed.exists()
    # Two parts and the joined file are left to write: a pass that started over would come to a fourth write and die there.
    assert start(SCORE, flags(killed), INSIDE_A_WRITE % 4) == 0
    expected, found = pq.read_table(whole), pq.read_table(killed)
    assert found.schema.equals(expected.schema, check_metadata=True)
    losses = [np.array(table["losses"].to_pylist(), dtype=np.float32).tobytes() for table in (expected, found)]
    assert losses[0] == losses[1]  # as bytes, since a row without labels has nan
    others = ["row", "id", "visual_tokens"]
    assert found.select(others).equals(expected.select(others)) and found.num_rows == 7
    assert not (tmp_path / "killed.parquet.parts").exists()
