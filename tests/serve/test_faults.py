"""Faults in real programs over the shipped model: whatever happens to one request, the others get their right answers, the failed one a
typed error with a request id, and the service goes on.

Every answer of the others is compared with `Assistant.answer` of the same question, asked alone.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from llava.inference import MICRO_MODEL, Answer, Assistant, Options
from llava.messages import RoutingRequest
from llava.serve.api import request_handler
from llava.serve.api.coalescing import CoalescedPieces
from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.cluster.registration import Registration
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.protocol import ErrorKind, Limits
from tests.serve.bodies import CHAT, WORKER
from tests.serve.ports import free_port
from tests.serve.running import RunningApp, wait_until

ROOT = Path(__file__).resolve().parents[2]
EVAL = MICRO_MODEL.parent / "eval"
HTTP = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=200))
TOKENS = 12


@dataclass(frozen=True)
class Asked:
    """A question as it goes out, and what has to come back: picture is what a right decoder makes of the file."""

    text: str
    file: bytes
    picture: Image.Image = field(compare=False)
    granularity: int | None = None

    def body(self, **fields: Any) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(self.file).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]
        asked = {"model": "micro", "messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, **fields}
        return asked if self.granularity is None else {"granularity": self.granularity, **asked}

    def answer(self, assistant: Assistant) -> str:
        """What the model says alone."""
        return self._whole(assistant).text

    def logits(self, assistant: Assistant) -> list[float]:
        """What the router says alone: unlike a word or two, they differ with every pixel."""
        logits = self._whole(assistant).reports[0].logits
        assert logits is not None
        return [float(value) for value in logits]

    def _whole(self, assistant: Assistant) -> Answer:
        if self not in _ANSWERS:
            options = Options(max_new_tokens=TOKENS, routing=RoutingRequest(self.granularity))
            _ANSWERS[self] = assistant.answer([self.picture], "<image>\n" + self.text, options)
        return _ANSWERS[self]


_ANSWERS: dict[Asked, Answer] = {}


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def from_evaluation(row: dict[str, Any], granularity: int | None = None) -> Asked:
    picture = Image.open(EVAL / row["image"]).convert("RGB")
    return Asked(row["text"], png(picture), picture, granularity)


ROWS = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()]
GOOD = [from_evaluation(row, (None, 4, 64, 16)[index % 4]) for index, row in enumerate(ROWS[:36:3])]
LONG = from_evaluation(ROWS[0])  # five tokens, the longest that the shipped model says


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def streamed_text(lines: list[str]) -> str:
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ())).strip()


def failed(response: httpx.Response, kind: ErrorKind) -> None:
    """The response is this kind's error, under a request id, in our own words."""
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (kind.fault.status, kind.value), response.text
    assert error["message"] == kind.fault.text and error["request_id"] == response.headers["x-request-id"]
    wanted = None if kind.fault.retry_after is None else str(kind.fault.retry_after)
    assert response.headers.get("retry-after") == wanted


def ask_all(url: str, bodies: list[dict[str, Any]], ids: dict[int, str] | None = None) -> list[httpx.Response]:
    """All at once; `ids` gives some of them a request id."""

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            headers = [{"X-Request-Id": ids[place]} if ids and place in ids else {} for place in range(len(bodies))]
            return await asyncio.gather(*(client.post(CHAT, json=body, headers=head) for body, head in zip(bodies, headers, strict=True)))

    return asyncio.run(send())


def gauge(url: str, name: str) -> float:
    lines = HTTP.get(url + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


_HOLDING = """
import os, sys, time
from llava.serve import model_worker
from llava.serve.engine import embedded as engine
step = engine.EmbeddedEngine._step
def unless_held(self):
    if os.path.exists(sys.argv[1]) and any(len(task.stream.ids) > 1 for task in self.batch.tasks):
        time.sleep(0.01)
    else:
        step(self)
engine.EmbeddedEngine._step = unless_held
sys.exit(model_worker.main(sys.argv[2:]))
"""
"""The worker program, whose answers stand still after two tokens while a file exists: the shipped model's are too short to be interrupted
otherwise."""


def start(*command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def start_worker(port: int, controller: str, hold: Path) -> subprocess.Popen[bytes]:
    own = f"http://127.0.0.1:{port}"
    flags = ("--host", "127.0.0.1", "--port", str(port), "--controller", controller, "--worker", own, "--model-name", "micro")
    return start("-c", _HOLDING, str(hold), *flags, "--device", "cpu")


def answers(url: str, path: str = "/ready") -> bool:
    try:
        return HTTP.get(url + path, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def held(hold: Path) -> Iterator[None]:
    """Let the program's answers stand still while the block runs."""
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


@contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


@dataclass
class Service:
    """A controller and an in-process worker of it on sockets, and a worker program beside them. hold: for `held`."""

    controller: RunningApp
    inside: RunningApp
    engine: EmbeddedEngine
    program: subprocess.Popen[bytes]
    program_url: str
    hold: Path


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def service(assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    hold = tmp_path_factory.mktemp("program") / "hold"
    engine = EmbeddedEngine(assistant, "micro", max_batch_rows=8, max_queue=40)
    with RunningApp(create_controller_app()) as controller:
        port = free_port()
        with ended(program := start_worker(port, controller.url, hold)):
            limits = Limits(max_queue=40, send_seconds=0.5)
            with RunningApp(create_worker_app(engine, limits, concurrency=8, report_cache_hits=True)) as inside:
                url = f"http://127.0.0.1:{port}"
                wait_until(lambda: gauge(controller.url, "avg_llava_controller_workers") == 1, 300)
                yield Service(controller, inside, engine, program, url, hold)


# ---- pictures that break decoders, in a crowd --------------------------------------------------------------------------------


def bomb() -> bytes:
    """The header of a PNG of 3.6 gigapixels, and hardly anything behind it."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + b"\0" * 99


def odd_pictures() -> list[Asked]:
    """Files that trip decoders, with the picture that each of them is, made without our decoder."""
    scene = GOOD[0].picture
    grey = scene.convert("L")
    turned = Image.Exif()
    turned[274] = 6  # to be turned by a quarter, clockwise
    cmyk = encoded(scene.convert("CMYK"), "JPEG", quality=95)
    deep = Image.frombytes("I;16", grey.size, b"".join(bytes((value, value)) for value in grey.tobytes()))
    palette = Image.new("P", (40, 30), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 20, 30))  # the red half is the transparent one
    on_white = Image.new("RGB", (40, 30), "blue")
    on_white.paste("white", (0, 0, 20, 30))
    frames = [scene, Image.new("RGB", scene.size, "black")]
    files = [
        (png(Image.new("RGB", (1, 1), "red")), Image.new("RGB", (1, 1), "red")),
        (png(Image.new("RGB", (1, 150), "green")), Image.new("RGB", (1, 150), "green")),
        (png(Image.new("RGB", (150, 1), "green")), Image.new("RGB", (150, 1), "green")),
        (cmyk, Image.open(BytesIO(cmyk)).convert("RGB")),
        (png(deep), grey.convert("RGB")),
        (png(palette, transparency=0), on_white),
        (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), scene),
        (png(scene, exif=turned), scene.transpose(Image.Transpose.ROTATE_270)),
    ]
    return [Asked("What shape is in the image?", file, picture) for file, picture in files]


def broken_files() -> list[bytes]:
    scene = GOOD[1].file
    return [scene[: len(scene) // 2], bomb(), b"", b"GIF89a", png(Image.new("RGB", (1, 201))), scene[:40] + b"\xff" * 40 + scene[80:]]


def test_broken_and_odd_pictures_in_a_crowd_cost_nobody_an_answer(service: Service, assistant: Assistant) -> None:
    good, broken = [*GOOD, *odd_pictures()], [Asked("q", file, GOOD[0].picture) for file in broken_files()]
    bodies = [asked.body() for asked in good]
    for place, asked in enumerate(broken):
        bodies.insert(3 * place, asked.body())
    responses = ask_all(service.inside.url, bodies)
    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) == len(broken)
    for response in refused:
        failed(response, ErrorKind.INVALID_IMAGE)
    answered = [response for response in responses if response.status_code == 200]
    assert [text_of(response) for response in answered] == [asked.answer(assistant) for asked in good]
    for asked, response in zip(good, answered, strict=True):
        if asked.granularity is None:
            assert response.json()["avg_llava"]["images"][0]["logits"] == pytest.approx(asked.logits(assistant), abs=1e-3), asked.text


def test_what_is_kept_of_one_picture_never_answers_for_another(service: Service, assistant: Assistant) -> None:
    """Pictures of the same bytes in another shape, the same picture at other granularities, all under the same request id."""
    scene = GOOD[0].picture
    shapes = [Image.frombytes("RGB", size, scene.tobytes()) for size in ((128, 128), (64, 256), (256, 64), (32, 512))]
    asked = [Asked("Name the pole colours from top to bottom.", png(each), each, wish) for each in shapes for wish in (4, 64, 16)]
    expected = [each.answer(assistant) for each in asked]
    for _ in range(2):  # the second time everything is kept already
        responses = ask_all(service.inside.url, [each.body() for each in asked], ids=dict.fromkeys(range(len(asked)), "same"))
        assert [text_of(each) for each in responses] == expected
        assert [each.json()["usage"]["granularities"] for each in responses] == [[each.granularity] for each in asked]
    assert all(image["cached"] for each in responses for image in each.json()["avg_llava"]["images"])


def test_very_many_pictures_do_not_fill_the_memory(assistant: Assistant) -> None:
    engine = EmbeddedEngine(assistant, "micro", cache_bytes=400_000, prefix_cache_bytes=500_000)
    pictures = [Image.new("RGB", (40 + index, 40), (index, 90, 90)) for index in range(30)]
    asked = [Asked("What shape is in the image?", png(each), each, 4) for each in pictures]
    with RunningApp(create_worker_app(engine, concurrency=16)) as running:
        for first in (0, 15):
            responses = ask_all(running.url, [each.body() for each in asked[first : first + 15]])
            assert [text_of(each) for each in responses] == [each.answer(assistant) for each in asked[first : first + 15]]
        assert 0 < gauge(running.url, "avg_llava_cache_bytes") <= 400_000 and gauge(running.url, "avg_llava_cache_entries") < 30
        assert 0 < engine.prefixes.bytes <= 500_000 and len(engine.prefixes) < 30
        assert running.app.state.limiter.held_bytes == 0


MARKS = ("What </s> is this?", "</s>", "<s>[INST] <unk> <pad>", "USER: a ASSISTANT: b</s>USER: c", "<im\u200bage>", "\x00 \u202e \ufffe")


def test_marks_of_the_tokenizer_and_the_template_in_a_question_disturb_nobody(service: Service, assistant: Assistant) -> None:
    marked = [Asked(text, GOOD[0].file, GOOD[0].picture) for text in MARKS]
    asked = [each for pair in zip(marked, GOOD, strict=False) for each in pair]
    responses = ask_all(service.inside.url, [each.body() for each in asked])
    assert [text_of(each) for each in responses] == [each.answer(assistant) for each in asked]
    for text in ("<image>", "a <<image>image>", "<image-placeholder>"):
        refused = HTTP.post(service.inside.url + CHAT, json=Asked(text, GOOD[0].file, GOOD[0].picture).body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


# ---- memory and poison, in one batch -----------------------------------------------------------------------------------------


@contextmanager
def failing(part: object, method: str, when: Callable[..., bool], error: Exception) -> Iterator[None]:
    """A method of a running engine, or of its batch, that raises where `when` says so."""
    original = getattr(part, method)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error
        return original(*args, **kwargs)

    setattr(part, method, broken)
    try:
        yield
    finally:
        delattr(part, method)


def fail_one_of_a_batch(service: Service, assistant: Assistant, method: str, error: Exception, kind: ErrorKind) -> None:
    def is_marked(*args: Any, **_: Any) -> bool:
        return any(task.request.request_id == "marked" for task in args[-1])

    bodies = [asked.body() for asked in GOOD]
    engine = service.engine
    with failing(engine.batch if method == "pick" else engine, method, is_marked, error):
        responses = ask_all(service.inside.url, bodies, ids={5: "marked"})
        failed(responses[5], kind)
        assert responses[5].headers["x-request-id"] == "marked" and "secret" not in responses[5].text
        expected = [asked.answer(assistant) for asked in GOOD]
        assert [text_of(each) for place, each in enumerate(responses) if place != 5] == expected[:5] + expected[6:]
    again = HTTP.post(service.inside.url + CHAT, json=bodies[5], headers={"X-Request-Id": "marked"})
    assert text_of(again) == expected[5]
    wait_until(lambda: gauge(service.inside.url, "avg_llava_batch_rows") == 0)


@pytest.mark.parametrize(
    ("method", "error", "kind"),
    [
        ("_encode", torch.OutOfMemoryError("secret"), ErrorKind.OUT_OF_MEMORY),
        ("_prefill", MemoryError("secret"), ErrorKind.OUT_OF_MEMORY),
        ("_prefill", RuntimeError("secret at 0x7f00"), ErrorKind.INTERNAL),
        ("pick", FloatingPointError("secret"), ErrorKind.NOT_FINITE),
    ],
)
def test_one_request_of_a_batch_that_runs_out_of_memory_or_is_poisoned_fails_alone(
    service: Service, assistant: Assistant, method: str, error: Exception, kind: ErrorKind
) -> None:
    fail_one_of_a_batch(service, assistant, method, error, kind)


def test_a_batch_too_large_for_memory_costs_nobody_an_answer(service: Service, assistant: Assistant) -> None:
    def too_large(inputs_embeds: torch.Tensor, **_: Any) -> bool:
        return inputs_embeds.shape[0] > 2 and inputs_embeds.shape[1] == 1

    with failing(service.engine.batch, "language_model", too_large, MemoryError()):
        responses = ask_all(service.inside.url, [asked.body() for asked in GOOD])
    assert [text_of(each) for each in responses] == [asked.answer(assistant) for asked in GOOD]


# ---- clients that leave or do not read ---------------------------------------------------------------------------------------


def open_stream(url: str, path: str, body: dict[str, Any], receive_buffer: int = 4096) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


@pytest.mark.parametrize("through", ["controller", "worker"])
def test_a_client_that_leaves_in_the_middle_gives_its_place_back(service: Service, assistant: Assistant, through: str) -> None:
    url = service.controller.url if through == "controller" else service.program_url
    with held(service.hold):  # so that the answer does not end by itself
        sock = open_stream(url, CHAT, LONG.body(stream=True))
        received = b""
        while b'"content":"' not in received.replace(b'"content":""', b""):
            received += sock.recv(4096)
        assert gauge(service.program_url, "avg_llava_batch_rows") == 1
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as from a program that was killed
        sock.close()
        wait_until(lambda: gauge(service.program_url, "avg_llava_batch_rows") == 0)
        assert b"[DONE]" not in received
    assert text_of(HTTP.post(url + CHAT, json=LONG.body())) == LONG.answer(assistant)


def test_clients_that_do_not_read_hold_up_nobody_and_are_let_go(
    service: Service, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA's protocol repeats the prompt with every part, so that a long prompt, each token sent, soon outgrows the system's buffers."""
    monkeypatch.setattr(request_handler, "CoalescedPieces", functools.partial(CoalescedPieces, seconds=0.0))
    text = "triangle " * 1500  # which the shipped model goes on with
    body = {"model": "micro", "prompt": f"USER: {text} ASSISTANT:", "temperature": 0.0, "max_new_tokens": 300, "stop": "none"}
    slow = [open_stream(service.inside.url, WORKER, body) for _ in range(2)]
    wait_until(lambda: gauge(service.inside.url, "avg_llava_batch_rows") == 2)
    responses = ask_all(service.inside.url, [asked.body() for asked in GOOD])
    assert [text_of(each) for each in responses] == [asked.answer(assistant) for asked in GOOD]
    wait_until(lambda: service.inside.app.state.limiter.in_flight == 0)
    for sock in slow:
        with sock, pytest.raises(OSError):  # a reset, or an end in the middle
            received = b""
            while part := sock.recv(1_000_000):
                received += part
            assert not received.endswith(b"0\r\n\r\n")
            raise OSError("it ended early")


# ---- programs that die or end ------------------------------------------------------------------------------------------------


def test_a_worker_killed_while_streaming_is_a_typed_error_and_another_one_answers(service: Service, assistant: Assistant) -> None:
    """The last test of the shared program."""
    question = HTTP.stream("POST", service.controller.url + CHAT, json=LONG.body(stream=True))
    with held(service.hold), question as response:
        lines = response.iter_lines()
        first = next(line for line in lines if '"content":"' in line and '"content":""' not in line)
        status = {"model_names": ["micro"], "speed": 1, "queue_length": 0}
        body = {"worker_name": service.inside.url, "check_heart_beat": False, "worker_status": status}
        HTTP.post(service.controller.url + "/register_worker", json=body).raise_for_status()
        service.program.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        rest = [line for line in lines if line]
    told = time.monotonic() - killed
    error = json.loads(rest[-2][6:])["error"]
    assert rest[-1] == "data: [DONE]" and error["code"] == "backend_failed" and error["request_id"] == response.headers["x-request-id"]
    assert LONG.answer(assistant).startswith(streamed_text([first, *rest[:-2]])) and told < 10
    responses = ask_all(service.controller.url, [asked.body() for asked in GOOD])
    assert [text_of(each) for each in responses] == [asked.answer(assistant) for asked in GOOD]
    print(f"\nthe client was told after {told:.2f} s; twelve answers of another worker after {time.monotonic() - killed:.2f} s")
    assert time.monotonic() - killed < 10


def test_a_controller_that_starts_again_has_its_worker_back(assistant: Assistant) -> None:
    port, worker_port = free_port(), free_port()
    at = f"http://127.0.0.1:{port}"
    engine = EmbeddedEngine(assistant, "micro")
    registration = Registration(at, f"http://127.0.0.1:{worker_port}", interval=0.3)
    with RunningApp(create_worker_app(engine, registration=registration), port=worker_port):
        for _ in range(2):
            with RunningApp(create_controller_app(), port=port):
                wait_until(lambda: answers(at))
                assert text_of(HTTP.post(at + CHAT, json=LONG.body())) == LONG.answer(assistant)


@pytest.mark.slow
def test_programs_recover_from_a_killed_controller_and_drain_on_sigterm(assistant: Assistant, tmp_path: Path) -> None:
    """Controller and worker as programs with their own times: kill -9 and start of the controller, then SIGTERM to both."""
    port, worker_port = free_port(), free_port()
    at, own = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{worker_port}"
    command = ("-m", "llava.serve.controller", "--host", "127.0.0.1", "--port", str(port))
    with ended(first := start(*command), worker := start_worker(worker_port, at, hold := tmp_path / "hold")):
        wait_until(lambda: answers(at), 300)
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        assert text_of(HTTP.post(own + CHAT, json=LONG.body())) == LONG.answer(assistant)  # the worker needs no controller
        with ended(second := start(*command)):
            wait_until(lambda: answers(at, "/health"), 300)
            begun = time.monotonic()
            wait_until(lambda: answers(at))
            print(f"\nthe worker was back {time.monotonic() - begun:.2f} s after the new controller answered")
            assert text_of(HTTP.post(at + CHAT, json=LONG.body())) == LONG.answer(assistant)
            drain_worker(own, worker, hold, assistant)
            drain_controller(at, second)


def drain_worker(url: str, worker: subprocess.Popen[bytes], hold: Path, assistant: Assistant) -> None:
    question = HTTP.stream("POST", url + CHAT, json=LONG.body(stream=True))
    with held(hold), question as response:
        lines = response.iter_lines()
        seen = [next(line for line in lines if '"content":"' in line)]
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(url + "/ready").status_code == 503)
        failed(HTTP.post(url + CHAT, json=LONG.body()), ErrorKind.DRAINING)
        hold.unlink()
        begun = time.monotonic()
        seen += [line for line in lines if line]
        assert seen[-1] == "data: [DONE]" and streamed_text(seen) == LONG.answer(assistant)
    assert worker.wait(60) == 0
    print(f"ended with status 0 {time.monotonic() - begun:.2f} s after its last answer was let go")


def drain_controller(url: str, controller: subprocess.Popen[bytes]) -> None:
    refused = HTTP.post(url + CHAT, json=LONG.body(stream=True))
    assert refused.status_code in (502, 503)  # its worker is gone: a typed error, not a hang
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(60) == 0
