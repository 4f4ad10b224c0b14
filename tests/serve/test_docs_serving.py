"""The pages about serving: their commands parse or run, their tables are the code's, and the files of `deploy/` fit them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from llava.inference import MICRO_MODEL
from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.controller import settings_from
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.http.metrics import Metrics
from llava.serve.model_worker import build_parser as worker_parser
from llava.serve.model_worker import check_arguments, load_engine
from llava.serve.protocol import EngineStats, ErrorKind, Limits
from llava.serve.worker_flags import read_limits, read_registration
from tests.serve.running import RunningApp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / name for name in ("Serving.md", "Operating.md", "API.md", "Security.md")]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FOLDERS = ("llava", "scripts", "playground", "docs", "deploy", "tests")
PROGRAMS = ("controller", "model_worker", "sglang_worker", "gradio_web_server", "cli", "__main__")
SECTIONS = {
    "controller": "The controller",
    "model_worker": "The worker",
    "sglang_worker": "The bridge",
    "gradio_web_server": "The page",
    "cli": "The terminal",
    "__main__": "The worker",
}
PUBLISHED = """\
python -m llava.serve.controller --host 0.0.0.0 --port 30000
python -m llava.serve.gradio_web_server --controller http://localhost:30000 --model-list-mode reload
WORKER --model-path zhibinlan/AVG-LLaVA
CUDA_VISIBLE_DEVICES=0,1 WORKER --model-path zhibinlan/AVG-LLaVA
WORKER --model-path zhibinlan/AVG-LLaVA --load-4bit
WORKER --model-path zhibinlan/AVG-LLaVA --load-8bit
WORKER --device mps
""".replace(
    "WORKER",
    "python -m llava.serve.model_worker --host 0.0.0.0 --controller http://localhost:30000 --port 40000 --worker http://localhost:40000",
)
NOBODY = EngineStats(0, 0)


def text() -> str:
    """All four pages; no two of them have a section of the same name."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    """The pages' fenced code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(), flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    _, found = text().split(f"\n## {title}\n")
    return found.split("\n## ")[0]


def table(head: str) -> list[list[str]]:
    """Cells of the table whose first row begins so; a page may hold several."""
    rows: list[list[str]] = []
    for part in text().split(f"\n| {head} |")[1:]:
        lines = part.split("\n\n")[0].splitlines()[2:]
        rows += [cells_of(line) for line in lines]
    return rows


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def words_of(command: str) -> list[str]:
    """A command's words after the variables in front of it."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def programs(lines: str) -> list[list[str]]:
    """The commands among lines that start one of this project's programs."""
    joined = lines.replace("\\\n", " ").splitlines()
    return [words for line in joined if "python -m llava.serve" in line and (words := words_of(line))[:2] == ["python", "-m"]]


@contextlib.contextmanager
def no_exit() -> Iterator[None]:
    """A parser that refuses its arguments fails the test by what it said."""
    try:
        yield
    except SystemExit as error:
        pytest.fail(f"the parser ended with status {error.code}")


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a program, by the name of its module within `llava.serve`."""
    return importlib.import_module(f"llava.serve.{program}").build_parser()


def flags_of(program: str) -> list[str]:
    """What a program's `--help` shows, and the other names of that."""
    actions = [action for action in parser_of(program)._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    return [flag for action in actions for flag in action.option_strings]


def parse(module: str, words: list[str]) -> argparse.Namespace:
    program = "__main__" if module == "llava.serve" else module.removeprefix("llava.serve.")
    with no_exit():
        return parser_of(program).parse_args(words)


STARTED = [pytest.param(words, id=" ".join(words[2:])[:70]) for words in programs("".join(blocks("bash") + blocks("sh")))]
BASH = [block for block in blocks("bash") if "curl" in block]


@pytest.mark.parametrize("words", STARTED)
def test_a_programs_flags_parse(words: list[str]) -> None:
    assert importlib.util.find_spec(words[2]) is not None
    parse(words[2], words[3:])
    named = [word for word in words if word.split("/")[0] in FOLDERS and "/" in word]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split("\n")[0][:60])
def test_a_block_is_one_of_programs_or_of_requests(block: str) -> None:
    assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0
    assert "curl" in block or len(programs(block)) == len(block.strip().splitlines())


@pytest.mark.parametrize("command", PUBLISHED.splitlines())
def test_a_published_command_is_on_the_pages_as_written(command: str) -> None:
    assert re.search(rf"^{re.escape(command)}$", "\n".join(blocks("bash")), flags=re.MULTILINE)


@pytest.mark.parametrize("words", [case for case in STARTED if "model_worker" in case.values[0][2]])
def test_a_workers_command_is_one_that_can_work(words: list[str]) -> None:
    arguments = parse(words[2], words[3:])
    check_arguments(arguments)
    read_limits(arguments)
    arguments.registration_token_file = None  # an operator's own
    registration = read_registration(arguments)
    assert registration is None or registration.worker_url.rsplit(":", 1)[1] == str(arguments.port)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_a_program_is_in_its_section(program: str) -> None:
    shown = section(SECTIONS[program])
    if program in ("sglang_worker", "__main__"):  # those sections say that the worker's flags are theirs too
        shown += section("The worker")
    missing = [flag for flag in flags_of(program) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", shown)]
    assert missing == []


def test_every_flag_in_the_text_is_a_programs() -> None:
    prose = re.sub(r"^```.*?^```", "", text(), flags=re.MULTILINE | re.DOTALL)
    known = {flag for program in PROGRAMS for action in parser_of(program)._actions for flag in action.option_strings}
    others = {"--gpus", "--stop-timeout"}  # docker's
    others |= {"--enable-mm-embeds", "--limit-mm-per-prompt", "--tensor-parallel-size", "--gpu-memory-utilization"}  # vLLM's
    others |= {"--trust-request-mm-kwargs", "--enable-prompt-tokens-details"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - others <= known


@pytest.mark.parametrize("program", ["controller", "model_worker", "sglang_worker", "gradio_web_server"])
def test_defaults_in_the_tables_are_the_parsers(program: str) -> None:
    actions = {flag: action for action in parser_of(program)._actions for flag in action.option_strings}
    shown_flags = section(SECTIONS[program]).split("| flag | default |")[1].split("\n\n")[0]
    rows = [cells_of(line) for line in shown_flags.splitlines() if line.startswith("| `--")]
    assert len(rows) >= 7
    for cells in rows:
        shown = [word.strip(" `") for word in cells[1].split(",")]
        for flag, value in zip(names(cells[0]), shown, strict=False):
            default = actions[flag].default
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert float(value) == default, flag


def test_the_table_of_errors_is_the_protocols() -> None:
    rows = table("`code` | status")
    assert [names(row[0])[0] for row in rows] == [kind.value for kind in ErrorKind]
    for kind, (_, status, code, wait, *_) in zip(ErrorKind, rows, strict=True):
        fault = kind.fault
        assert (int(status), int(code)) == (fault.status, fault.code)
        assert wait == ("" if fault.retry_after is None else f"{fault.retry_after} s")


def test_the_table_of_limits_is_the_protocols() -> None:
    shown = {names(row[0])[0]: row for row in table("limit | default | flag of the worker")}
    assert list(shown) == [field.name for field in dataclasses.fields(Limits)]
    for field in dataclasses.fields(Limits):
        default = shown[field.name][1]
        assert default == {False: "off", (): "none"}.get(field.default) or float(default) == field.default
        assert [flag for flag in names(shown[field.name][2]) if flag not in flags_of("model_worker")] == []


def metric_names(rendered: bytes) -> set[str]:
    """Names as Prometheus knows them, without those that only tell when a count began."""
    families = list(text_string_to_metric_families(rendered.decode()))
    kept = [family for family in families if not family.name.endswith("_created")]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in kept}


def test_the_tables_of_metrics_are_the_services() -> None:
    shown = {name for row in table("name | kind | is") for name in names(row[0])}
    worker = metric_names(Metrics(lambda: NOBODY).render())
    settings = settings_from(parser_of("controller").parse_args([]))
    controller = metric_names(create_controller_app(settings).state.controller.metrics.render())
    assert shown == worker | controller


def test_every_screenshot_is_shown() -> None:
    shown = re.findall(r"\]\(serving/([^)]+)\)", text()) + re.findall(r'<img src="serving/([^"]+)"', text())
    assert set(shown) == {path.name for path in (DOCS / "serving").iterdir()}


@pytest.mark.parametrize("path", sorted((DOCS / "serving").glob("*.png")), ids=lambda path: path.name)
def test_a_screenshot_is_a_small_image(path: Path) -> None:
    assert path.stat().st_size < 350_000
    with Image.open(path) as image:
        assert image.width in (1280, 390)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A worker with the shipped model, as the quick start's."""
    engine: EmbeddedEngine = load_engine(worker_parser().parse_args(["--device", "cpu"]))
    with RunningApp(create_worker_app(engine)) as running:
        yield running.url


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.split("\n")[0][:60])
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_requests_run_as_written(block: str, address: str) -> None:
    script = "set -euo pipefail\n" + block.replace("http://localhost:8000", address)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout and '"error":{' not in done.stdout
    if "the sign show" in block:
        assert "558" in done.stdout


def run_python(source: str, address: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines that a block of the page prints."""
    exec(compile(source.replace("http://localhost:8000", address), "API.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    return capsys.readouterr().out.strip().splitlines()


def test_python_runs_as_written(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    asking, guided = blocks("python")
    first, *policies, streamed = run_python(asking, address, capsys)
    assert first == "558 336 of 336"
    assert [line.split("[")[-1].split("]")[0] for line in policies[:1]] == ["16"]
    assert len(policies) == 4 and streamed == "558 385 tokens"
    [sign] = run_python(guided, address, capsys)
    assert re.fullmatch(r"colour='(red|green|blue)' number=[0-9]{1,3}", sign)


@pytest.mark.parametrize("block", blocks("json"))
def test_json_is_json(block: str) -> None:
    assert json.loads(block)["error"]["code"] in [kind.value for kind in ErrorKind]


def unit_command(path: Path) -> list[str]:
    """The words of a unit's ExecStart, its variables replaced by those of `serve.env`."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", lines, flags=re.MULTILINE)
    assert command
    environment = dict(
        line.split("=", 1) for line in (DEPLOY / "systemd" / "serve.env").read_text().splitlines() if line and not line.startswith("#")
    )
    known = {**environment, "CREDENTIALS_DIRECTORY": "/run/credentials", "STATE_DIRECTORY": "/var/lib/avg-llava-page"}
    written = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: known[found[1] or found[2]], command[1].replace("%i", "40000"))
    return shlex.split(written)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_units_command_and_environment_parse(path: Path) -> None:
    words = unit_command(path)
    assert words[1] == "-m"
    arguments = parse(words[2], words[3:])
    assert arguments.host == "127.0.0.1"
    if words[2].endswith("model_worker"):
        check_arguments(arguments)
        assert read_registration(arguments) is not None and arguments.api_key_file == "/run/credentials/api-keys"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        there = path.read_text(encoding="utf-8").replace("/opt/avg-llava/venv/bin/python", sys.executable)
        (tmp_path / path.name).write_text(there, encoding="utf-8")
    files = [str(tmp_path / path.name) for path in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode and "bus" in done.stderr:
        pytest.skip("systemd-analyze cannot look at units here")
    assert (done.returncode, [line for line in done.stderr.splitlines() if "avg-llava" in line]) == (0, [])


def test_units_give_running_answers_their_time() -> None:
    from llava.serve.http import connections
    from llava.serve.http import server as http_server

    for path in UNITS:
        found = re.search(r"^TimeoutStopSec=(\d+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert found and int(found[1]) > http_server.DRAIN_SECONDS + connections.FLUSH_SECONDS


def test_the_page_knows_the_proxys_name() -> None:
    (name,) = set(re.findall(r"server_name (\S+);", (DEPLOY / "nginx.conf").read_text(encoding="utf-8")))
    words = unit_command(DEPLOY / "systemd" / "avg-llava-page.service")
    assert parse(words[2], words[3:]).allow_host == [name]


def test_the_containers_files_and_command_exist() -> None:
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", lines, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert copied and [path for path in copied if not (ROOT / path).exists()] == []
    entry, command = (json.loads(found) for found in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", lines, flags=re.MULTILINE))
    assert entry == ["python", "-m"]
    arguments = parse(command[0], command[1:])
    assert arguments.host == "0.0.0.0" and f"EXPOSE {arguments.port}" in lines
    assert f"127.0.0.1:{arguments.port}/health" in lines
    assert str(MICRO_MODEL.relative_to(ROOT)) in copied


def test_containers_on_the_pages_run_programs_whose_flags_parse() -> None:
    shown = [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.startswith("podman run")]
    found = [words[words.index("avg-llava") + 1 :] for words in shown]
    assert len(found) == 3 and found[0] == []
    for words in found[1:]:
        parse(words[0], words[1:])


def test_the_proxy_leaves_registration_and_metrics_inside() -> None:
    lines = re.sub(r"#.*", "", (DEPLOY / "nginx.conf").read_text(encoding="utf-8"))
    assert re.findall(r"location\s+(?:= )?(\S+) \{", lines) == ["/v1/", "/health", "/"]
    page = re.search(r"location / \{\s*proxy_pass http://(\w+);", lines)
    assert page and page[1] == "avg_llava_page"
    assert "proxy_buffering off;" in lines and "proxy_set_header X-Forwarded-For" in lines
    wait = re.search(r"proxy_read_timeout (\d+)s;", lines)
    assert wait and int(wait[1]) > parser_of("controller").parse_args([]).worker_timeout
    body = re.search(r"client_max_body_size (\d+)m;", lines)
    assert body and int(body[1]) << 20 >= Limits().max_body_bytes


@pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl for a certificate")
def test_nginx_takes_the_file(tmp_path: Path) -> None:
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(new, cwd=tmp_path, check=True, capture_output=True)
    site = re.sub(r"/etc/letsencrypt/\S+/fullchain.pem", str(tmp_path / "cert.pem"), (DEPLOY / "nginx.conf").read_text(encoding="utf-8"))
    site = re.sub(r"/etc/letsencrypt/\S+/privkey.pem", str(tmp_path / "key.pem"), site)
    site = site.replace("[::]:80", "127.0.0.1:8081").replace("[::]:443", "127.0.0.1:8444")
    site = re.sub(r"listen 80;", "listen 127.0.0.1:8080;", re.sub(r"listen 443 ssl;", "listen 127.0.0.1:8443 ssl;", site))
    (tmp_path / "site.conf").write_text(site, encoding="utf-8")
    main = f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{ access_log off; include {tmp_path}/site.conf; }}\n"
    (tmp_path / "nginx.conf").write_text(main, encoding="utf-8")
    (tmp_path / "logs").mkdir()
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}, timeout=300)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr
