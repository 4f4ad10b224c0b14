"""The front page tells the truth: its files exist, its commands' flags exist, its Python runs, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.run_llava import build_parser, eval_model
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


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page: str) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", read(page))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = read(page)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("words", CLI_COMMANDS, ids=lambda words: " ".join(words[3:])[:50])
def test_the_command_lines_flags_parse(words: list[str]) -> None:
    arguments = build_parser().parse_args(words[3:])
    assert arguments.query
    assert (ROOT / arguments.image_file).is_file()


def test_the_table_of_wishes_parses_both_ways() -> None:
    rows = re.findall(r"^\| `(\w+=[^`]*)` \| `(--[^`]*)` \|", read("README.md"), flags=re.MULTILINE)
    assert len(rows) == 5
    for keyword, flags in rows:
        wish = eval(f"RoutingRequest({keyword})", {"RoutingRequest": RoutingRequest})
        parsed = build_parser().parse_args(["--query", "?", *shlex.split(flags)])
        assert wish == RoutingRequest(parsed.vis_token_granularity, parsed.max_visual_tokens, parsed.granularity_bias)


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
