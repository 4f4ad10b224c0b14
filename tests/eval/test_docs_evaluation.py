"""The page about evaluation: its commands run or name only what exists, and its table of benchmarks is the scripts'."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.eval import granularity_report
from llava.eval.report import tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "Evaluation.md"
TABLE = re.compile(r"(<!-- benchmarks: begin[^\n]*-->\n).*?(<!-- benchmarks: end -->)", re.DOTALL)
REPORTS = ("playground", "easy_vqa")
REPORT = r"(<!-- report on {name}: begin[^\n]*-->\n).*?(<!-- report on {name}: end -->)"
SCRIPTS = ("gqa", "scienceqa_img", "vizwiz", "textvqa", "chartqa", "docvqa", "ai2d", "mme", "mmbench", "pope", "mmmu")
LAUNCHERS = ("torchrun",)
FOLDERS = ("llava", "scripts", "playground", "docs", "lmms-eval", "tests")


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def blocks() -> list[str]:
    """The page's bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", text(), flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[dict[str, str], list[str]]]:
    """A block's simple commands, without those of a loop: variables in front, and words."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or line.startswith(" ") or words[0] in ("for", "done"):
            continue
        variables = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        found.append((variables, words))
    return found


ALL = [pytest.param(*command, id=" ".join(command[1])[:60]) for block in blocks() for command in commands(block)]


def benchmark_table() -> str:
    """The table of benchmarks as Markdown, from the scripts."""
    lines = ["| script | stock task | split | dataset | revision | score |", "| --- | --- | --- | --- | --- | --- |"]
    for name in SCRIPTS:
        script = (ROOT / "scripts" / "eval" / f"{name}.sh").read_text(encoding="utf-8")
        task, split, dataset, revision, metric = (
            re.search(rf"^{field}=(\S+)$", script, flags=re.MULTILINE)[1]  # type: ignore[index]
            for field in ("task", "split", "dataset", "revision", "metric")
        )
        lines.append(f"| `{name}.sh` | `{task}` | {split} | `{dataset}` | `{revision}` | `{metric}` |")
    return "\n".join(lines) + "\n"


def read_report(name: str) -> dict[str, Any]:
    """A report.json of the micro model, as the command wrote it but for white space."""
    return json.loads((ROOT / "docs" / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))


def write_tables() -> None:
    """Put the table of benchmarks and those of the reports into the page."""
    page = TABLE.sub(lambda found: found[1] + benchmark_table() + found[2], text())
    for name in REPORTS:
        table = tables.markdown(read_report(name))
        page = re.sub(REPORT.format(name=name), lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


def test_the_table_of_benchmarks_is_the_scripts() -> None:
    found = TABLE.search(text())
    assert found and benchmark_table() in found[0], "run python tests/eval/test_docs_evaluation.py to write the table anew"


@pytest.mark.parametrize("name", REPORTS)
def test_the_tables_of_a_report_are_those_of_its_json(name: str) -> None:
    found = re.search(REPORT.format(name=name), text(), flags=re.DOTALL)
    report = read_report(name)
    assert found and tables.markdown(report) in found[0], "run python tests/eval/test_docs_evaluation.py to write the tables anew"
    assert report["task"] == name and report["answered"] == report["asked"] and not report["crashes"] and not report["left_out"]


@pytest.mark.parametrize("name", REPORTS)
def test_the_command_above_a_report_is_the_one_that_made_it(name: str) -> None:
    (command,) = [given for block in blocks() for _, given in commands(block) if f"runs/report-{name}" in given]
    args = granularity_report.build_parser().parse_args(command[3:])
    report = read_report(name)
    budgets = [row["name"] for row in report["rows"] if row["kind"] == "budget"]
    assert budgets == [f"adaptive, at most {budget}" for budget in args.budgets or []]
    assert (args.task, args.threads, args.timing_samples) == (name, report["threads"], len(report["timing"]["questions"]))
    assert args.limit is None and report["granularities"] == [4, 8, 16, 32, 64]
    assert (args.timing_repeats, args.max_new_tokens, args.seed) == (report["timing"]["repeats"], report["max_new_tokens"], report["seed"])


@functools.cache
def help_text(module: str) -> str:
    """What a program answers to --help."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize(("variables", "words"), ALL)
def test_a_command_names_what_exists(variables: dict[str, str], words: list[str]) -> None:
    named = [word for word in words if word.split("/")[0] in FOLDERS and "/" in word] + [variables.get("MODEL_PATH", "playground")]
    assert [path for path in named if path.split("/")[0] in FOLDERS and not (ROOT / path).exists()] == []
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        headers = "".join((ROOT / "scripts" / "eval" / name).read_text() for name in ("lib.sh", "lmms_eval.sh"))
        assert [name for name in variables if not re.search(rf"^# .*\b{name}\b", headers, flags=re.MULTILINE)] == []
        return
    assert words[0] in ("python", *LAUNCHERS)
    module = words[words.index("-m") + 1]
    assert importlib.util.find_spec(module) is not None
    shown = help_text(module)
    for flag in (word.partition("=")[0] for word in words[words.index(module) :] if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag


@pytest.mark.parametrize("block", [block for block in blocks() if re.search(r"scripts/eval/(?!lmms|setup)", block)])
def test_benchmark_commands_run_as_written_but_dry(block: str) -> None:
    """Loops included; nothing is installed, fetched or asked."""
    script = "set -euo pipefail\nexport DRY_RUN=1\n" + re.sub(r"^bash scripts/eval/setup.*\n", "", block, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = len(re.findall("^run: ", done.stdout, flags=re.MULTILINE))
    assert runs == (66 if "for " in block else len(commands(block)) - block.count("setup_lmms"))


@pytest.mark.slow
def test_commands_about_questions_run_as_written(tmp_path: Path) -> None:
    """With the folder of results moved away, and the interpreter of this test."""
    (tmp_path / "torchrun").write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    script = "set -euo pipefail\n" + "".join(block for block in blocks() if "model_vqa" in block).replace("runs/", f"{tmp_path}/runs/")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = ((tmp_path / "runs" / "vqa" / f"{name}.jsonl").read_text().splitlines() for name in ("answers", "shared"))
    assert len(alone) == len(shared) == 200


def test_links_and_paths_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text()):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*\w)`", text()):
        assert (ROOT / path).exists(), path


def test_flags_and_modules_in_the_text_exist() -> None:
    prose = re.sub(r"^```.*?^```", "", text(), flags=re.MULTILINE | re.DOTALL)
    for module in re.findall(r"`python -m ([\w.]+)", prose):
        assert importlib.util.find_spec(module) is not None, module
    harness = {"--use_cache", "--offset", "--limit", "--include_path", "--multi_gpu", "--num_processes"}  # and accelerate's
    servers = {"--enable-prompt-tokens-details"}  # vLLM's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - harness - servers:
        shown = help_text("llava.eval.model_vqa") + help_text("llava.eval.granularity_report")
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag


def test_variables_in_the_text_are_the_scripts() -> None:
    table = text().split("| variable | is |")[1].split("\n\n")[0]
    header = (ROOT / "scripts" / "eval" / "lib.sh").read_text(encoding="utf-8").split("source ")[0]
    names = re.findall(r"`([A-Z_]+)(?:=1)?`", table)
    assert len(names) == 12 and [name for name in names if name not in header] == []


def test_arguments_of_the_model_are_the_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "lmms-eval"))
    from avg_llava_lmms_eval.arguments import NAMES

    table = text().split("| argument | is |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z_]{5,})`", table)) <= set(NAMES)


def test_the_micro_models_report_has_its_place() -> None:
    assert "\n## The micro model on the local tasks\n" in text()


if __name__ == "__main__":
    write_tables()
