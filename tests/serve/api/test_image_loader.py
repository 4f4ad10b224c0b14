"""Images as clients send them: odd and broken ones, web addresses, memory, and large ones that take turns."""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
import threading
import zlib
from contextlib import AsyncExitStack
from dataclasses import replace
from io import BytesIO

import httpx
import pytest
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
from llava.serve.api.worker_app import create_worker_app
from llava.serve.protocol import EngineImage, ErrorKind, Limits, ServeError
from tests.serve import fake_engine
from tests.serve.api.test_worker_app import ask, call
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine


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


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_the_log_has_the_details_of_a_refused_image_under_the_request_id(caplog, path):
    caplog.set_level("INFO", "llava.serve.api.image_loader")
    headers = {"X-Request-Id": "mine-7"}
    call(create_worker_app(FakeEngine()), "POST", path, headers=headers, json=chat_body("q", ("data:image/png;base64,AAAA",)))
    [line] = [record.getMessage() for record in caplog.records if record.name == "llava.serve.api.image_loader"]
    assert line.startswith("request mine-7: its image in messages[0].content[0].image_url.url is refused: ")


def source(image: str, place: int = 0) -> ImageSource:
    return ImageSource(data_url(image), f"images[{place}]")


def test_what_is_kept_of_all_requests_images_is_bounded_and_one_request_gets_a_share():
    async def load():
        loader = ImageLoader(Limits(), FakeEngine().prepare_image, max_held_bytes=600 * REQUEST_SHARE)
        async with AsyncExitStack() as stack:
            for _ in range(REQUEST_SHARE):
                await stack.enter_async_context(loader.loaded([source(picture((30, 20)))], "mine"))
            with pytest.raises(ServeError) as refused:
                async with loader.loaded([source(picture((30, 20)))], "mine"):
                    pass
            assert refused.value.kind is ErrorKind.OVERLOADED and loader.held_bytes == 600 * REQUEST_SHARE
        with pytest.raises(ServeError) as refused:
            async with loader.loaded([source(picture((30, 20))), source(picture((1, 1)), 1)], "mine"):
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
            async with loader.loaded([source(picture(size)) for size in sizes], "mine") as images:
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
            async with loader.loaded([source(picture((3, 3)), 5)], "mine"):
                pass
        assert (refused.value.kind, refused.value.param) == (ErrorKind.INVALID_REQUEST, "images[5]")
        loader.close()

    asyncio.run(load())
