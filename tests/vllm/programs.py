"""Our own programs before a vLLM, each for the length of a `with` block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava.messages import normalise_turns
from llava.openai_chat import chat_messages, data_url, routing_fields
from tests.serve.ports import free_port
from tests.vllm.cases import Case
from tests.vllm.server import NAME, ROOT


@contextlib.contextmanager
def program(module: str, log: Path, *flags: str, until: str = "/ready") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A program of `llava.serve` on a free port, once it answers at `until`.

    Yields:
        Its address and its process, which is killed at the end of the block.
    """
    port = free_port()
    command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", str(port), *flags]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process, log, until)
        yield url, process
    finally:
        process.kill()
        process.wait(30)


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, path: str = "/ready", seconds: float = 300) -> None:
    """Wait until an address answers with 200; the test fails where that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + path, timeout=10).status_code == 200:
                return
        time.sleep(0.3)
    pytest.fail(f"{url} is not ready; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")


def body_of(case: Case, **fields: Any) -> dict[str, Any]:
    """A case as a chat completion to our own services, greedy."""
    messages = chat_messages(normalise_turns(case.turns, len(case.images)), [data_url(image) for image in case.images])
    return {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 24, **routing_fields(case.routing), **fields}


def ask(url: str, case: Case, **fields: Any) -> httpx.Response:
    """What a program answers to a case."""
    return httpx.post(url + "/v1/chat/completions", json=body_of(case, **fields), timeout=120)
