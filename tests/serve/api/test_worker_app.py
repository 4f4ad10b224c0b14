"""A whole worker over a fake engine: both protocols, errors, clients that disconnect or do not read, and its shutdown."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import httpx
import pytest

from llava.serve.api.worker_app import create_worker_app, run_worker
from llava.serve.protocol import EngineStats, ErrorKind, Limits, ServeError
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine
from tests.serve.ports import free_port
from tests.serve.running import RunningApp, wait_until


def call(app, method, path, **options):
    """One request to an app without a socket."""

    async def send():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def ask(engine, text="what is this", urls=(), limits=None, **fields):
    return call(create_worker_app(engine, limits), "POST", CHAT, json=chat_body(text, urls, **fields))


def parts_of(response):
    """The JSON values of a stream of LLaVA's protocol, read as its own page reads them."""
    return [json.loads(part) for part in response.content.split(b"\0") if part]


def open_stream(port: int, path: str, body: dict, receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


# LLaVA's protocol


SLOW = 0.03
"""Seconds between two pieces of an engine whose pieces go out one by one."""


def test_a_stream_of_the_worker_protocol_repeats_the_prompt():
    app = create_worker_app(FakeEngine(piece_delay=SLOW))
    prompt = "USER: <image>\nwhat? ASSISTANT:"
    body = {"model": "fake", "prompt": prompt, "temperature": 0.2, "top_p": 0.7, "max_new_tokens": 3, "stop": "</s>", "images": [picture()]}
    response = call(app, "POST", WORKER, json=body)
    parts = parts_of(response)
    assert response.status_code == 200 and response.content.endswith(b"\0")
    written = ["", "USER: ", "USER: <image> ", "USER: <image> what? ", "USER: <image> what? "]
    assert [part["text"] for part in parts] == [prompt + text for text in written]
    assert all(part["error_code"] == 0 for part in parts)
    assert parts[0]["avg_llava"]["images"][0]["granularity"] == 144
    assert parts[-1]["usage"]["visual_tokens"] == 180 and parts[-1]["finish_reason"] == "length"


def test_the_worker_protocol_passes_everything_on():
    engine = FakeEngine()
    body = worker_body(
        "x <image> <image>", images=[picture((5, 6)), data_url(picture((7, 8)))], stop=["a", "b"], seed=4, top_p=0.5, echo=False,
        vis_token_granularity=36, max_visual_tokens=99, granularity_bias=0.25,
    )  # fmt: skip
    parts = parts_of(call(create_worker_app(engine), "POST", WORKER, json=body))
    assert parts[0]["text"] == "" and parts[-1]["text"] == "x <image> <image> [5x6][7x8]"
    request = engine.requests[0]
    assert request.prompt == "x <image> <image>" and request.messages == () and [image.size for image in request.images] == [(5, 6), (7, 8)]
    assert (request.sampling.stop, request.sampling.seed, request.sampling.top_p) == (("a", "b"), 4, 0.5)
    assert (request.routing.granularity, request.routing.max_visual_tokens, request.routing.bias) == (36, 99, 0.25)


def test_the_worker_protocols_defaults_are_llavas():
    engine = FakeEngine()
    app = create_worker_app(engine)
    call(app, "POST", WORKER, json={"prompt": "x"})
    call(app, "POST", WORKER, json={"prompt": "x", "temperature": 0.001})
    first, second = (request.sampling for request in engine.requests)
    assert (first.temperature, first.top_p, first.max_new_tokens) == (1.0, 1.0, 256) and second.temperature == 0.0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"images": ["AAAA"]}, 10),
        ({"prompt": "<image>"}, 10),
        ({"prompt": ""}, 10),
        ({"prompt": "<image>", "images": ["AAAA"]}, 11),
        ({"prompt": "<image>", "images": ["http://169.254.169.254/latest"]}, 11),
        ({"prompt": "<image>", "images": ["/etc/passwd"]}, 11),
        ({"prompt": "x" * 200_001}, 12),
        ({"model": "other"}, 15),
        ({"max_new_tokens": 4097}, 10),
        ({"granularity": 36, "vis_token_granularity": 576}, 10),
        ({"vis_token_granularity": 7}, 10),
        ({"repetition_penalty": 1.2}, 10),
    ],
)
def test_the_worker_protocols_errors_have_text_and_code(fields, code):
    response = call(create_worker_app(FakeEngine()), "POST", WORKER, json=worker_body(**fields))
    part = parts_of(response)[0]
    assert part["error_code"] == code and part["error"]["request_id"] in part["text"]
    assert 400 <= response.status_code < 500


def test_an_error_in_the_middle_comes_as_a_part_of_the_stream():
    engine = FakeEngine(failure=ServeError(ErrorKind.NOT_FINITE), fail_after=1)
    parts = parts_of(call(create_worker_app(engine), "POST", WORKER, json=worker_body("a b c")))
    assert [part["error_code"] for part in parts] == [0, 0, 23]
    assert parts[-1]["text"].startswith(ErrorKind.NOT_FINITE.fault.text)
    engine = FakeEngine(failure=RuntimeError("at 0x7f00"), fail_after=1)
    text = call(create_worker_app(engine), "POST", WORKER, json=worker_body("a b c")).text
    assert "0x7f00" not in text and '"error_code":0' not in text.rpartition("\0{")[2].replace(" ", "")


def test_errors_have_llavas_form_at_llavas_addresses_alone():
    app = create_worker_app(FakeEngine())
    for path, keys in ((WORKER, {"text", "error_code", "error"}), ("/worker_get_status", {"text", "error_code", "error"}),
                       (CHAT, {"error"}), ("/worker_of_nothing", {"error"})):  # fmt: skip
        refused = call(app, "GET", path)
        assert refused.status_code in (404, 405) and refused.json().keys() == keys
        assert refused.headers["content-type"] == "application/json"


def test_an_engine_that_has_failed_for_good_is_not_ready_and_ends_the_server():
    engine = FakeEngine(ready=False)
    app = create_worker_app(engine)
    assert not app.state.failed()
    engine.stats = lambda: EngineStats(0, 0, 0, 0, 0, 0, ErrorKind.INTERNAL)
    assert app.state.failed()
    answer = call(app, "GET", "/ready")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == ErrorKind.INTERNAL.value


def test_status_and_readiness():
    engine = FakeEngine()
    app = create_worker_app(engine)
    assert call(app, "POST", "/worker_get_status").json() == {"model_names": ["fake"], "speed": 1, "queue_length": 0}
    assert call(app, "GET", "/ready").json() == {"status": "ready"}
    engine.ready = False
    assert call(app, "GET", "/ready").json()["error"]["code"] == "overloaded" and call(app, "GET", "/health").status_code == 200
    engine.ready = True
    app.state.limiter.start_draining()
    refused = call(app, "GET", "/ready")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down" and refused.headers["retry-after"] == "5"
    assert call(app, "POST", CHAT, json=chat_body()).status_code == 503


# faults and limits


@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind is not ErrorKind.CANCELLED])
@pytest.mark.parametrize("path", [CHAT, WORKER])
def test_every_kind_of_error_reaches_the_client(kind, path):
    engine = FakeEngine(failure=ServeError(kind))
    response = call(create_worker_app(engine), "POST", path, json=chat_body() if path == CHAT else worker_body())
    fault = kind.fault
    assert response.status_code == fault.status
    assert response.json()["error"] | {"request_id": ""} == {
        "message": fault.text, "type": fault.type, "param": None, "code": kind.value, "request_id": "",
    }  # fmt: skip
    assert response.headers.get("retry-after") == (None if fault.retry_after is None else str(fault.retry_after))


def test_a_refused_choice_cancels_its_siblings():
    engine = FakeEngine(rows=2)
    assert ask(engine, n=3).status_code == 503
    assert engine.active == 0 and len(engine.cancelled) == 2


def test_one_failing_choice_ends_the_call():
    engine = FakeEngine(
        failure=ServeError(ErrorKind.OUT_OF_MEMORY), fail_after=1, fails=lambda r: r.request_id.endswith(".1"), piece_delay=0.01
    )
    assert ask(engine, n=3).status_code == 503
    assert engine.active == 0


def test_a_poisoned_request_leaves_the_others_alone():
    engine = FakeEngine(failure=RuntimeError("poison"), fails=lambda request: "poison" in str(request.messages), piece_delay=0.01)

    async def mixed():
        transport = httpx.ASGITransport(app=create_worker_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            texts = [f"number {index}" if index % 3 else f"poison {index}" for index in range(12)]
            return texts, await asyncio.gather(*(client.post(CHAT, json=chat_body(text)) for text in texts))

    for text, response in zip(*asyncio.run(mixed()), strict=True):
        if "poison" in text:
            assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        else:
            assert response.json()["choices"][0]["message"]["content"] == f"{text} "


def test_pieces_are_joined_where_asked():
    app = create_worker_app(FakeEngine(piece_delay=SLOW), stream_interval=2)
    events = call(app, "POST", CHAT, json=chat_body("a b c d e", stream=True, logprobs=True)).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert texts == ["", "a b ", "c d ", "e ", None]
    assert [len((chunk["choices"][0]["logprobs"] or {"content": []})["content"]) for chunk in chunks] == [0, 2, 2, 1, 0]


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_quick_pieces_share_a_part_in_both_protocols(delay):
    words = tuple(f"w{number} " for number in range(6 if delay else 200))
    app = create_worker_app(FakeEngine(pieces=lambda request: words, piece_delay=delay))
    parts = parts_of(call(app, "POST", WORKER, json=worker_body("x", echo=False)))
    texts = [part["text"] for part in parts]
    assert texts[:2] == ["", words[0]] and texts[-1] == "".join(words) and texts == sorted(texts, key=len)
    assert len(parts) == 8 if delay else len(parts) < 50
    text = call(app, "POST", CHAT, json=chat_body(stream=True)).text
    chunks = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "".join(words)
    assert chunks[1]["choices"][0]["delta"]["content"] == words[0] and len(chunks) == len(parts)
    assert text.endswith("data: [DONE]\n\n")


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    with sock:
        while part := sock.recv(65536):
            received += part
    return received


# clients that leave or do not read


@pytest.mark.parametrize(("path", "stream"), [(CHAT, False), (CHAT, True), (WORKER, True)])
@pytest.mark.parametrize("when", ["before the first token", "between tokens"])
def test_a_client_that_leaves_ends_its_generation(path, stream, when):
    slow = {"start_delay": 60} if when == "before the first token" else {"piece_delay": 0.02}
    engine = FakeEngine(pieces=lambda request: ("x",) * 3000, **slow)
    app = create_worker_app(engine)
    body = chat_body(stream=stream, max_tokens=3000) if path == CHAT else worker_body(max_new_tokens=3000)
    with RunningApp(app) as running:
        sock = open_stream(running.port, path, body)
        wait_until(lambda: engine.active == 1)
        if stream and when == "between tokens":
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        sock.close()
        wait_until(lambda: engine.active == 0 and app.state.limiter.in_flight == 0)
        assert len(engine.cancelled) == 1 and engine.served == []


def test_a_client_that_does_not_read_is_cut_off():
    engine = FakeEngine(pieces=lambda request: ("x" * 100_000,) * 3000)
    app = create_worker_app(engine, Limits(send_seconds=0.3))
    with RunningApp(app) as running:
        sock = open_stream(running.port, CHAT, chat_body(stream=True, max_tokens=3000), receive_buffer=4096)
        wait_until(lambda: engine.active == 1)
        wait_until(lambda: engine.active == 0 and app.state.limiter.in_flight == 0)
        assert len(engine.cancelled) == 1
        wait_until(lambda: not running.server.server_state.connections)
        with pytest.raises(OSError), sock:  # reset, or an end in the middle
            while sock.recv(1_000_000):
                pass
            raise OSError("ended early")


def test_a_slow_but_steady_reader_gets_everything():
    engine = FakeEngine(pieces=lambda request: ("x" * 50_000,) * 100)
    with RunningApp(create_worker_app(engine, Limits(send_seconds=1.0))) as running:
        sock = open_stream(running.port, CHAT, chat_body(stream=True), receive_buffer=65536)
        received = 0
        last = b""
        while b"[DONE]" not in last:
            part = sock.recv(200_000)
            received, last = received + len(part), (last + part)[-40:]
            time.sleep(0.005)
        assert received > 5_000_000 and engine.cancelled == []
        sock.close()


def test_each_piece_is_sent_at_once():
    engine = FakeEngine(piece_delay=0.1)
    with RunningApp(create_worker_app(engine)) as running, httpx.Client(trust_env=False) as client:
        times = []
        with client.stream("POST", running.url + CHAT, json=chat_body("a b c d", stream=True)) as response:
            for line in response.iter_lines():
                if '"content":"' in line:
                    times.append(time.monotonic())
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 4 and all(gap > 0.05 for gap in gaps)


# the end


def serve_slowly(port: int) -> None:
    """What the child process runs."""
    engine = FakeEngine(pieces=lambda request: tuple("abcdefghij"), piece_delay=0.1)
    sys.exit(run_worker(create_worker_app(engine), "127.0.0.1", port, log_level="error", drain_seconds=20))


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_finish_and_refuses_new_ones(number):
    port = free_port()
    # A fork: a fresh interpreter would spend most of the test importing.
    process = multiprocessing.get_context("fork").Process(target=serve_slowly, args=(port,))
    process.start()
    try:
        wait_until(lambda: is_open(port))
        streaming = open_stream(port, CHAT, chat_body(stream=True))
        waiting = open_stream(port, CHAT, chat_body())
        assert streaming.recv(200).startswith(b"HTTP/1.1 200")
        os.kill(process.pid, number)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 503)
        refused = httpx.post(url + CHAT, json=chat_body(), trust_env=False)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down" and refused.headers["retry-after"] == "5"
        assert read_all(streaming).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"abcdefghij" in read_all(waiting)
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


class StuckEngine(FakeEngine):
    """Its drain never ends."""

    async def drain(self) -> None:
        await asyncio.Event().wait()


def test_an_engine_that_does_not_let_go_is_closed_all_the_same(monkeypatch):
    """The server has waited for the running answers already, as long as its `drain_seconds`; the app does not wait as long once more."""
    monkeypatch.setattr("llava.serve.api.worker_app.LEFTOVER_SECONDS", 0.2)
    engine = StuckEngine()
    begun = time.monotonic()
    with RunningApp(create_worker_app(engine)):
        pass
    assert engine.started and engine.closed and time.monotonic() - begun < 5


def test_an_answer_longer_than_the_drain_is_cut_off_and_the_server_ends(monkeypatch):
    monkeypatch.setattr("llava.serve.http.server.FLUSH_SECONDS", 1.0)
    engine = FakeEngine(pieces=lambda request: ("x",) * 3000, piece_delay=0.02)
    with RunningApp(create_worker_app(engine), drain_seconds=0.3) as running:
        sock = open_stream(running.port, CHAT, chat_body(stream=True, max_tokens=3000))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        running.server.servers[0].get_loop().call_soon_threadsafe(running.server.stop)
        wait_until(lambda: engine.closed)
        assert 0.25 < time.monotonic() - begun < 5 and len(engine.cancelled) == 1
        assert b"[DONE]" not in read_all(sock)


def test_the_document_describes_both_protocols():
    document = call(create_worker_app(FakeEngine(), api_keys=("k",)), "GET", "/openapi.json", headers={"Authorization": "Bearer k"}).json()
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "WorkerRequest", "ErrorBody", "ImagePart"} <= schemas.keys()
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert {"granularity", "max_visual_tokens", "granularity_bias"} <= schemas["ChatRequest"]["properties"].keys()
    for path in (CHAT, WORKER):
        assert "$ref" in document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert document["security"] == [{"key": []}]
