"""A whole worker over a made-up engine: both protocols, images, faults, clients that leave, registration, and its end."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from contextlib import AsyncExitStack
from dataclasses import replace
from io import BytesIO

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from llava import fetch as fetching
from llava import images as images_page
from llava.fetch import AddressError, FetchError, TooLargeError
from llava.serve.api import image_loader
from llava.serve.api.image_loader import (
    FETCH_ERROR_TEXTS,
    NO_IMAGE_THERE,
    NOT_FETCHED,
    NOT_READ,
    REQUEST_SHARE,
    TOO_MUCH,
    HostNotAllowed,
    ImageLoader,
)
from llava.serve.api.parsed_request import ImageSource
from llava.serve.api.worker_app import create_worker_app, run_worker
from llava.serve.cluster.registration import Registration
from llava.serve.http.middleware import guard_app
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import EngineImage, EngineStats, ErrorKind, Limits, ServeError
from tests.serve import fake_engine
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine
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


# images


def encoded(image: Image.Image, file_format: str, **options) -> str:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return data_url(base64.b64encode(buffer.getvalue()).decode())


def odd_images():
    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    palette = Image.new("P", (9, 7))
    return {
        "1x1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1"),
        "1x200": (encoded(Image.new("RGB", (1, 200)), "PNG"), "1x200"),
        "cmyk": (encoded(Image.new("CMYK", (9, 7)), "JPEG"), "9x7"),
        "16 bit": (encoded(Image.new("I;16", (9, 7)), "PNG"), "9x7"),
        "palette": (encoded(palette, "PNG", transparency=0), "9x7"),
        "alpha": (encoded(Image.new("LA", (9, 7)), "PNG"), "9x7"),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "9x7"),
        "turned": (encoded(Image.new("RGB", (9, 7)), "JPEG", exif=exif), "7x9"),
    }


@pytest.mark.parametrize("name", sorted(odd_images()))
def test_odd_images_are_read(name):
    url, size = odd_images()[name]
    response = ask(FakeEngine(), "q", (url,))
    assert response.json()["choices"][0]["message"]["content"].endswith(f"[{size}]")


def png_header(width: int, height: int) -> str:
    """A PNG that says it is so large; nothing follows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return data_url(base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk + b"\0" * 200).decode())


BAD_IMAGES = {
    "no bytes": "data:image/png;base64,",
    "no base64": "data:image/png;base64,!!!!",
    "no image": "data:image/png;base64,AAAA",
    "text": "data:text/plain;base64,AAAA",
    "plain": "data:image/png,AAAA",
    "bomb": png_header(60_000, 60_000),
    "zero": png_header(0, 10),
    "thin": encoded(Image.new("RGB", (1, 201)), "PNG"),
    "cut": encoded(Image.effect_noise((64, 64), 50), "PNG")[:-400],
    "float": encoded(Image.new("F", (9, 7)), "TIFF"),
    "svg": data_url(base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()),
    "eps": data_url(base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()),
    "path": "/etc/passwd",
    "file": "file:///etc/passwd",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "local": "http://127.0.0.1:1/x.png",
    "octal": "http://0177.0.0.1/x.png",
    "decimal": "http://2130706433/x.png",
    "six": "http://[::1]/x.png",
    "public": "https://example.com/x.png",
    "ftp": "ftp://example.com/x.png",
    "gopher": "gopher://127.0.0.1:6379/_x",
}


@pytest.mark.parametrize("name", sorted(BAD_IMAGES))
def test_bad_images_have_one_constant_answer(name, no_connections):
    engine = FakeEngine()
    response = ask(engine, "q", (BAD_IMAGES[name],))
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_image"
    assert response.json()["error"]["message"] == told_of(BAD_IMAGES[name])
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert engine.requests == [] and no_connections == []


def told_of(url: str) -> str:
    """The sentence about an image that cannot be used: it depends on what kind of address that has, and on nothing else."""
    if url.startswith(("http://", "https://")):
        return NOT_FETCHED
    return ErrorKind.INVALID_IMAGE.fault.text if url.startswith("data:") else NOT_READ


@pytest.mark.parametrize("told", [False, True])
def test_whether_an_image_was_seen_before_is_told_only_where_the_operator_wants_it(monkeypatch, told):
    real = fake_engine.report_of
    monkeypatch.setattr(fake_engine, "report_of", lambda request: tuple(replace(each, cached=True) for each in real(request)))
    app = create_worker_app(FakeEngine(), report_cache_hits=told)
    url = data_url(picture())
    chat = call(app, "POST", CHAT, json=chat_body("q", (url,))).json()
    stream = call(app, "POST", CHAT, json=chat_body("q", (url,), stream=True)).text
    parts = call(app, "POST", WORKER, json=worker_body("<image> q", images=[picture()])).text
    assert chat["avg_llava"]["images"][0]["cached"] is (True if told else None)
    for text in (stream, parts):
        assert ('"cached":true' in text) is told and ('"cached":null' in text) is not told


@pytest.mark.parametrize("source", ["file:///etc/passwd", "FILE:/etc/hostname", "file:nowhere.png"])
def test_files_are_not_read_by_llavas_protocol_either(source):
    response = call(create_worker_app(FakeEngine()), "POST", WORKER, json=worker_body("<image> q", images=[source]))
    assert response.status_code == 400 and response.json()["text"].startswith(NOT_READ)
    assert response.json()["error"]["param"] == "images[0]"
    assert "etc" not in response.text and "nowhere" not in response.text


@pytest.fixture
def no_connections(monkeypatch):
    """Records every attempt to resolve or connect in place of doing it."""
    attempts: list[tuple] = []

    def refuse(*args, **options):
        attempts.append(args)
        raise OSError("no connections in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def test_text_is_never_searched_for_addresses(no_connections):
    text = "http://169.254.169.254/x.png ![](http://10.0.0.1/a.png) <img src='http://localhost/x'> data:image/png;base64,AAAA"
    for allowed in (False, True):
        response = ask(FakeEngine(), text, limits=Limits(allow_remote_images=allowed))
        assert response.status_code == 200 and response.json()["avg_llava"]["images"] == []
    assert no_connections == []


class Network:
    """A table in place of the network: names to addresses, and what each address answers; every connection is written down."""

    def __init__(self, monkeypatch, names: dict[str, list[str]], answers: dict[str, bytes]) -> None:
        self.names, self.answers = names, answers
        self.resolved: list[str] = []
        self.connected: list[str] = []
        self.far_ends: list[socket.socket] = []
        monkeypatch.setattr(image_loader, "resolve_host", self.resolve)

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        literal = fetching.literal_address(host)
        return [str(literal)] if literal is not None else self.names.get(host, [])

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        self.connected.append(address)
        ours, theirs = socket.socketpair()
        theirs.sendall(self.answers[address])
        theirs.shutdown(socket.SHUT_WR)
        self.far_ends.append(theirs)
        return ours

    def fetch(self, url: str, resolve) -> bytes:
        return fetching.fetch(url, max_bytes=1_000_000, timeout=2.0, resolve=resolve, connect=self.connect)

    def ask(self, url: str, hosts: tuple[str, ...] = ()) -> httpx.Response:
        limits = Limits(allow_remote_images=True, allowed_hosts=hosts)
        engine = FakeEngine()
        app = create_worker_app(engine, limits, image_loader=ImageLoader(limits, engine.prepare_image, fetch_bytes=self.fetch))
        return call(app, "POST", CHAT, json=chat_body("q", (url,)))


def http_answer(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_remote_image_comes_from_the_address_that_was_checked(monkeypatch, no_connections):
    network = Network(monkeypatch, {"pictures.example": ["93.184.216.34"]}, {"93.184.216.34": http_answer(base64.b64decode(picture()))})
    assert network.ask("http://pictures.example/a.png").json()["choices"][0]["message"]["content"].endswith("[30x20]")
    assert network.resolved == ["pictures.example"] and network.connected == ["93.184.216.34"] and no_connections == []


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest", "http://127.0.0.1/x", "http://[::1]/x", "http://10.1.2.3/x", "http://2130706433/x",
        "http://0177.0.0.1/x", "http://0x7f.1/x", "http://[::ffff:127.0.0.1]/x", "http://inside.example/x", "http://both.example/x",
        "http://user@inside.example/x", "http://pictures.example\\@127.0.0.1/x", "http://pictures.example:0/", "http://nobody.example/x",
    ],
)  # fmt: skip
def test_remote_images_from_private_addresses_are_refused(monkeypatch, no_connections, url):
    names = {"inside.example": ["10.0.0.5"], "both.example": ["93.184.216.34", "127.0.0.1"], "pictures.example": ["93.184.216.34"]}
    network = Network(monkeypatch, names, {})
    response = network.ask(url)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "invalid_image" and error["param"] == "messages[0].content[0].image_url.url"
    assert error["message"] == FETCH_ERROR_TEXTS[AddressError if any(mark in url for mark in ("@", "\\", ":0/")) else FetchError]
    assert network.connected == [] and no_connections == []


def test_what_lies_behind_the_server_cannot_be_told_from_its_answers(monkeypatch):
    """Addresses that are refused, that nothing answers at, or something else than a file, are one and the same to a client."""
    names = {"inside": "10.0.0.5", "down": "93.184.216.1", "error": "93.184.216.2", "cut": "93.184.216.3"}
    answers = {
        names["error"]: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        names["cut"]: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    }
    network = Network(monkeypatch, {f"{name}.example": [address] for name, address in names.items()}, answers)
    connect = network.connect
    monkeypatch.setattr(network, "connect", lambda address, *more: connect(address, *more) if address in answers else unreachable())
    hosts = ("inside.example", "nobody.example", "127.0.0.1:22", "down.example", "error.example", "cut.example")
    bodies = [network.ask(f"http://{host}/x").json()["error"] for host in hosts]
    assert [{**body, "request_id": ""} for body in bodies] == [{**bodies[0], "request_id": ""}] * len(hosts)
    assert bodies[0]["message"] == FETCH_ERROR_TEXTS[FetchError] and "10.0" not in str(bodies)


def unreachable():
    raise OSError(111, "refused")


def test_a_file_at_a_public_address_that_is_no_image_or_too_large_says_so(monkeypatch):
    network = Network(monkeypatch, {"a.example": ["93.184.216.1"]}, {"93.184.216.1": http_answer(b"<html>")})
    assert network.ask("http://a.example/").json()["error"]["message"] == NO_IMAGE_THERE
    network.answers["93.184.216.1"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n"
    assert network.ask("http://a.example/").json()["error"]["message"] == FETCH_ERROR_TEXTS[TooLargeError]
    assert network.ask("http://b.example/", ("a.example",)).json()["error"]["message"] == FETCH_ERROR_TEXTS[HostNotAllowed]


def test_each_redirect_passes_the_same_door(monkeypatch):
    whole = http_answer(base64.b64decode(picture()))
    names = {"a.example": ["93.184.216.1"], "b.example": ["93.184.216.2"]}
    answers = {"93.184.216.1": redirect("http://b.example/x"), "93.184.216.2": whole}
    network = Network(monkeypatch, names, answers)
    assert network.ask("http://a.example/").status_code == 200 and network.connected == ["93.184.216.1", "93.184.216.2"]
    network.connected.clear()
    assert network.ask("http://a.example/", ("A.example.",)).status_code == 400 and network.connected == ["93.184.216.1"]
    network.connected.clear()
    network.answers["93.184.216.1"] = redirect("http://127.0.0.1:8080/admin")
    assert network.ask("http://a.example/").status_code == 400 and network.connected == ["93.184.216.1"]


def test_hosts_that_are_not_allowed_are_not_even_resolved(monkeypatch):
    network = Network(monkeypatch, {}, {})
    assert network.ask("http://secrets.evil.example/x", ("good.example",)).status_code == 400
    assert network.resolved == [] and network.connected == []


def source(image: str, place: int = 0) -> ImageSource:
    return ImageSource(data_url(image), f"images[{place}]")


def test_what_is_kept_of_all_requests_images_is_bounded_and_one_request_gets_a_share():
    async def load():
        loader = ImageLoader(Limits(), FakeEngine().prepare_image, max_held_bytes=600 * REQUEST_SHARE)
        async with AsyncExitStack() as stack:
            for _ in range(REQUEST_SHARE):
                await stack.enter_async_context(loader.loaded([source(picture((30, 20)))]))
            with pytest.raises(ServeError) as refused:
                async with loader.loaded([source(picture((30, 20)))]):
                    pass
            assert refused.value.kind is ErrorKind.OVERLOADED and loader.held_bytes == 600 * REQUEST_SHARE
        with pytest.raises(ServeError) as refused:
            async with loader.loaded([source(picture((30, 20))), source(picture((1, 1)), 1)]):
                pass
        assert (refused.value.kind, refused.value.detail, refused.value.param) == (ErrorKind.TOO_LARGE, TOO_MUCH, "images[1]")
        assert loader.held_bytes == 0
        loader.close()

    asyncio.run(load())


def test_large_images_are_taken_one_after_the_other_in_turn_and_small_ones_pass_them(monkeypatch):
    monkeypatch.setattr(images_page, "SMALL_PIXELS", 100)
    begun, running, most, go_on = [], 0, 0, threading.Event()

    def prepare(image):
        nonlocal running, most
        begun.append(image.size)
        if image.width * image.height > 100:
            running += 1
            most = max(most, running)
            go_on.wait(10)
            running -= 1
        return EngineImage(image.size, None)

    async def load():
        loader = ImageLoader(Limits(), prepare)

        async def ask(*sizes):
            async with loader.loaded([source(picture(size)) for size in sizes]) as images:
                return [image.size for image in images]

        greedy = asyncio.create_task(ask(*[(20, 10 + place) for place in range(4)]))
        while not begun:
            await asyncio.sleep(0.01)
        other = asyncio.create_task(ask((30, 30)))
        small = [await asyncio.wait_for(ask((3, 3)), 5) for _ in range(5)]  # while a large one is being taken
        assert small == [[(3, 3)]] * 5 and not greedy.done() and not other.done()
        go_on.set()
        assert await greedy == [(20, 10), (20, 11), (20, 12), (20, 13)] and await other == [(30, 30)]
        loader.close()

    asyncio.run(load())
    large = [size for size in begun if size != (3, 3)]
    assert most == 1 and large.index((30, 30)) <= 2  # behind the one that was there, and at most one more that came meanwhile


def test_an_image_that_the_engine_refuses_is_named():
    def prepare(image):
        raise ServeError(ErrorKind.INVALID_REQUEST, "This model takes no images.")

    async def load():
        loader = ImageLoader(Limits(), prepare)
        with pytest.raises(ServeError, match="takes no images") as refused:
            async with loader.loaded([source(picture((3, 3)), 5)]):
                pass
        assert (refused.value.kind, refused.value.param) == (ErrorKind.INVALID_REQUEST, "images[5]")
        loader.close()

    asyncio.run(load())


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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


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
    assert engine.closed and time.monotonic() - begun < 5


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


# registration


class Controller:
    """A controller that writes down who registers; `known` is what it remembers."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.registered: list[dict] = []
        self.beats: list[dict] = []
        self.left: list[dict] = []
        self.shown: set[str | None] = set()
        self.refuse = False
        self.app = FastAPI()
        guard_app(self.app, RequestLimiter(10, 10**6), Limits())
        self.app.post("/register_worker")(self.register)
        self.app.post("/receive_heart_beat")(self.beat)
        self.app.post("/unregister_worker")(self.leave)

    async def register(self, request: Request):
        if self.refuse:
            raise ServeError(ErrorKind.FORBIDDEN)
        body = await request.json()
        self.registered.append(body)
        self.shown.add(request.headers.get("authorization"))
        self.known.add(body["worker_name"])

    async def beat(self, request: Request):
        body = await request.json()
        self.beats.append(body)
        self.shown.add(request.headers.get("authorization"))
        return JSONResponse({"exist": body["worker_name"] in self.known})

    async def leave(self, request: Request):
        self.left.append(await request.json())
        self.shown.add(request.headers.get("authorization"))
        return JSONResponse({"exist": True})


def test_a_worker_registers_and_comes_back_when_it_is_forgotten():
    controller = Controller()
    with RunningApp(controller.app) as there:
        registration = Registration(there.url, "http://worker:1", "token", interval=0.05)
        with RunningApp(create_worker_app(FakeEngine(), registration=registration)):
            wait_until(lambda: len(controller.beats) >= 2)
            assert controller.registered == [
                {
                    "worker_name": "http://worker:1",
                    "check_heart_beat": True,
                    "worker_status": {"model_names": ["fake"], "speed": 1, "queue_length": 0},
                }
            ]
            assert controller.beats[0] == {"worker_name": "http://worker:1", "queue_length": 0}
            controller.known.clear()
            wait_until(lambda: len(controller.registered) == 2)
        assert controller.left == [{"worker_name": "http://worker:1"}]
        assert controller.shown == {"Bearer token"}  # in the head, where it is judged before a body is taken
        count = len(controller.beats)
        time.sleep(0.2)
        assert len(controller.beats) == count  # a worker that has ended sends no more


def test_a_worker_takes_its_leave_when_it_begins_to_drain_and_still_finishes():
    controller, engine = Controller(), FakeEngine(piece_delay=0.2)
    with RunningApp(controller.app) as there:
        registration = Registration(there.url, "http://worker:1", interval=30)
        app = create_worker_app(engine, registration=registration)
        with RunningApp(app) as worker:
            wait_until(lambda: len(controller.registered) == 1)
            with httpx.stream("POST", worker.url + CHAT, json=chat_body(stream=True), trust_env=False) as answer:
                lines = answer.iter_lines()
                next(lines)
                worker.server.servers[0].get_loop().call_soon_threadsafe(app.state.limiter.start_draining)
                wait_until(lambda: len(controller.left) == 1, 5)
                assert "[DONE]" in "".join(lines)


def test_a_controller_that_knows_no_good_bye_is_no_hindrance():
    controller = Controller()
    controller.app.router.routes = [route for route in controller.app.router.routes if "unregister" not in route.path]
    with RunningApp(controller.app) as there:
        with RunningApp(create_worker_app(FakeEngine(), registration=Registration(there.url, "http://worker:1"))):
            wait_until(lambda: len(controller.registered) == 1)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5


def test_a_worker_serves_while_no_controller_is_there_and_finds_it_later():
    port = free_port()
    registration = Registration(f"http://127.0.0.1:{port}", "http://worker:1", interval=0.05)
    with RunningApp(create_worker_app(FakeEngine(), registration=registration)) as worker:
        assert httpx.post(worker.url + CHAT, json=chat_body(), trust_env=False).status_code == 200
        controller = Controller()
        controller.refuse = True
        with RunningApp(controller.app, port=port):
            time.sleep(0.2)
            assert controller.registered == [] and httpx.get(f"{worker.url}/ready", trust_env=False).status_code == 200
            controller.refuse = False
            wait_until(lambda: len(controller.registered) == 1)
            assert "token" not in controller.registered[0]
        time.sleep(0.2)
        again = Controller()
        with RunningApp(again.app, port=port):
            wait_until(lambda: len(again.registered) == 1 and len(again.beats) >= 2)


def test_the_document_describes_both_protocols():
    document = call(create_worker_app(FakeEngine(), api_keys=("k",)), "GET", "/openapi.json", headers={"Authorization": "Bearer k"}).json()
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "WorkerRequest", "ErrorBody", "ImagePart"} <= schemas.keys()
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert {"granularity", "max_visual_tokens", "granularity_bias"} <= schemas["ChatRequest"]["properties"].keys()
    for path in (CHAT, WORKER):
        assert "$ref" in document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert document["security"] == [{"key": []}]
