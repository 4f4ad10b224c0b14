"""The child server: started again when it ends, given up when it never works, and gone when we are gone, however that comes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.serve.split import child as child_module
from llava.serve.split.child import FAILED_STARTS, ChildServer, ServerCommand, vllm_python
from tests.serve.running import wait_until

SERVER = """
import os, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(os.getpid(), helper.pid, flush=True)
time.sleep(100)
"""
"""A server with a process of its own, as vLLM's engine is."""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "FIRST_PAUSE", 0.001)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def pids_of(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdecimal()]


def test_what_it_says_is_logged_and_what_it_started_ends_with_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, child_module.logger.name)
    server = ChildServer([sys.executable, "-c", SERVER], dict(os.environ))

    def said() -> list[int]:
        return [pid for record in caplog.records if record.message.startswith("vllm | ") for pid in pids_of(record.message)]

    async def run() -> None:
        keeping = asyncio.create_task(server.run())
        while not said():
            await asyncio.sleep(0.01)
        assert len(said()) == 2 and all(map(is_alive, said()))
        keeping.cancel()
        await asyncio.wait([keeping])

    asyncio.run(asyncio.wait_for(run(), 30))
    wait_until(lambda: not any(map(is_alive, said())))


def test_one_that_never_works_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[None] = []
    server = ChildServer([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), lambda: ended.append(None))
    asyncio.run(asyncio.wait_for(server.run(), 60))
    assert server.gave_up and len(ended) == FAILED_STARTS
    assert caplog.text.count("the vLLM ended with status 3") == FAILED_STARTS and "it is given up" in caplog.text


def test_one_that_worked_is_started_again_without_end() -> None:
    server = ChildServer([sys.executable, "-c", ""], dict(os.environ))
    ended = 0

    def count() -> None:
        nonlocal ended
        ended += 1
        server.was_ready()

    server.on_end = count

    async def run() -> None:
        keeping = asyncio.create_task(server.run())
        while ended <= FAILED_STARTS:
            await asyncio.sleep(0.01)
        keeping.cancel()
        await asyncio.wait([keeping])

    asyncio.run(asyncio.wait_for(run(), 60))
    assert not server.gave_up


def test_nothing_outlives_a_worker_that_is_killed() -> None:
    parent = f"""
import asyncio, logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from llava.serve.split.child import ChildServer
asyncio.run(ChildServer([sys.executable, "-c", {SERVER!r}], dict(os.environ)).run())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("vllm | "))
        assert len(pids_of(line)) == 2 and all(map(is_alive, pids_of(line)))
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids_of(line))))


def test_the_leash_makes_a_stubborn_server_end() -> None:
    code = f"""
import sys
from llava.serve.split import leash
leash.GRACE_SECONDS = 0.2
sys.exit(leash.main([sys.executable, "-c", {STUBBORN!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        pids = pids_of(process.stdout.readline())
        process.stdin.close()
        process.wait(20)
    wait_until(lambda: not any(map(is_alive, pids)))


def test_the_command_is_private_and_its_key_is_no_argument() -> None:
    command = ServerCommand("python", "model", "name", "bfloat16", 4096, 64, "--tensor-parallel-size 2 --dtype float32")
    arguments = command.arguments
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1" and "--enable-mm-embeds" in arguments
    assert arguments[arguments.index("--limit-mm-per-prompt") + 1] == '{"image": 0}'
    assert arguments[-4:] == ["--tensor-parallel-size", "2", "--dtype", "float32"]
    assert command.api_key not in " ".join(arguments) and command.environment["VLLM_API_KEY"] == command.api_key
    assert command.api_key not in repr(command) and command.url == f"http://127.0.0.1:{command.port}"


def test_where_there_is_no_vllm_the_way_to_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENV", str(tmp_path))
    with pytest.raises(ValueError, match=r"run scripts/setup_vllm.sh, name one with --vllm-python"):
        vllm_python(None)
    assert vllm_python(sys.executable) == sys.executable
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert vllm_python(None) == str(tmp_path / "bin" / "python")
