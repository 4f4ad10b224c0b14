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


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_blocks_run_as_pasted_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "playground").symlink_to(ROOT / "playground")
    monkeypatch.chdir(tmp_path)
    command, *arguments = shlex.split(block("bash"))
    assert command == "avg-llava" and main(arguments) == 0
    code = block("python")
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [line.strip() for line in ended.stdout.splitlines()] == ["658", "658", "64 336"]
    assert re.findall(r"# (\d+)", code) == ["658", "658", "64"]
