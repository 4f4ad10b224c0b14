"""Stock clients, as they come in their packages, ask a worker about an image: the answer is right whichever way they write the turn.

Their environment is made by its script (minutes, once); CLIENTS_ENV names another folder for it. Everything stays on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llava.inference import micro_model_path
from tests.serve.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MODEL = "avg-llava-micro"
IMAGE = ROOT / "playground" / "images" / "scene_pink.png"
NUMBER_ON_THE_SIGN = "558"
NO_STRUCTURE = {"llama_index", "openai_js"}
"""Clients whose part of the test asks for no schema."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")]

QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "DO_NOT_TRACK": "1"}
"""What keeps clients from fetching a list or sending a trace."""


@pytest.fixture(scope="module")
def environment() -> Path:
    """Makes or finds the folder of the clients' environment."""
    subprocess.run(["bash", "scripts/setup_clients.sh"], cwd=ROOT, check=True, timeout=1800)
    return Path(os.environ.get("CLIENTS_ENV", ROOT / ".venv-clients"))


@contextlib.contextmanager
def program(command: list[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """A server from when its `url` answers with 200 to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 180
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url, timeout=5).status_code == 200:
                        break
                assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-2000:]
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model-path", micro_model_path()]
    command = [sys.executable, "-m", "llava.serve.model_worker", *flags]
    with program(command, url + "/ready", tmp_path_factory.mktemp("worker") / "log", PYTHONPATH=str(ROOT)):
        yield url


@pytest.fixture(scope="module", params=["vllm-router", "sglang-router"])
def router(request: pytest.FixtureRequest, environment: Path, worker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stock router in front of the worker."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", worker, "--prometheus-port", str(free_port())]
    launch = ["launch"] if request.param == "sglang-router" else []
    command = [str(environment / "bin" / request.param), *launch, *flags, "--policy", "round_robin"]
    with program(command, url + "/health", tmp_path_factory.mktemp("router") / "log"):
        yield url


def ask(environment: Path, client: str, url: str) -> dict[str, str]:
    """What one client was told, by case."""
    arguments = [client, url + "/v1", MODEL, str(IMAGE)]
    if client in ("openai_js", "vercel"):
        if not (environment / "node_modules").exists() or shutil.which("node") is None:
            pytest.skip("needs Node.js and npm")
        command = ["node", str(HERE / "ask.mjs"), *arguments, str(environment)]
    else:
        command = [str(environment / "bin" / "python"), str(HERE / "ask.py"), *arguments]
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(command, env={**settings, **QUIET}, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    said: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return said


def check(said: dict[str, str]) -> None:
    """Every case asks for the number on the sign, but those that ask for a schema."""
    structured = {case: text for case, text in said.items() if case.startswith("structured")}
    assert {case: text for case, text in said.items() if case not in structured} == {
        case: NUMBER_ON_THE_SIGN for case in said if case not in structured
    }
    assert set(structured.values()) <= {"yes", "no"}


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm", "llama_index", "pydantic_ai", "openai_js", "vercel"])
def test_a_client_is_answered_right_whichever_order_it_writes(environment: Path, worker: str, client: str) -> None:
    said = ask(environment, client, worker)
    assert {"words_first", "image_first", "streamed", "history"} <= set(said)
    assert ("structured" in said) is (client not in NO_STRUCTURE)
    check(said)


def test_instructor_gets_what_its_model_declares_and_is_told_that_there_are_no_tools(environment: Path, worker: str) -> None:
    said = ask(environment, "instructor", worker)
    assert said["structured"] in ("yes", "no")
    assert "tools" in said["tools"] and "not supported" in said["tools"]


@pytest.mark.parametrize("client", ["litellm", "openai_js"])
def test_a_client_is_answered_right_through_a_router(environment: Path, router: str, client: str) -> None:
    check(ask(environment, client, router))
