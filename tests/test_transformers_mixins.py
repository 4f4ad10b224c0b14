"""transformers' own test mixins on the native face (slow), and what their run makes of outcomes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "transformers_mixins"
NAMES = ("run", "source", "exceptions")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_native_face_passes_what_llavanext_passes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FOLDER / "run.py")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if finished.returncode == 77:
        pytest.skip(finished.stdout.strip())
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


def test_a_new_failure_and_an_exception_that_passes_are_named(run: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.EXCEPTIONS, "form", {"a reason": ["test_listed", "test_healed"]})
    reference = {"test_new": "passed", "test_listed": "passed", "test_healed": "passed", "test_both": "failed", "test_odd": "skipped"}
    ours = {"test_new": "skipped", "test_listed": "failed", "test_healed": "passed", "test_both": "failed", "test_odd": "failed"}
    assert run.surprises({"LlavaNext": reference, "form": ours}) == [
        "form: test_new skipped, where LlavaNext passed.",
        "form: test_odd failed, where LlavaNext skipped.",
        "form: test_healed is as with LlavaNext; take it out of exceptions.py.",
    ]
    assert run.surprises({"LlavaNext": {"test_new": "passed"}, "form": {"test_new": "passed"}}) == []


def test_without_a_network_one_line_says_so(run: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--source", str(tmp_path)]) == run.NOT_FETCHED
    said = capsys.readouterr().out
    assert said.startswith(f"skipped: transformers' own tests cannot be had. {tmp_path} has no tests/test_modeling_common.py")
    assert said.count("\n") == 1
