"""docs/ModelZoo.md: its tables are what its commands print, its measured numbers are the report's, and its code runs as pasted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llava.__main__ import main
from llava.constants import MICRO_MODEL
from llava.model.native.model_card import measured_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ModelZoo.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)\n```\n\n([^\n]*\n\n(?:\|[^\n]*\n)+)", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_prints_the_table_below_it(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "avg-llava" and main(arguments) == 0
    assert capsys.readouterr().out.endswith(shown)  # deepspeed, where it is installed, says at its import that it found no GPU


def test_three_shapes_are_shown() -> None:
    assert len(COMMANDS) == 3


def test_measured_numbers_are_the_reports() -> None:
    report = json.loads((ROOT / "docs" / "evaluation" / "playground.json").read_text())
    assert report["answered"] == 4000 and report["pictures"] == 400
    assert measured_table(report) in PAGE


def test_the_code_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(MICRO_MODEL), "next", "--to", "transformers", "--drop-router"]) == 0
    assert main(["convert", "next", "next-native", "--to", "native"]) == 0
    capsys.readouterr()
    code = re.search(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert code is not None
    exec(compile(code[1], "ModelZoo.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "[4, 16, 64]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a checkpoint folder nor a published shape"),
        (["vicuna-7b", "--image-size", "3"], "--image_size is '3'; give WIDTHxHEIGHT in pixels"),
    ],
)
def test_what_has_no_table_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["[]", '{"model_type": ["avg_llava"]}', '{"model_type": "avg_llava", "text_config": 3}', "{"])
def test_a_folder_whose_config_is_none_is_named(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(stored)
    assert main(["memory", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
