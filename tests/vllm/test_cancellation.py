"""A client that leaves in the middle of an answer frees its sequence: the engine stops computing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.vllm.conftest import TRUSTED
from tests.vllm.server import NAME, VllmServer

pytestmark = pytest.mark.slow
SECONDS = 120.0


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_leaves_frees_its_sequence(serve: Callable[..., VllmServer], llava_folder: Path) -> None:
    server = serve(llava_folder, *TRUSTED)
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    body |= {"max_tokens": 900, "min_tokens": 900, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # kept: a generator that is dropped closes the connection
        next(lines)
        until(lambda: server.metric("vllm:num_requests_running") == 1)
        before = server.metric("vllm:generation_tokens_total")
    until(lambda: server.metric("vllm:num_requests_running") == 0)
    stopped = server.metric("vllm:generation_tokens_total")
    time.sleep(1)
    assert server.metric("vllm:generation_tokens_total") == stopped < before + 800
