"""The front page tells the truth: its files exist, its commands' flags exist, its Python runs, its images are what the model does now."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from llava.eval.run_llava import build_parser, eval_model
from llava.eval.run_llava import main as run_command
from llava.inference import MICRO_MODEL
from llava.messages import RoutingRequest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
FOLDERS = ("llava", "scripts", "playground", "tests", "docs", "lmms-eval")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Every command of the page's bash blocks, as words."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


ALL_COMMANDS = [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands(page)]
CLI_COMMANDS = [words for page in PAGES for words in commands(page) if words[:3] == ["python", "-m", "llava.eval.run_llava"]]


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_a_command_names_only_what_exists(words: list[str]) -> None:
    paths = [word for word in words if word.split("/")[0] in FOLDERS and "/" in word]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("words", CLI_COMMANDS, ids=lambda words: " ".join(words[3:])[:50])
def test_the_command_lines_flags_parse(words: list[str]) -> None:
    arguments = build_parser().parse_args(words[3:])
    assert arguments.query
    assert (ROOT / arguments.image_file).is_file()


def test_the_table_of_policies_parses_both_ways() -> None:
    rows = re.findall(r"^\| `(\w+=[^`]*)` \| `(--[^`]*)` \|", read("README.md"), flags=re.MULTILINE)
    assert len(rows) == 5
    for keyword, flags in rows:
        policy = eval(f"RoutingRequest({keyword})", {"RoutingRequest": RoutingRequest})
        parsed = build_parser().parse_args(["--query", "?", *shlex.split(flags)])
        assert policy == RoutingRequest(parsed.vis_token_granularity, parsed.max_visual_tokens, parsed.granularity_bias)


def test_extras_in_the_table_are_the_packages() -> None:
    section = read("README.md").split("\n## Install\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    project = read("pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert listed == set(re.findall(r"^(\w+) = \[", project, flags=re.MULTILINE))


@pytest.mark.parametrize("source", blocks("README.md", "python"), ids=["llava_names", "assistant", "processor"])
def test_python_runs_as_written(source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("name", "column"), [("answer-coarse.png", 0), ("answer-fine.png", 1)])
def test_the_two_answers_are_the_models(name: str, column: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = re.search(r'^\| ("Which large shape .*) \|$', read("README.md"), flags=re.MULTILINE)
    assert head
    shown = re.fullmatch(r'"(.*)" \*\*(\w+)\*\*, from (\d+)(?: visual tokens)?', head[1].split(" | ")[column])
    assert shown
    question, answer, tokens = shown.groups()
    drawn = tmp_path / name
    flags = ["--image-file", str(ROOT / "playground/images/scene_beige.png"), "--explain", "--explain-image", str(drawn)]
    run_command([*flags, "--query", question])
    out = capsys.readouterr().out
    assert out.startswith(f"{answer}\n") and f", {tokens} visual tokens of" in out
    with Image.open(drawn) as now, Image.open(ROOT / "docs" / "images" / name) as committed:
        difference = ImageChops.difference(now, committed.convert("RGB"))
        assert max(ImageStat.Stat(difference).mean) < 1  # of 255: other versions of Pillow scale and write a little differently


def test_the_badges_are_pyproject_tomls() -> None:
    project = read("pyproject.toml")
    assert 'requires-python = ">=3.10,<3.14"' in project and "Python: 3.10 to 3.13" in read("docs/images/python.svg")
    assert 'license = "Apache-2.0"' in project and "licence: Apache 2.0" in read("docs/images/licence.svg")


def test_the_quick_start_names_the_shipped_model() -> None:
    assert str(MICRO_MODEL.relative_to(ROOT)) in read("README.md")
    assert eval_model.__name__ in read("README.md")


def test_the_quick_starts_answers_are_right() -> None:
    command = [sys.executable, "scripts/quickstart.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("granularity", "tokens", "saved"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--families", "smell"], "no question of family smell"),
        (["--image-file", "playground/images/none.png"], "no questions about none.png"),
        (["--image-file", "tests/none.png"], "samples.json is missing"),
    ],
)
def test_the_quick_start_refuses_what_it_has_no_questions_for(options: list[str], sentence: str) -> None:
    command = [sys.executable, "scripts/quickstart.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert run.read_text(encoding="utf-8").splitlines()[-1] == "bash scripts/test.sh"
    assert ["bash", "scripts/test.sh"] in commands("README.md")
