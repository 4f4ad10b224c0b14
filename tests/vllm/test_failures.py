"""A replica that dies behind vllm-router under load: nothing is wrong, and everybody hears in time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava.eval.chat_server import RETRIED
from llava.eval.model_vqa import main
from llava.openai_chat import chat_messages, data_url, processor_kwargs
from tests.serve.ports import free_port
from tests.vllm.cases import QUESTIONS, Case, Outcome
from tests.vllm.conftest import TRUSTED
from tests.vllm.server import NAME, VllmServer

pytestmark = pytest.mark.slow
SECONDS = 120.0
"""How long a client may wait for an answer or an error."""
CLIENTS, PAUSE = 8, 0.4
"""Clients, and seconds between two of each one's requests: without a pause they would leave a replica that starts no processor time."""


class Pair:
    """Two replicas and a router before them."""

    def __init__(self, environment: Path, router: str, model: Path, scratch: Path, stack: ExitStack) -> None:
        self._environment, self._model, self._scratch, self._stack = environment, model, scratch, stack
        with ThreadPoolExecutor(2) as pool:
            self.replicas = list(pool.map(self.replica, [free_port(), free_port()]))
        self.port = free_port()
        addresses = [replica.url for replica in self.replicas]
        command = [router, "--host", "127.0.0.1", "--port", str(self.port), "--policy", "power_of_two", "--worker-urls", *addresses]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--health-check-interval-secs", "2", "--health-failure-threshold", "2", "--cb-timeout-duration-secs", "5"]
        with (scratch / "router.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        _until(lambda: httpx.get(f"{self.url}/v1/models", timeout=10, trust_env=False).status_code == 200, 60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replica(self, port: int) -> VllmServer:
        log = self._scratch / f"replica-{port}-{time.monotonic_ns()}.log"
        return self._stack.enter_context(VllmServer(self._environment, self._model, *TRUSTED, log=log, port=port))


def _until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture
def pair(environment: Path, llava_folder: Path, tmp_path: Path) -> Iterator[Pair]:
    router = os.environ.get("VLLM_ROUTER", str(environment / "bin" / "vllm-router"))
    if not Path(router).is_file():
        pytest.skip(f"there is no vllm-router at {router}; scripts/serve_vllm.sh --replicas 2 installs one, or VLLM_ROUTER names one.")
    with ExitStack() as stack:
        yield Pair(environment, router, llava_folder, tmp_path, stack)


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, url: str, cases: list[Case], expected: dict[str, Outcome]) -> None:
        self.url, self.cases, self.expected = url, cases, expected
        self.heard, self.longest = Counter[str](), 0.0
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS + 30)

    def _client(self, number: int) -> None:
        with httpx.Client(timeout=SECONDS, trust_env=False) as client:
            for case in itertools.cycle(self.cases[number::CLIENTS]):
                if self._stop.wait(PAUSE):
                    return
                start = time.monotonic()
                try:
                    heard = self._judge(case, client.post(f"{self.url}/v1/chat/completions", json=body_of(case)))
                except httpx.HTTPError as error:
                    heard = f"broken: {type(error).__name__}"
                with self._lock:
                    self.heard[heard] += 1
                    self.longest = max(self.longest, time.monotonic() - start)

    def _judge(self, case: Case, response: httpx.Response) -> str:
        if response.status_code != 200:
            kind = "error" if response.status_code in RETRIED else "wrong status"
            return f"{kind} {response.status_code}"
        answer = response.json()
        mine = self.expected[case.name]
        same = (answer["choices"][0]["message"]["content"].strip(), answer["usage"]["prompt_tokens"]) == (mine.text, mine.prompt_tokens)
        return "right" if same else "wrong"


def body_of(case: Case) -> dict[str, Any]:
    messages = chat_messages(case.turns, [data_url(image) for image in case.images])
    body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 24}
    return body | {"mm_processor_kwargs": processor_kwargs(case.routing)}


def test_a_replica_is_killed_under_load(pair: Pair, few: list[Case], expected: dict[str, Outcome], tmp_path: Path) -> None:
    """Its requests fail with a status or are answered by the other one; it comes back by being started again, and nothing else is."""
    cases = [case for case in few if case.name.isdigit()]
    load = Load(pair.url, cases, expected)
    try:
        bulk = threading.Thread(target=lambda: codes.append(main(bulk_flags(pair.url, tmp_path / "bulk.jsonl"))))
        codes: list[int] = []
        bulk.start()
        _until(lambda: load.heard["right"] >= 40, 120)
        victim, survivor = pair.replicas
        victim.kill()
        killed = load.heard["right"]
        _until(lambda: load.heard["right"] >= killed + 60, 120)
        assert survivor.is_well()
        again = pair.replica(victim.port)
        _until(lambda: again.metric("vllm:request_success_total") >= 5, 60)
        bulk.join(300)
    finally:
        load.stop()
    print(f"\nheard: {dict(load.heard)}, longest wait {load.longest:.1f} s")
    assert not [heard for heard in load.heard if heard.startswith("wrong")] and load.longest < SECONDS
    assert not [heard for heard in load.heard if heard.startswith("broken")]
    assert codes == [0]
    assert main(bulk_flags(survivor.url, tmp_path / "calm.jsonl")) == 0
    assert texts(tmp_path / "bulk.jsonl") == texts(tmp_path / "calm.jsonl")


def bulk_flags(url: str, answers: Path) -> list[str]:
    given = ["--question-file", QUESTIONS, "--answers-file", answers, "--num-chunks", 20, "--engine", "vllm", "--vllm", url]
    return [str(word) for word in (*given, "--batch-size", 16, "--max-new-tokens", 16)]


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
