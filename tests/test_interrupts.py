"""Ctrl-C is one line and status 130."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.interrupts import INTERRUPTED, InterruptedWorkError, keeping, run_program

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_program_that_ends_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda: None) == 0 and run_program(lambda: 3) == 3
    with pytest.raises(SystemExit, match="a sentence"):
        run_program(lambda: sys.exit("a sentence"))
    assert capsys.readouterr().err == ""


def _press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_one_line_that_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def work() -> None:
        with keeping(lambda: f"{len(done)} parts are kept"), keeping(lambda: f"{len(done)} rows are kept"):
            done.append(1)
            _press()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_program(work) == INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted: 1 rows are kept.\n"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends a program that hangs while it ends

    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_program(_press) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted: nothing was written.\n"


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("peft.tuners", 'peft is not installed; install the train extra: pip install -e ".[train]"'),
        (
            "matplotlib",
            "matplotlib is not installed; install the train or eval or playground extra: "
            'pip install -e ".[train]" or pip install -e ".[eval]" or pip install -e ".[playground]"',
        ),
        ("nowhere", "No module named 'nowhere'"),
    ],
)
def test_of_a_missing_package_the_extras_that_bring_it_are_named(module: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    assert run_program(work) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_first_process_speaks_for_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_program(_press) == INTERRUPTED and capsys.readouterr().err == ""


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="else"), keeping(lambda: "kept"):
        raise ValueError("else")
    with pytest.raises(InterruptedWorkError, match="kept"), keeping(lambda: "kept"):
        raise KeyboardInterrupt
