"""Requests that nobody would write: whatever comes in, no answer is a 500, and the worker goes on.

The engine is made up, the HTTP side is real. Schemathesis generates from our own OpenAPI document; the random bodies are valid ones with
something broken, broken pictures, random JSON and noise.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import random
from typing import Any

import pytest
from fastapi import FastAPI

from llava.serve.protocol import Limits
from llava.serve.worker_base import create_worker_app
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine

LIMITS = Limits(max_body_bytes=1_000_000, max_new_tokens=64)

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**23, 0.5, -0.0, 1e308, 5e-324),
    *("", " ", "\x00", "a" * 5000, "é\u202e\U0001f600", "<image>", "<image-placeholder>", "</s>", "%s%n", "{{7*7}}", "auto", "NaN"),
    *("data:", "data:image/png;base64,", "http://127.0.0.1:1/", "file:///etc/passwd"),
    *([], {}, [[]], [None], {"": None}, {"type": "text"}, {"type": "image_url"}, {"url": "x"}, ["a"] * 50, [36, 144], [2**40]),
)
VALID = (
    (CHAT, chat_body("what", (data_url(picture((3, 2))),), max_tokens=3)),
    (CHAT, chat_body("what", stream=True, stream_options={"include_usage": True}, n=2, logprobs=True, top_logprobs=1, max_tokens=2)),
    (CHAT, chat_body("a b", granularity=[36, 144], max_visual_tokens=99, granularity_bias=0.5, stop=["x"], seed=1, temperature=0.5)),
    (WORKER, worker_body("<image> a b", images=[picture((3, 2))], max_new_tokens=2, stop="</s>", echo=False)),
    (WORKER, worker_body("a b", granularity="auto", vis_token_granularity=None, top_p=0.3, seed=2)),
)
FILES = tuple(
    base64.b64decode(picture((5, 4), file_format)) for file_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
)


async def post(app: FastAPI, path: str, body: bytes, method: str = "POST", query: bytes = b"") -> int:
    """One request straight into the app; its status."""
    statuses: list[int] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    ended = asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


def break_value(value: Any, dice: random.Random) -> Any:
    """A copy with one thing replaced, dropped, doubled or added, anywhere within."""
    value = copy.deepcopy(value)
    where = value
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            break
        key = dice.choice(keys)
        if isinstance(where[key], (dict, list)) and where[key] and dice.random() < 0.7:
            where = where[key]
            continue
        action = dice.randrange(4)
        if action == 0:
            del where[key]
        elif action == 1 and isinstance(where, list):
            where.extend([where[key]] * dice.randrange(1, 12))
        elif action == 2 and isinstance(where, dict):
            where[dice.choice(["x", "model", "images", "tools", "prompt_embeds", "chat_template_kwargs", "\x00", ""])] = dice.choice(NASTY)
        else:
            where[key] = dice.choice(NASTY)
        break
    return value


def break_file(data: bytes, dice: random.Random) -> bytes:
    """A picture file with bytes changed, cut off or added."""
    broken = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        broken[dice.randrange(len(broken))] = dice.randrange(256)
    return bytes(broken[: dice.randrange(1, len(broken) + 1)]) if dice.random() < 0.3 else bytes(broken) + dice.randbytes(dice.randrange(8))


def picture_body(path: str, file: bytes) -> bytes:
    """A request about one picture."""
    text = base64.b64encode(file).decode()
    body = chat_body("q", (data_url(text),)) if path == CHAT else worker_body("<image> q", images=[text])
    return json.dumps(body).encode()


def random_json(dice: random.Random, depth: int = 0) -> Any:
    if depth > 4 or dice.random() < 0.4:
        return dice.choice(NASTY)
    if dice.random() < 0.5:
        return [random_json(dice, depth + 1) for _ in range(dice.randrange(4))]
    names = ("model", "messages", "role", "content", "prompt", "images", "stop", "n", "type", "text", "image_url", "url", "z")
    return {dice.choice(names): random_json(dice, depth + 1) for _ in range(dice.randrange(5))}


def random_body(dice: random.Random) -> tuple[str, bytes]:
    """A path and a body of at most some kilobytes."""
    path, body = dice.choice(VALID)
    kind = dice.randrange(6)
    if kind <= 1:
        return path, json.dumps(break_value(body, dice)).encode()
    if kind == 2:
        return path, picture_body(path, break_file(dice.choice(FILES), dice))
    if kind == 3:
        return path, json.dumps(random_json(dice)).encode()
    whole = bytearray(json.dumps(body, ensure_ascii=dice.random() < 0.5).encode())
    if kind == 4:
        for _ in range(dice.randrange(1, 5)):
            whole[dice.randrange(len(whole))] = dice.randrange(256)
        return path, bytes(whole)
    return path, dice.randbytes(dice.randrange(300))


def send_random_bodies(count: int, seed: int) -> dict[int, int]:
    """Statuses and how often they came."""
    dice = random.Random(seed)
    engine = FakeEngine()
    app = create_worker_app(engine, LIMITS)

    async def run() -> dict[int, int]:
        found: dict[int, int] = {}
        for _ in range(count):
            path, body = random_body(dice)
            status = await post(app, path, body)
            assert status < 500, (path, body[:2000])
            found[status] = found.get(status, 0) + 1
        for path, good in VALID:
            assert await post(app, path, json.dumps(good).encode()) == 200
        return found

    found = asyncio.run(run())
    assert engine.active == 0 and app.state.gate.inside == app.state.gate.bytes_inside == 0
    assert app.state.worker.pictures.held_pixels == 0
    return found


def send_generated_requests(count: int) -> dict[int, int]:
    """Statuses of so many requests that schemathesis generates from our document, valid and invalid ones, over all operations."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis.generation import GenerationMode

    app = create_worker_app(FakeEngine(), LIMITS)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    strategies = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]
    posts = [each.as_strategy(generation_mode=mode) for each in operations if each.method.upper() == "POST" for mode in modes]
    found: dict[int, int] = {}

    bounded = {"max_examples": count, "deadline": None, "database": None, "derandomize": True, "phases": [Phase.generate]}

    @settings(**bounded, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(*strategies, *posts * 4))
    def send(case: Any) -> None:
        body = case.body
        data = body if isinstance(body, bytes) else b"" if type(body).__name__ == "NotSet" else json.dumps(body).encode()
        status = asyncio.run(post(app, case.formatted_path, data, case.method.upper()))
        assert status < 500, (case.method, case.formatted_path, data[:2000])
        found[status] = found.get(status, 0) + 1

    send()
    return found


def test_no_random_body_is_a_500():
    found = send_random_bodies(300, seed=1)
    assert found[200] > 10 and found[400] > 100


def test_no_generated_request_is_a_500():
    assert sum(send_generated_requests(100).values()) >= 100


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the broken pictures


@pytest.mark.slow
def test_no_random_body_of_20_000_is_a_500():
    found = send_random_bodies(20_000, seed=2)
    assert sum(found.values()) == 20_000


@pytest.mark.slow
def test_no_generated_request_of_5_000_is_a_500():
    assert sum(send_generated_requests(5_000).values()) >= 5_000
