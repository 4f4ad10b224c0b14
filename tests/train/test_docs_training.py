"""The pages about training: their commands run or name only what exists, and the table of flags is the program's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import runpy
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.run import parse_arguments
from tests.stage_runs import ROOT, SCRIPTS

PAGES = ("Training.md", "Finetune_Custom_Data.md")
TABLE = re.compile(r"(<!-- flags: begin[^\n]*-->\n).*?(<!-- flags: end -->)", re.DOTALL)
RUNNABLE = "runs/mine"
"""Blocks about this folder are run; what they write goes to a temporary folder instead."""


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The page's bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def own_flags() -> list[dataclasses.Field[object]]:
    """The flags that transformers does not have, or whose default is another, in the order of --help."""
    stock = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    fields = [field for kind in (ModelArguments, DataArguments, TrainingArguments) for field in dataclasses.fields(kind)]
    return [field for field in fields if field.name not in stock or field.default != stock[field.name]]


def flag_table() -> str:
    """The table of flags as Markdown."""
    lines = ["| flag | default | |", "| --- | --- | --- |"]
    for field in own_flags():
        if field.default is dataclasses.MISSING:
            default = "required"
        else:
            default = "" if field.default in (None, "") else f"`{field.default}`"
        lines.append(f"| `--{field.name}` | {default} | {field.metadata['help'].rstrip('.')} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Put the table into docs/Training.md."""
    page = ROOT / "docs" / "Training.md"
    page.write_text(TABLE.sub(lambda found: found[1] + flag_table() + found[2], page.read_text(encoding="utf-8")), encoding="utf-8")


def test_the_table_of_flags_is_the_programs() -> None:
    found = TABLE.search(read("Training.md"))
    assert found and flag_table() in found[0], "run python tests/train/test_docs_training.py to rewrite the table"


def commands(block: str) -> list[tuple[dict[str, str], list[str]]]:
    """The simple commands of a block: variables in front, and words. Here-documents and their contents are left out."""
    text = re.sub(r"<<'END'\n.*?^END\n", "\n", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    found = []
    exported: dict[str, str] = {}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            exported |= dict(word.split("=", 1) for word in words[1:])
            continue
        variables = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            found.append(({**exported, **variables}, words))
    return found


ALL = [(page, number, pair) for page in PAGES for number, block in enumerate(blocks(page)) for pair in commands(block)]
SCRIPT_RUNS = [(page, variables, words) for page, _, (variables, words) in ALL if words[0] == "bash"]


@pytest.mark.parametrize(("page", "number", "command"), ALL, ids=lambda value: str(value)[:40])
def test_a_command_names_what_exists(page: str, number: int, command: tuple[dict[str, str], list[str]]) -> None:
    _, words = command
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
        shown = help_text(words[2])
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("mkdir", "cat")


@functools.cache
def help_text(module: str) -> str:
    """What a program answers to --help."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize(("page", "variables", "words"), SCRIPT_RUNS, ids=lambda value: str(value)[-60:])
def test_a_scripts_variables_and_flags_exist(page: str, variables: dict[str, str], words: list[str], tmp_path: Path) -> None:
    """Each variable is in the header of the script or of lib.sh; with its paths made, the script hands over flags that parse."""
    headers = (ROOT / words[1]).read_text() + (ROOT / "scripts" / "avg_llava" / "lib.sh").read_text().split("source ")[0]
    assert [name for name in variables if not re.search(rf"\b{name}\b", headers)] == []
    recorder = tmp_path / "python"
    recorder.write_text(
        "#!/usr/bin/env bash\n"
        "if [[ $1 == -c && $2 == *deepspeed* ]]; then exit 0; fi\n"
        f'if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi\n'
        f"printf '%s\\n' \"$@\" >{tmp_path}/call\n"
        'for word in "$@"; do [[ ${previous:-} != --output_file ]] || touch "$word"; previous=$word; done\n'
    )
    recorder.chmod(recorder.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nwhile [[ $1 != bash ]]; do shift; done\nSLURM_NODEID=0 MASTER_ADDR=a exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    given = {"DATA_PATH": "data/rows.json", "NPROC": "8", **variables}
    if given.get("LAUNCHER") == "python":
        del given["NPROC"]
    for name in ("DATA_PATH", "SCORES", "HOSTFILE"):
        if name in given:
            touch(tmp_path / given[name])
    folders = [given.get("MODEL", ""), given.get("IMAGE_FOLDER", "data")]
    for folder in [*folders, "checkpoints/stage1-align", "checkpoints/stage2-instruct", "checkpoints/stage3-multi-granularity"]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["bash", str(ROOT / words[1]), *words[2:]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(recorder), **given},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "call").read_text().splitlines()
    flags = call[call.index(str(ROOT / "llava" / "train" / "train_mem.py")) + 1 :]
    skipped = {"--bf16": "--use_cpu", "--tf32": "--use_cpu"}  # this machine may have no GPU
    cpu = [word for index, word in enumerate(flags) if word not in skipped and (index == 0 or flags[index - 1] not in skipped)]
    without_zero = cpu if "--deepspeed" not in cpu else cpu[: cpu.index("--deepspeed")] + cpu[cpu.index("--deepspeed") + 2 :]
    _, _, training_args = parse_arguments([*without_zero, "--use_cpu", "True"])
    assert SCRIPTS[str(training_args.stage)] == Path(words[1]).name


def touch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


@pytest.mark.slow
def test_the_rehearsal_runs_as_written(tmp_path: Path) -> None:
    """The blocks about one's own rows, one after the other, with their folder moved away and the active interpreter."""
    text = "".join(block for block in blocks("Finetune_Custom_Data.md") if RUNNABLE in block)
    moved = text.replace(RUNNABLE, str(tmp_path / "mine"))
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = "set -euo pipefail\n" + moved
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "mine" / "stage4" / "config.json").is_file()
    assert (tmp_path / "mine" / "stage4-scores.parquet").is_file()
    assert done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    text = read(page)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:llava|scripts|playground|docs)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    write_table()
