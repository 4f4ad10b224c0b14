"""The programs: what answering `--help` loads, each flag shown once, and one front that needs no torch."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llava.__main__ import COMMANDS
from llava.__main__ import main as door
from llava.flags import Parser, add_ignored, add_log_level, start_logging

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FRONT = ("llava.serve.controller", "llava.serve.gradio_web_server", "llava.serve.sglang_worker", "llava.serve.openai_worker")
"""Programs that have no model in their process."""
PROGRAMS = (
    *("llava.serve", *FRONT, "llava.serve.model_worker", "llava.serve.cli"),
    *("llava.eval.run_llava", "llava.eval.model_vqa", "llava.eval.granularity_report"),
    *("llava.convert", "llava.tools.memory"),
    *("llava.train.train", "llava.train.check", "llava.train.estimate", "llava.train.score_granularities"),
    *("llava/train/train_mem.py", "scripts/convert_llava_next.py", "scripts/merge_lora_weights.py"),
    "scripts/quickstart.py",
)
ONE_FLAG = ("llava.tools.memory",)
"""Programs with too few flags to say which are used most."""
HEAVY = {"torch", "torchvision"}

_HELP = """
import json, runpy, sys
program = sys.argv.pop(1)
try:
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
except SystemExit as end:
    print(json.dumps({"status": end.code, "modules": sorted(sys.modules)}))
"""

_FRONT = """
import importlib, json, pkgutil, sys
modules = [f"llava.serve.{room}" for room in ("http", "api", "cluster", "backend", "page")]
for room in list(modules):
    modules += [f"{room}.{module.name}" for module in pkgutil.iter_modules(importlib.import_module(room).__path__)]
for module in modules + sys.argv[1:]:
    importlib.import_module(module)

from llava.serve import controller, gradio_web_server, sglang_worker
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.page.app import create_page_app

create_controller_app(controller.settings_from(controller.build_parser().parse_args([])))
create_page_app(gradio_web_server.read_options(gradio_web_server.build_parser().parse_args(["--no-log"])))
sglang_worker.build_app(sglang_worker.build_parser().parse_args(["--backend", "http://127.0.0.1:9", "--model", "x", "--port", "0"]))
print(json.dumps(sorted(sys.modules)))
"""


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_each_flag_once_and_loads_neither_torch_nor_a_server(program: str) -> None:
    *shown, told = run(_HELP, program, "--help").splitlines()
    ended = json.loads(told)
    assert ended["status"] == 0
    heavy = HEAVY if "train" in program else HEAVY | {"transformers"}
    assert set(ended["modules"]) & (heavy | {"fastapi", "gradio"}) == set()
    assert shown[0].startswith(f"usage: {'python ' if program.endswith('.py') else 'python -m '}{program}")
    flags = [found[1] for line in shown if (found := re.match(r"  (--[\w-]+)", line))]
    assert len({flag.replace("_", "-") for flag in flags}) == len(flags)
    if program in ONE_FLAG:
        assert len(flags) == 1 and "used most:" not in shown
        return
    assert len(flags) > 2
    first = shown[shown.index("used most:") + 1 :]
    assert 3 <= sum(line.startswith("  --") for line in first[: first.index("")]) <= 10


def test_the_front_needs_no_torch() -> None:
    """Every module of the rooms between clients and engines, and the app of each program."""
    assert set(json.loads(run(_FRONT, *FRONT))) & (HEAVY | {"transformers"}) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_its_program(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        door([command, "--help"])
    assert ended.value.code == 0
    assert re.match(rf"usage: avg-llava {command} .*\[flags\]", capsys.readouterr().out)
    module = COMMANDS[command][0].removesuffix(".__main__")
    assert module in PROGRAMS or f"scripts/{module.rpartition('.')[2]}.py" in PROGRAMS


def test_the_door_lists_its_commands_and_takes_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status in ((["--help"], 0), (["--version"], 0), (["nothing"], 2), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            door(words)
        assert ended.value.code == status
    told = capsys.readouterr()
    assert all(f"\n  {command} " in told.out for command in COMMANDS) and "invalid choice: 'nothing'" in told.err


def test_the_status_of_a_command_is_its_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["controller", "--port", "70000"]) == 1
    assert "error: --port is 70000" in capsys.readouterr().err


def test_the_console_command_is_the_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    point = EntryPoint("avg-llava", project["scripts"]["avg-llava"], "console_scripts")
    assert point.load() is door


def parser() -> Parser:
    made = Parser("program", "Does it.", first=("--port",))
    made.add_argument("--model-path", "--old-name")
    made.add_argument("--port", type=int, default=7)
    return made


@pytest.mark.parametrize("words", ["--model-path a_b", "--model_path a_b", "--model_path=a_b", "--old_name a_b", "--model_p a_b"])
def test_flags_are_read_with_dashes_and_underscores(words: str) -> None:
    assert parser().parse_args(words.split()).model_path == "a_b"


def test_a_flag_that_is_none_is_named_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--no_such=x"])
    assert "unrecognized arguments: --no_such=x" in capsys.readouterr().err


def test_flags_that_change_nothing_are_warned_of_and_not_shown(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parser()
    add_log_level(made, default="warning")
    add_ignored(made, {"--multi-modal": "the config decides", "--other": "of that"})
    assert "--multi-modal" not in made.format_help() and "--old-name" not in made.format_help()
    monkeypatch.setattr(logging.getLogger("llava"), "handlers", [caplog.handler])
    start_logging(made.parse_args(["--multi-modal"]), logging.getLogger("llava.test"))
    start_logging(made.parse_args([]), logging.getLogger("llava.test"))
    assert caplog.messages == ["--multi-modal changes nothing: the config decides"]


def test_trainings_help_names_flags_of_transformers_and_takes_none_of_them_for_ours() -> None:
    from llava.train.arguments import whole_parser
    from llava.train.train import EPILOG, build_parser

    own, whole = (set(made._option_string_actions) for made in (build_parser(), whole_parser()))
    assert own - {"--help_all"} <= whole
    assert set(re.findall(r"--\w+", EPILOG)) <= whole - own
    assert [(theirs, ours) for theirs in whole - own for ours in own if ours.startswith(theirs)] == []
