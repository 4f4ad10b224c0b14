"""Our worker as encoder and router before a real vLLM: what it says is what `llava.inference.Assistant` says, token by token.

The split engine itself answers the cases, so that token ids and prompt lengths are compared too; the worker over it is run as a program,
which starts, watches and ends its vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llava.inference import Assistant
from llava.model.image_embeds import image_embeds_part
from llava.serve.backend.openai_server import Backend
from llava.serve.http.client import Timeouts
from llava.serve.protocol import Event, Finished, GenerationRequest, Guide, GuideKind, Piece, Sampling
from llava.serve.split import engine as split_engine
from llava.serve.split.engine import SplitEngine
from llava.text_stream import TextStream
from tests.vllm.cases import Case, Outcome
from tests.vllm.conftest import EMBEDDING_ONLY
from tests.vllm.programs import ask, program, wait_ready
from tests.vllm.server import NAME, VllmServer

pytestmark = pytest.mark.slow
Serve = Callable[..., VllmServer]
TIMEOUTS = Timeouts(connect=10.0, headers=300.0, read=300.0, total=600.0)
STREAMS: ContextVar[list[TextStream]] = ContextVar("STREAMS")
"""The text of the answer that the current task asks for: an engine's events carry no token ids."""


class WatchedTextStream(TextStream):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        STREAMS.get([]).append(self)


@pytest.fixture(scope="module")
def front(llava_folder: Path) -> Assistant:
    return Assistant.load(str(llava_folder), device="cpu", front_only=True)


@pytest.fixture(autouse=True)
def _watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_engine, "TextStream", WatchedTextStream)


def with_engine(front: Assistant, url: str, work: Callable[[SplitEngine], Awaitable[Any]], clients: int = 16, **options: Any) -> Any:
    """Run `work(engine)` with an engine that has looked at its server."""

    async def run() -> Any:
        engine = SplitEngine(front, "micro", Backend(url, "", timeouts=TIMEOUTS, concurrency=clients, max_queue=10_000), **options)
        try:
            assert await engine.look()
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def request_of(engine: SplitEngine, case: Case, **fields: Any) -> GenerationRequest:
    fields.setdefault("sampling", Sampling(max_new_tokens=24))
    return GenerationRequest(case.name, case.turns, None, tuple(map(engine.prepare_image, case.images)), routing=case.routing, **fields)


async def events_of(engine: SplitEngine, request: GenerationRequest) -> list[Event]:
    return [event async for event in engine.submit(request)]


async def outcome_of(engine: SplitEngine, case: Case) -> Outcome:
    STREAMS.set([])  # a task's own
    *events, end = await events_of(engine, request_of(engine, case))
    assert isinstance(end, Finished)
    [stream] = STREAMS.get()
    return Outcome("".join(event.text for event in events if isinstance(event, Piece)), tuple(stream.ids), end.prompt_tokens)


def differences(front: Assistant, url: str, cases: Sequence[Case], expected: dict[str, Outcome], **options: Any) -> list[str]:
    """The cases, shuffled, whose outcome is not the expected one."""
    shuffled = list(cases)
    random.Random(0).shuffle(shuffled)

    async def work(engine: SplitEngine) -> list[Outcome]:
        return await asyncio.gather(*(asyncio.create_task(outcome_of(engine, case)) for case in shuffled))

    pairs = [(case, found, expected[case.name]) for case, found in zip(shuffled, with_engine(front, url, work, **options), strict=True)]
    return [f"{case.name} ({case.routing}): {found}, expected {wanted}" for case, found, wanted in pairs if found != wanted]


def test_all_questions_and_policies(
    serve: Serve, front: Assistant, llava_folder: Path, cases: list[Case], few: list[Case], expected: dict[str, Outcome]
) -> None:
    server = serve(llava_folder, *EMBEDDING_ONLY)
    assert differences(front, server.url, cases, expected) == []
    assert differences(front, server.url, few, expected, clients=1) == []
    assert differences(front, server.url, few, expected, clients=64, cache_bytes=0) == []


def test_a_cancelled_answer_frees_its_sequence(serve: Serve, front: Assistant, llava_folder: Path, few: list[Case]) -> None:
    server = serve(llava_folder, *EMBEDDING_ONLY)
    sampling = Sampling(max_new_tokens=700, min_new_tokens=700, ignore_eos=True)

    async def work(engine: SplitEngine) -> None:
        running = [engine.submit(request_of(engine, case, sampling=sampling)) for case in few[:4]]
        for generation in running:
            async for event in generation:
                if isinstance(event, Piece):
                    break
        assert server.metric("vllm:num_requests_running") > 0
        for generation in running:
            generation.cancel()
        for _ in range(100):
            if server.metric("vllm:num_requests_running") == server.metric("vllm:kv_cache_usage_perc") == 0:
                return
            await asyncio.sleep(0.1)
        pytest.fail("the sequences of cancelled answers still run")

    with_engine(front, server.url, work)


def test_sampling_and_structure(
    serve: Serve, front: Assistant, llava_folder: Path, cases: list[Case], expected: dict[str, Outcome]
) -> None:
    server, case = serve(llava_folder, *EMBEDDING_ONLY), cases[0]
    whole = expected[case.name].text

    async def said(engine: SplitEngine, **sampling: Any) -> tuple[str, list[Any], Finished]:
        *events, end = await events_of(engine, request_of(engine, case, sampling=Sampling(**{"max_new_tokens": 24, **sampling})))
        assert isinstance(end, Finished)
        pieces = [event for event in events if isinstance(event, Piece)]
        return "".join(piece.text for piece in pieces), [score for piece in pieces for score in piece.scores], end

    async def work(engine: SplitEngine) -> None:
        text, _, end = await said(engine, stop=(whole[1:],))
        assert (text, end.finish_reason) == (whole[:1], "stop")
        text, _, end = await said(engine, max_new_tokens=1)
        assert end.finish_reason == "length" and end.completion_tokens == 1
        text, scores, _ = await said(engine, logprobs=2)
        assert text == whole and "".join(score.text for score in scores).strip() == whole
        assert all(len(score.alternatives) == 2 and score.log_probability <= 0 for score in scores)
        drawn = [await said(engine, temperature=2.0, seed=seed, min_new_tokens=12) for seed in (1, 1, 2)]
        assert drawn[0][0] == drawn[1][0] != drawn[2][0]
        chosen, _, _ = await said(engine, guide=Guide(GuideKind.CHOICE, '["yes", "no"]', "structured_outputs"))
        assert chosen in ("yes", "no")

    with_engine(front, server.url, work)


@pytest.mark.parametrize("fault", ["width", "none finite", "no tensor"])
def test_rows_that_get_past_us_are_refused_and_the_server_lives_on(
    fault: str, serve: Serve, front: Assistant, llava_folder: Path, few: list[Case], expected: dict[str, Outcome]
) -> None:
    server, width = serve(llava_folder, *EMBEDDING_ONLY), front.model.config.hidden_size
    rows = {"width": torch.zeros(24, width + 1), "none finite": torch.full((24, width), torch.nan), "no tensor": torch.zeros(())}[fault]
    part = image_embeds_part(rows)
    if fault == "no tensor":
        part["image_embeds"] = "bm90IGEgdGVuc29y"
    assert server.chat([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]).status_code == 400
    assert server.is_well() and differences(front, server.url, few[:5], expected) == []


# ---- the worker as a program


@contextlib.contextmanager
def worker(environment: Path, model: Path, log: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A worker with a vLLM of its own, once it is ready."""
    own = ("--engine", "vllm", "--vllm-python", str(environment / "bin" / "python"), "--vllm-args=--enforce-eager")
    with program("model_worker", log, *own, "--model-path", str(model), "--model-name", NAME, *flags) as started:
        yield started


def processes_of(parent: int) -> list[int]:
    """All processes below one."""
    children = [int(child) for task in Path(f"/proc/{parent}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid for child in children for pid in (child, *processes_of(child))]


def test_a_worker_starts_a_vllm_and_ends_it(
    environment: Path, llava_folder: Path, scratch: Path, cases: list[Case], expected: dict[str, Outcome]
) -> None:
    log = scratch / "worker.log"
    questions = [case for case in cases if case.name.isdigit()][::50]
    with worker(environment, llava_folder, log) as (url, process):
        for case in questions:
            answer = ask(url, case).json()
            wanted = expected[case.name]
            assert answer["choices"][0]["message"]["content"] == wanted.text and answer["usage"]["prompt_tokens"] == wanted.prompt_tokens
        first, *rest = ask(url, questions[0], n=3, temperature=2.0).json()["choices"]
        assert len(rest) == 2 and {first["index"], *(each["index"] for each in rest)} == {0, 1, 2}
        hostile = {"type": "image_embeds", "image_embeds": "AAAA"}
        body = {"model": NAME, "messages": [{"role": "user", "content": [hostile, {"type": "text", "text": "What?"}]}]}
        refused = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and "AAAA" not in refused.text

        # The vLLM dies: refused at once with a typed error, and back without a restart of ours.
        below = processes_of(process.pid)
        served = next(pid for pid in below if b"api_server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2])
        os.kill(served, signal.SIGKILL)
        codes = set()
        while (status := ask(url, questions[0])).status_code == 200:
            time.sleep(0.1)
        codes.add(status.json()["error"]["code"])
        assert codes <= {"backend_unreachable", "backend_failed"}
        wait_ready(url, process, log)
        assert ask(url, questions[0]).status_code == 200

        below = processes_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        end = time.monotonic() + 30
        while (left := [pid for pid in below if Path(f"/proc/{pid}/cmdline").exists()]) and time.monotonic() < end:
            time.sleep(0.2)
        assert left == []
