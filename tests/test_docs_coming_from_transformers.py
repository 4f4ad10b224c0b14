"""docs/Coming_from_transformers.md: its blocks run as pasted, and print what their comments say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "Coming_from_transformers.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path, **environment: str) -> list[str]:
    """What a fresh interpreter prints."""
    variables = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [line.strip() for line in ended.stdout.splitlines()]


def test_the_blocks_run_as_pasted_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "playground").symlink_to(ROOT / "playground")
    (tmp_path / "playground-report").mkdir()
    (tmp_path / "playground-report" / "report.json").symlink_to(ROOT / "docs" / "evaluation" / "playground.json")
    monkeypatch.chdir(tmp_path)
    for line in blocks("bash"):
        command, *arguments = shlex.split(line)
        assert command == "avg-llava" and main(arguments) == 0
    used, _, shared = blocks("python")  # the second is run with the other tests of TRL
    assert run(used, tmp_path, PYTHONPATH=str(ROOT)) == ["658", "658", "64 336"]
    assert re.findall(r"# (\d+)", used) == ["658", "658", "64"]
    hidden = 'import sys; sys.modules["llava"] = None\n'  # importing the package fails from here on
    assert run(f"{hidden}{shared}\nprint(type(model).__module__.split('.')[0])", tmp_path) == ["transformers_modules"]
