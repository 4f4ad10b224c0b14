"""Bodies on their way in: how slowly one may come, what a client may be sending at once, and what all may hold together."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http import body_limits
from llava.serve.http.asgi import client_of
from llava.serve.http.body_limits import UNMETERED_BYTES, ArrivalDeadline, BodyLimits, LimitBodies, UploadQuota
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError
from tests.serve.bodies import CHAT, chat_body
from tests.serve.fake_backend import HTTP
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import RunningApp, wait_until

KB, MB = 1_000, 1_000_000
FOREVER = 600.0
"""Seconds that no test waits for."""


def ends_at(size: int, pieces: Callable[[int], int], seconds: float = 20.0, rate: float = 20 * KB) -> int | None:
    """The second in which a body is given up; `None` where it comes. pieces: bytes that come in each second."""
    deadline, arrived = ArrivalDeadline(seconds, rate, now=0.0), 0
    for now in range(1, 10_000):
        if now > deadline.deadline:
            return now
        count = min(pieces(now), size - arrived)
        arrived += count
        if arrived == size:
            return None
        deadline.extend(count, float(now))
    raise AssertionError("a body without an end")


@pytest.mark.parametrize(
    ("size", "pieces", "ended"),
    [
        (20 * MB, lambda now: 100 * KB, None),  # a phone: 200 s
        (20 * MB, lambda now: 100 * KB if now % 40 > 15 else 0, None),  # with 15 s of silence in every 40
        (64 * MB, lambda now: 20 * KB, None),  # just at the rate
        (390 * KB, lambda now: 10 * KB, None),  # half the rate, for twice the patience
        (10 * MB, lambda now: 10 * KB, 40),  # each second costs half a one
        (64 * MB, lambda now: 64 * MB - 2 if now == 1 else 0, 22),  # two bytes before the end, however fast it was
        (64 * MB, lambda now: 1, 21),
        (500, lambda now: 0, 21),
        (500, lambda now: 50, None),
    ],
)
def test_a_slow_body_goes_on_and_a_stalled_one_is_ended(size: int, pieces: Callable[[int], int], ended: int | None) -> None:
    assert ends_at(size, pieces) == ended


def test_what_a_client_may_be_sending_at_once() -> None:
    quota, me, other = UploadQuota(max_bytes=90, max_uploads=3), ("10.0.0.1", None), ("10.0.0.2", None)
    with quota.uploading(me, 50):
        assert quota.fits(me, 10, True) and not quota.fits(me, 11, True)  # large ones leave a third
        assert quota.fits(me, 40, False) and not quota.fits(me, 41, False)
        assert quota.fits(other, 1000, True)  # one alone always may
        with quota.uploading(me, 1), quota.uploading(me, 1):
            assert not quota.fits(me, 1, False)  # the fourth
        assert quota.fits(me, 1, False)
    assert quota.fits(me, 1000, True)


def run(
    bounds: BodyLimits, pieces: list[bytes] | Receive, headers: dict[str, str] | None = None, state: dict[str, Any] | None = None
) -> Coroutine[Any, Any, bytes]:
    """Read a body through `LimitBodies`; what the app got."""
    left = list(pieces) if isinstance(pieces, list) else []

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def read() -> bytes:
        found = b""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal found
            while True:
                message = await receive()
                found += message["body"]
                if not message["more_body"]:
                    return

        async def send(message: Message) -> None: ...

        sent = [(name.encode(), value.encode()) for name, value in (headers or {"transfer-encoding": "chunked"}).items()]
        scope = {"type": "http", "path": "/", "headers": sent, "client": ("10.0.0.1", 1), "state": state or {}}
        await LimitBodies(app, bounds)(scope, receive if isinstance(pieces, list) else pieces, send)
        return found

    return read()


def refusal(bounds: BodyLimits, pieces: list[bytes], headers: dict[str, str] | None = None) -> ErrorKind:
    with pytest.raises(ServeError) as refused:
        asyncio.run(run(bounds, pieces, headers))
    return refused.value.kind


def bounds_of(max_bytes: int, budget: int = 10**9, **options: Any) -> BodyLimits:
    return BodyLimits(RequestLimiter(0, budget), max_bytes, **options)


@pytest.mark.parametrize("pieces", [[b"x" * 1000], [b"x"] * 1000, [b"x" * 400, b"", b"x" * 599, b"x"]])
def test_a_body_in_chunks_may_be_as_large_as_any_and_not_a_byte_larger(pieces: list[bytes]) -> None:
    bounds = bounds_of(1000)
    assert asyncio.run(run(bounds, list(pieces))) == b"x" * 1000
    more = [*pieces, b"y", b"z"]
    assert refusal(bounds, more) is ErrorKind.TOO_LARGE
    assert refusal(bounds, [pieces[0] + b"y" * (1001 - len(pieces[0]))]) is ErrorKind.TOO_LARGE
    assert bounds.limiter.held_bytes == 0 and bounds.quota.fits(("10.0.0.1", None), 1, True)


@pytest.mark.parametrize("length", ["1001", "9" * 30, "-1", "+5", "0x5", "1_0", ""])
def test_a_length_that_is_none_or_too_large_is_refused_unread(length: str) -> None:
    async def never() -> Message:
        raise AssertionError("the body was read")

    with pytest.raises(ServeError) as refused:
        asyncio.run(run(bounds_of(1000), never, {"content-length": length}))
    assert refused.value.kind is ErrorKind.TOO_LARGE


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity", "x"])
def test_a_compressed_body_is_refused_by_name_and_unread(encoding: str) -> None:
    app = create_worker_app(FakeEngine())
    with RunningApp(app) as running:
        body = gzip.compress(json.dumps(chat_body()).encode())
        sent = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        told = HTTP.post(running.url + CHAT, content=body, headers=sent)
        assert told.status_code == 415 and told.json()["error"]["code"] == "unsupported_encoding"
        assert "Content-Encoding" in told.json()["error"]["message"] and told.headers["accept-encoding"] == "identity"
        assert app.state.limiter.held_bytes == 0
        assert HTTP.post(running.url + CHAT, json=chat_body(), headers={"Content-Encoding": "identity"}).status_code == 200


def test_a_body_that_has_no_room_in_its_clients_share_waits_unread_until_there_is() -> None:
    async def story() -> None:
        bounds = bounds_of(1000, client_bytes=1500, client_uploads=9, unmetered_bytes=10, seconds=FOREVER)
        last_piece = asyncio.Event()
        reads = 0

        async def stalled() -> Message:
            nonlocal reads
            reads += 1
            if reads == 2:
                await last_piece.wait()
            return {"type": "http.request", "body": b"x" * 450, "more_body": reads == 1}

        first = asyncio.ensure_future(run(bounds, stalled, {"content-length": "900"}))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(run(bounds, [b"y" * 900], {"content-length": "900"}))
        of_another_key = run(bounds, [b"z" * 900], {"content-length": "900"}, {"api_key": 1})
        assert await of_another_key == b"z" * 900
        assert await run(bounds, [b"s" * 10], {"content-length": "10"}) == b"s" * 10  # needs no share
        assert await run(bounds, [b"m" * 50], {"content-length": "50"}) == b"m" * 50  # finds what large ones have to leave
        assert not second.done() and bounds.limiter.held_bytes == 450
        last_piece.set()
        assert await first == b"x" * 900 and await second == b"y" * 900 and bounds.limiter.held_bytes == 0

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_body_for_which_no_room_is_made_in_time_is_refused() -> None:
    async def story() -> None:
        bounds = bounds_of(1000, client_uploads=1, unmetered_bytes=0, seconds=0.2)
        with bounds.quota.uploading(("10.0.0.1", None), 100):
            with pytest.raises(ServeError) as refused:
                await run(bounds, [b"x" * 100], {"content-length": "100"})
        assert refused.value.kind is ErrorKind.OVERLOADED and refused.value.kind.fault.retry_after
        assert await run(bounds, [b"x" * 100], {"content-length": "100"}) == b"x" * 100

    asyncio.run(asyncio.wait_for(story(), 60))


def test_large_bodies_leave_a_quarter_of_the_budget_to_others() -> None:
    bounds = bounds_of(2 * MB, budget=4 * MB)
    bounds.limiter.reserve_bytes(2 * MB)
    assert refusal(bounds, [b"x" * MB, b"x" * (MB // 10)], {"content-length": str(MB + MB // 10)}) is ErrorKind.OVERLOADED
    assert len(asyncio.run(run(bounds, [b"x" * MB], {"content-length": str(MB)}))) == MB
    bounds.limiter.reserve_bytes(2 * MB - 100 * KB)
    small = {"content-length": str(100 * KB)}
    assert len(asyncio.run(run(bounds, [b"x" * 100 * KB], small))) == 100 * KB
    assert refusal(bounds, [b"x" * 101 * KB], {"content-length": str(101 * KB)}) is ErrorKind.OVERLOADED
    assert bounds.limiter.held_bytes == 4 * MB - 100 * KB


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("unix", "unix", True),
    ],
)
def test_who_counts_as_one_client(one: str, other: str, same: bool) -> None:
    def client(host: str, **state: Any) -> Any:
        return client_of({"client": (host, 1), "state": state})

    assert (client(one) == client(other)) is same
    assert client(one, api_key=0) != client(one, api_key=1)
    assert client_of({"client": None}) == ("", None)


def head_of(length: int, key: str) -> bytes:
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Authorization: Bearer {key}",
        f"Content-Length: {length}",
    )
    return "\r\n".join([*lines, "", ""]).encode()


def send_what_is_taken(sock: socket.socket, data: bytes) -> None:
    """Send until everything has gone, or the test has ended."""
    with suppress(OSError):
        sock.sendall(data)


def test_one_clients_stalled_bodies_leave_everybody_their_answers() -> None:
    """Eight largest ones that stop two bytes before their end: once they would have held the whole budget."""
    size = 20 * UNMETERED_BYTES
    app = create_worker_app(FakeEngine(), Limits(max_body_bytes=size, body_seconds=FOREVER), api_keys=("mine", "yours"))
    with RunningApp(app) as running, ExitStack() as stack:
        stalled = head_of(size, "mine") + b'{"a":"' + b"a" * (size - 8)
        for _ in range(8):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=60))
            threading.Thread(target=send_what_is_taken, args=(sock, stalled), daemon=True).start()
        wait_until(lambda: app.state.limiter.held_bytes >= 2 * (size - 2))
        long = chat_body("x" * (UNMETERED_BYTES + KB))  # needs a share, but is not large
        for key in ("mine", "yours"):
            for body in (chat_body(), long):
                told = HTTP.post(running.url + CHAT, json=body, headers={"Authorization": f"Bearer {key}"})
                assert told.status_code == 200, (key, told.text[:200])
        wait_until(lambda: app.state.limiter.held_bytes == 2 * (size - 2))  # the other six wait unread
        image_sized = b'{"a":"' + b"a" * (size - 8) + b'"}'  # of the largest size too
        keyed = {"Authorization": "Bearer yours", "Content-Type": "application/json"}
        assert HTTP.post(running.url + CHAT, content=image_sized, headers=keyed).status_code == 400
    wait_until(lambda: app.state.limiter.held_bytes == 0)


def test_a_stalled_body_is_ended() -> None:
    app = create_worker_app(FakeEngine(), Limits(body_seconds=0.3))
    body = json.dumps(chat_body()).encode()
    with RunningApp(app) as running, socket.create_connection(("127.0.0.1", running.port), timeout=60) as sock:
        sock.sendall(head_of(len(body), "x") + body[:-2])
        assert sock.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("pause", "comes"), [(1.0, True), (19.0, True), (21.0, False)])
def test_time_is_given_back_as_the_bytes_come(monkeypatch: pytest.MonkeyPatch, pause: float, comes: bool) -> None:
    """By a clock of the test's own: a hundred pieces, each after a pause, at five times the least rate."""
    now = 0.0

    @contextmanager
    def fail_after(seconds: float) -> Iterator[None]:
        due = now + seconds
        yield
        if now > due:
            raise TimeoutError

    monkeypatch.setattr(body_limits, "anyio", SimpleNamespace(current_time=lambda: now, fail_after=fail_after))
    left = 100

    async def receive() -> Message:
        nonlocal now, left
        now += pause
        left -= 1
        return {"type": "http.request", "body": b"x" * int(pause * 100), "more_body": left > 0}

    size = {"content-length": str(100 * int(pause * 100))}
    reading = run(bounds_of(10**9, rate=20), receive, size)
    if comes:
        assert len(asyncio.run(reading)) == int(size["content-length"])
    else:
        with pytest.raises(ServeError) as refused:
            asyncio.run(reading)
        assert refused.value.kind is ErrorKind.TIMEOUT and left == 99


@pytest.mark.parametrize(
    ("headers", "size"),
    [
        ([], 0),
        ([(b"transfer-encoding", b"chunked")], 1000),  # nobody knows how large: it has the share and the room of the largest
        ([(b"content-length", b"999")], 999),
        ([(b"content-length", b"1000")], 1000),
        ([(b"content-length", b"1001")], None),
        ([(b"content-length", b"-1")], None),
    ],
)
def test_a_bodys_size_by_its_head(headers: list[tuple[bytes, bytes]], size: int | None) -> None:
    scope = {"type": "http", "headers": headers}
    if size is not None:
        assert body_limits._size_of(scope, 1000) == size
        return
    with pytest.raises(ServeError) as refused:
        body_limits._size_of(scope, 1000)
    assert refused.value.kind is ErrorKind.TOO_LARGE
