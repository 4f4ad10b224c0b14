"""docs/Data.md: its commands run in the order of the page, its example is valid, its links and flags exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.train.arguments import DataArguments
from llava.train.flags import CheckArguments
from llava.train.mixture import _read_manifest
from llava.train.targets import segments_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "Data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each bash block printed, run one after the other in a copy of the repository made of links."""
    home = tmp_path_factory.mktemp("repository")
    (home / "playground").mkdir()
    (home / "llava").symlink_to(ROOT / "llava")
    for name in ("avg-llava-micro", "images"):
        (home / "playground" / name).symlink_to(ROOT / "playground" / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1"}
    printed = []
    for block in blocks("bash"):
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    report = json.loads((home / "playground/build/docs/report/report.json").read_text())
    assert report["totals"]["rows read"] == 3 and (home / "playground/build/docs/report/report.png").is_file()
    return printed


def test_every_command_runs(outputs: list[str]) -> None:
    assert len(outputs) == 4
    assert "every row can be trained on" in outputs[1] and "3 images" in outputs[1]
    assert "rows.json: 3 rows in the file, 6 rows per epoch" in outputs[3] and "again: 3 rows in the file, 2 rows per epoch" in outputs[3]
    assert "all: " in outputs[3] and "every row can be trained on" in outputs[3]


def test_the_example_row_is_one() -> None:
    from llava.conversation import conv_templates

    (example,) = (json.loads(block) for block in blocks("json"))
    segments = segments_of(example[0]["conversations"], conv_templates["v1"])
    assert [segment.supervised for segment in segments] == [False, True] and (ROOT / "playground/images" / example[0]["image"]).is_file()


def test_the_manifest_of_the_public_mixture_is_well_formed(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "m.yaml").write_text(block)
    assert _read_manifest(tmp_path / "m.yaml") == yaml.safe_load(block)


def test_flags_exist() -> None:
    kinds: tuple[Any, ...] = (CheckArguments, DataArguments)
    known = {f"--{field.name}" for kind in kinds for field in fields(kind)}
    assert set(re.findall(r"(?<![\w-])--[a-z_]+", PAGE)) <= known


def test_paths_exist() -> None:
    named = re.findall(r"`((?:llava|playground)/[\w./-]+)`", PAGE)
    assert named
    assert [path for path in named if not (ROOT / path).exists() and "pretrain" not in path] == []
