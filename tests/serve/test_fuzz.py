"""Requests that nobody would write: whatever comes in, no answer is a 500, and the server goes on.

The engine is made up, the HTTP side is real. Schemathesis generates from the OpenAPI documents of the worker and of the controller; they
describe neither headers nor queries, so Hypothesis adds those. The random bodies are valid ones with something broken, broken images,
random JSON and noise.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlencode

import h11
import httpx
import pytest
from fastapi import FastAPI

from llava.fetch import FetchError
from llava.serve.api.paths import COMPLETIONS_PATH, DETOKENIZE_PATH, RESPONSES_PATH, TOKENIZE_PATH
from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.protocol import Limits
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine

LIMITS = Limits(max_body_bytes=1_000_000, max_new_tokens=64)

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**23, 0.5, -0.0, 1e308, 5e-324, 1e-320, -1e-40),
    *("", " ", "\x00", "a" * 5000, "é\u202e\U0001f600", "<image>", "<image-placeholder>", "</s>", "%s%n", "{{7*7}}", "auto", "NaN"),
    *("data:", "data:image/png;base64,", "http://127.0.0.1:1/", "file:///etc/passwd"),
    *([], {}, [[]], [None], {"": None}, {"type": "text"}, {"type": "image_url"}, {"url": "x"}, ["a"] * 50, [36, 144], [2**40]),
)
ADDED = ("x", "model", "images", "tools", "prompt_embeds", "previous_response_id", "chat_template_kwargs", "\x00", "")
VALID = (
    (CHAT, chat_body("what", (data_url(picture((3, 2))),), max_tokens=3)),
    (CHAT, chat_body("what", stream=True, stream_options={"include_usage": True}, n=2, logprobs=True, top_logprobs=1, max_tokens=2)),
    (CHAT, chat_body("a b", granularity=[36, 144], max_visual_tokens=99, granularity_bias=0.5, stop=["x"], seed=1, temperature=0.5)),
    (CHAT, chat_body("a b", top_k=3, min_p=0.1, repetition_penalty=1.1, presence_penalty=1, frequency_penalty=-1, logit_bias={"5": 1.5})),
    (CHAT, chat_body("a", stop_token_ids=[7], ignore_eos=True, min_tokens=1, tools=[], skip_special_tokens=True, metadata={"a": "b"})),
    (CHAT, chat_body("a", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}})),
    (CHAT, chat_body("a", structured_outputs={"choice": ["a", "b"]}, temperature=1e-320, top_p=1e-40, guided_json=None)),
    (WORKER, worker_body("<image> a b", images=[picture((3, 2))], max_new_tokens=2, stop="</s>", echo=False)),
    (WORKER, worker_body("a b", granularity="auto", vis_token_granularity=None, top_p=0.3, seed=2)),
    (COMPLETIONS_PATH, worker_body("<image> a b", images=[picture((3, 2))], max_tokens=2, logprobs=1, stream=True)),
    (COMPLETIONS_PATH, worker_body(["a b", "c"], n=2, stop=["x"], user="u")),
    (RESPONSES_PATH, {"model": "fake", "input": "a b", "instructions": "c", "max_output_tokens": 3, "top_logprobs": 1}),
    (RESPONSES_PATH, {"model": "fake", "stream": True, "input": [{"role": "user", "content": [
        {"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": data_url(picture((3, 2))), "detail": "low"},
    ]}]}),
    (TOKENIZE_PATH, {"model": "fake", "messages": chat_body("what", (data_url(picture((3, 2))),))["messages"], "granularity": 36}),
    (TOKENIZE_PATH, {"model": "fake", "prompt": "<image> a", "images": [picture((3, 2))], "return_token_strs": True}),
    (DETOKENIZE_PATH, {"model": "fake", "tokens": [97, 98]}),
)  # fmt: skip
FILES = tuple(
    base64.b64decode(picture((5, 4), file_format)) for file_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
)


Headers = list[tuple[bytes, bytes]]

JSON_KIND = (b"content-type", b"application/json")


async def post(
    app: FastAPI, path: str, body: bytes, method: str = "POST", query: bytes = b"", headers: Iterable[tuple[bytes, bytes]] = (JSON_KIND,)
) -> int:
    """One request straight into the app, as uvicorn would hand it on; its status.

    path: percent-encoded. headers: those that h11 refuses beside a fitting Content-Length are left out.
    """
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

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "query_string": query, "root_path": "", "client": ("127.0.0.1", 1),
        "headers": acceptable_headers([(b"content-length", str(len(body)).encode()), *headers]), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


def acceptable_headers(wanted: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Those that the server's parser lets through together, the first ones first, and a Host."""
    found: Headers = []
    for header in (*wanted, (b"Host", b"127.0.0.1")):
        try:
            # HTTP/1.0, where no Host is owed
            found = list(h11.Request(method="GET", target="/", headers=[*found, header], http_version="1.0").headers)
        except h11.LocalProtocolError:
            continue
    return found


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
            where[dice.choice(ADDED)] = dice.choice(NASTY)
        else:
            where[key] = dice.choice(NASTY)
        break
    return value


def break_file(data: bytes, dice: random.Random) -> bytes:
    """An image file with bytes changed, cut off or added."""
    broken = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        broken[dice.randrange(len(broken))] = dice.randrange(256)
    return bytes(broken[: dice.randrange(1, len(broken) + 1)]) if dice.random() < 0.3 else bytes(broken) + dice.randbytes(dice.randrange(8))


def picture_body(path: str, file: bytes) -> bytes:
    """A request about one image."""
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
    assert engine.active == 0 and app.state.limiter.in_flight == app.state.limiter.held_bytes == 0
    assert app.state.handler.image_loader.held_bytes == 0
    return found


@dataclass
class Service:
    """An app that gets generated requests; at its end, or behind it, is a made-up engine.

    refusals: the statuses above 499 that are answers.
    """

    app: FastAPI
    engine: FakeEngine
    refusals: tuple[int, ...] = ()

    async def prepare(self) -> None:
        """Called before each request."""


class ControllerService(Service):
    """A controller of one worker. Requests may send that worker away or rename its models: it registers again."""

    async def prepare(self) -> None:
        if "fake" not in self.app.state.controller.table.models():
            named = {"worker_name": KNOWN["worker_name"], "check_heart_beat": False, "worker_status": {"model_names": ["fake"]}}
            assert await post(self.app, "/register_worker", json.dumps(named).encode()) == 200


class Nearby(httpx.ASGITransport):
    """Carries a controller's calls to a worker's app, and those to other machines nowhere."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.host in ("127.0.0.1", "::1"), request.url
        return await super().handle_async_request(request)


def no_host(host: str, port: int) -> list[str]:
    raise FetchError("there are no names in tests")


def service_of(name: str) -> Service:
    engine = FakeEngine()
    app = create_worker_app(engine, LIMITS)
    if name == "worker":
        return Service(app, engine)
    return ControllerService(create_controller_app(transport=Nearby(app), resolve=no_host), engine, refusals=(502, 503, 504))


KNOWN = {"model": "fake", "worker_name": "http://127.0.0.1:1"}
"""Put into two thirds of the generated bodies, which would hardly ever name what is there."""
SENSIBLE = {
    "messages": chat_body("a b")["messages"], "prompt": "a b", "input": "a b", "tokens": [97], "images": None, "n": 1,
    "max_tokens": 9, "max_new_tokens": 9, "max_output_tokens": 9,
}  # fmt: skip
"""Put into half of those, too, where they have such a field: rules between fields would refuse nearly all generated ones."""
HEADER_NAMES = (
    "accept", "accept-encoding", "authorization", "connection", "content-encoding", "content-length", "content-type", "cookie", "expect",
    "forwarded", "host", "origin", "range", "transfer-encoding", "upgrade", "via", "x-forwarded-for", "x-request-id",
)  # fmt: skip
HEADER_VALUES = (
    "", "*/*", "*", "0", "-1", "10", "chunked", "gzip", "close", "100-continue", "h2c", "bytes=0-", "Bearer x", "Bearer", "Basic eDp5",
    "null", "http://localhost", "http://evil.example", "http://[::1", "127.0.0.1", "application/json; charset=utf-16", "a=b; c",
    "text/plain", "a" * 70, "a" * 20_000,
)  # fmt: skip


def generated_body(case: Any, known: dict[str, Any]) -> bytes:
    body = case.body
    if isinstance(body, bytes):
        return body
    if type(body).__name__ == "NotSet":
        return b""
    if isinstance(body, dict):
        body = {name: known.get(name, value) for name, value in body.items()}
    return json.dumps(body).encode()


def generated_headers(case: Any, added: list[tuple[str, str]]) -> Headers:
    """Those of the case, among them its media type, after the ones added to it."""
    found = [*added, *(case.headers or {}).items()]
    if case.cookies:
        found.append(("cookie", "; ".join(f"{name}={value}" for name, value in case.cookies.items())))
    if case.media_type and "content-type" not in {name.lower() for name, _ in found}:
        found.append(("content-type", case.media_type))
    return [(name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in found]


def generated_requests(app: FastAPI) -> Any:
    """A strategy: requests that schemathesis generates from the app's document, valid and invalid ones, over all operations.

    Each is a path, a body, and the other arguments of `post`.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import strategies as st
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    strategies = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]
    bodies = [each.as_strategy(generation_mode=mode) for each in operations if each.body for mode in modes]
    name = st.sampled_from(HEADER_NAMES) | st.text(st.characters(max_codepoint=126), min_size=1, max_size=8)
    value = st.sampled_from(HEADER_VALUES) | st.text(st.characters(max_codepoint=255), max_size=30)
    headers = st.just([]) | st.lists(st.tuples(name, value), max_size=3)
    query = st.just("") | st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30)

    def request(case: Any, known: dict[str, Any], added: list[tuple[str, str]], more_query: str) -> tuple[str, bytes, dict[str, Any]]:
        asked = urlencode(case.query or {}, doseq=True) + more_query
        options = {"method": case.method.upper(), "query": asked.encode(), "headers": generated_headers(case, added)}
        return case.formatted_path, generated_body(case, known), options

    return st.builds(request, st.one_of(*strategies, *bodies * 4), st.sampled_from([{}, KNOWN, KNOWN | SENSIBLE]), headers, query)


def send_generated_requests(service: Service, count: int) -> dict[int, int]:
    """Statuses of so many requests, and how often they came."""
    requests = generated_requests(service.app)
    from hypothesis import HealthCheck, Phase, given, settings

    found: dict[int, int] = {}
    bounded = {"max_examples": count, "deadline": None, "database": None, "derandomize": True, "phases": [Phase.generate]}

    async def answer_to(path: str, body: bytes, options: dict[str, Any]) -> int:
        await service.prepare()
        return await post(service.app, path, body, **options)

    @settings(**bounded, suppress_health_check=list(HealthCheck))
    @given(asked=requests)
    def send(asked: tuple[str, bytes, dict[str, Any]]) -> None:
        status = asyncio.run(answer_to(*asked))
        assert status < 500 or status in service.refusals, (status, asked)
        found[status] = found.get(status, 0) + 1

    send()
    assert found[200] > count // 20 and found[400] > count // 10, found  # it came as far as the endpoints
    for path, good in VALID:
        assert asyncio.run(answer_to(path, json.dumps(good).encode(), {})) == 200
    assert service.engine.active == 0 and service.app.state.limiter.in_flight == service.app.state.limiter.held_bytes == 0
    return found


def test_no_random_body_is_a_500() -> None:
    found = send_random_bodies(300, seed=1)
    assert found[200] > 10 and found[400] > 100


@pytest.mark.parametrize("name", ["worker", "controller"])
def test_no_generated_request_is_a_500(name: str) -> None:
    assert sum(send_generated_requests(service_of(name), 100).values()) >= 100


def test_headers_reach_the_app_as_the_servers_parser_leaves_them() -> None:
    refused = [(b"content-length", b"3"), (b"bad name", b"x"), (b"X-B", b"a\r\nb")]
    found = acceptable_headers([(b"Content-Length", b"2"), (b"X-A", b"b"), *refused, (b"Host", b"h")])
    assert found == [(b"content-length", b"2"), (b"x-a", b"b"), (b"host", b"h")]
    assert acceptable_headers([(b"Transfer-Encoding", b"gzip")]) == [(b"host", b"127.0.0.1")]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the broken images


@pytest.mark.slow
def test_no_random_body_of_20_000_is_a_500() -> None:
    found = send_random_bodies(20_000, seed=2)
    assert sum(found.values()) == 20_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker", "controller"])
def test_no_generated_request_of_5_000_is_a_500(name: str) -> None:
    service = service_of(name)
    found = send_generated_requests(service, 5_000)
    assert sum(found.values()) >= 5_000 and found[403] > 0 and found[413] > 0  # headers count: Origin, and their size
    assert len(service.engine.requests) > 50
