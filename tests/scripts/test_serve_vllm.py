"""scripts/serve_vllm.sh starts servers, says where they are, and leaves none behind; here with stand-ins for vLLM and its router."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.ports import free_port

ROOT = Path(__file__).parents[2]
SERVER = f"""#!{sys.executable}
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

notes, arguments = Path(__file__).parents[1], sys.argv[1:]
with (notes / "started").open("a") as file:
    file.write(" ".join([Path(__file__).name, str(os.getpid()), *arguments]) + "\\n")
if (notes / "fails").exists():
    sys.exit("no such model")
if (notes / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.send_header("Content-Length", "0"), self.end_headers()


HTTPServer((arguments[arguments.index("--host") + 1], int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


class Script:
    """The script while it runs."""

    def __init__(self, environment: Path, *arguments: object) -> None:
        self.environment, self.port = environment, free_port()
        knobs = {"VLLM_ENV": str(environment), "VLLM_DEVICE": "cpu", "END_SECONDS": "1", "TMPDIR": str(environment / "tmp")}
        command = ["bash", ROOT / "scripts" / "serve_vllm.sh", ROOT / "playground" / "avg-llava-micro", "--port", self.port, *arguments]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | knobs
        )

    def until_ready(self) -> str:
        """What it has said when it is ready."""
        assert self.process.stdout is not None
        said = ""
        while "Ctrl-C ends it." not in said:
            line = self.process.stdout.readline()
            assert line, said
            said += line
        return said

    def started(self) -> list[list[str]]:
        return [line.split() for line in (self.environment / "started").read_text().splitlines()]

    def alive(self) -> list[int]:
        """The servers that are left."""
        return [int(pid) for _, pid, *_ in self.started() if Path(f"/proc/{pid}").exists() and "Z" not in _state(int(pid))]

    def end(self) -> tuple[int, str]:
        """Its status, and the rest of what it says."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with a `vllm` and a `vllm-router` that serve their health."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    for name in ("vllm", "vllm-router"):
        file = tmp_path / "bin" / name
        file.write_text(SERVER)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return tmp_path


@pytest.fixture
def run(environment: Path, interrupts: None) -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def start(*arguments: object) -> Script:
        scripts.append(Script(environment, *arguments))
        return scripts[-1]

    yield start
    for script in scripts:
        if script.process.poll() is None:
            script.process.terminate()
            script.process.wait(60)


def test_one_server_is_at_the_address_that_is_said(run: Callable[..., Script]) -> None:
    script = run("--", "--max-model-len", "1024")
    said = script.until_ready()
    assert f"http://127.0.0.1:{script.port}/v1" in said and '"model": "avg-llava-micro"' in said
    assert httpx.get(f"http://127.0.0.1:{script.port}/health", trust_env=False).status_code == 200
    (server,) = script.started()
    assert server[0] == "vllm" and server[2] == "serve" and server[-2:] == ["--max-model-len", "1024"]
    assert {"--trust-request-mm-kwargs", "--enable-prompt-tokens-details"} <= set(server)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_replicas_behind_a_router_all_end_with_the_script(run: Callable[..., Script], environment: Path, number: int, status: int) -> None:
    (environment / "stubborn").touch()  # one that does not end by itself is killed
    script = run("--replicas", 2)
    script.until_ready()
    *replicas, router = script.started()
    replicas.sort(key=lambda words: words[words.index("--port") + 1])
    ports = [str(script.port + 1 + place) for place in range(2)]
    assert [replica[replica.index("--port") + 1] for replica in replicas] == ports
    assert router[0] == "vllm-router" and [f"http://127.0.0.1:{port}" in router for port in ports] == [True, True]
    assert len(script.alive()) == 3
    script.process.send_signal(number)
    assert script.end()[0] == status
    assert script.alive() == [] and list((environment / "tmp").iterdir()) == []


def test_when_one_of_them_ends_the_others_are_ended_and_it_is_named(run: Callable[..., Script]) -> None:
    script = run("--replicas", 2)
    script.until_ready()
    os.kill(int(script.started()[1][1]), signal.SIGKILL)
    status, said = script.end()
    assert status == 1 and "error: replica-" in said and "has ended; the end of its log is above" in said
    assert script.alive() == []


def test_a_server_that_does_not_start_is_said_with_its_own_words(run: Callable[..., Script], environment: Path) -> None:
    (environment / "fails").touch()
    status, said = run().end()
    assert status == 1 and "no such model" in said and "replica-0 has ended" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--replicas", 0), "--replicas is 0, expected 1 or more"),
        (("--replicas",), "--replicas needs a value"),
        (("--many",), "--many is not known here"),
        (("--port", "x"), "--port is x"),
    ],
)
def test_wrong_arguments_start_nothing(run: Callable[..., Script], environment: Path, arguments: tuple[object, ...], said: str) -> None:
    status, text = run(*arguments).end()
    assert status == 1 and said in text and not (environment / "started").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", "scripts/serve_vllm.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
