"""The middleware: ids, errors, keys, a full server, and limits on headers, bodies and time."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time

import httpx
import pytest

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http import connections
from llava.serve.protocol import ErrorKind, Limits
from tests.serve.bodies import CHAT, WORKER, chat_body, worker_body
from tests.serve.fake_backend import HTTP
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import RunningApp, wait_until


def call(app, method, path, **options):
    """One request to an app without a socket."""

    async def send():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def raw_exchange(port: int, data: bytes, seconds: float = 60.0) -> bytes:
    """Send bytes; everything that comes back until the server closes or `seconds` pass."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(data)
        received = b""
        try:
            while part := sock.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
        return received


@pytest.mark.parametrize("path", [CHAT, WORKER])
@pytest.mark.parametrize("body", [b'{"model": NaN}', b"[" * 100_000, b"\xff\xfe", b"null", b""])
def test_a_broken_body_is_the_clients_fault(path, body):
    response = call(create_worker_app(FakeEngine()), "POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_request"


def test_only_json_is_taken():
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = call(create_worker_app(FakeEngine()), "POST", CHAT, content=b"{}", headers={"content-type": content_type})
        assert response.status_code == 400 and "application/json" in response.json()["error"]["message"]


def test_ids_are_kept_where_they_are_safe():
    app = create_worker_app(FakeEngine())
    assert call(app, "GET", "/health", headers={"X-Request-Id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for bad in ("x" * 65, "a b", "<script>", "", "é".encode("latin-1")):
        given = call(app, "GET", "/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert len(given) == 32 and given != bad
    refused = call(app, "POST", CHAT, json={}, headers={"X-Request-Id": "mine"})
    assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"] == "mine"


def test_nothing_about_an_inner_failure_leaves_the_log(caplog):
    app = create_worker_app(FakeEngine(failure=RuntimeError("tensor at 0x7f00dead")))
    with caplog.at_level(logging.ERROR, "llava"):
        response = call(app, "POST", CHAT, json=chat_body())
    assert response.status_code == 500 and "0x7f00dead" not in response.text
    assert response.json()["error"]["message"] == ErrorKind.INTERNAL.fault.text
    assert response.json()["error"]["request_id"] in caplog.text and "0x7f00dead" in caplog.text


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_and_addresses_have_constant_answers(method):
    app = create_worker_app(FakeEngine())
    wrong = call(app, method, CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["error"]["code"] == "invalid_request"
    missing = call(app, method, "/v1/<b>secret</b>%0a")
    assert missing.status_code == 404 and "secret" not in missing.text


def test_every_path_but_health_requires_a_key():
    app = create_worker_app(FakeEngine(), api_keys=("right-1", "right-2"))
    read = ("/ready", "/metrics", "/v1/models", "/openapi.json", "/nothing", "/health/", "//health", "/health/../metrics")
    for method, path in [*(("GET", path) for path in read), *(("POST", path) for path in (CHAT, WORKER, "/worker_get_status"))]:
        assert call(app, method, path).status_code == 401, path
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "GET", "/docs").status_code == 401
    for key, status in (("right-1", 200), ("right-2", 200), ("right-3", 401), ("right-1 ", 200), ("", 401), ("é", 401)):
        headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
        assert call(app, "GET", "/metrics", headers=headers).status_code == status, key
    for value in ("right-1", "Basic right-1", "Bearer", "Bearer right-1 right-2"):
        refused = call(app, "GET", "/metrics", headers={"Authorization": value})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_open_prefixes_are_whole_folders():
    app = create_worker_app(FakeEngine(), api_keys=("right",), open_prefixes=("/page",))
    assert call(app, "GET", "/page/x").status_code == 404 and call(app, "GET", "/page").status_code == 404
    assert call(app, "GET", "/pages").status_code == 401 and call(app, "GET", "/v1/models").status_code == 401


def test_keys_are_never_logged(caplog):
    app = create_worker_app(FakeEngine(), api_keys=("the-right-key",))
    with caplog.at_level(logging.DEBUG):
        for key in ("the-right-key", "the-wrong-key"):
            call(app, "GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
    assert "metrics" in caplog.text and "-key" not in caplog.text


def test_a_body_that_says_it_is_too_large_is_not_read():
    app = create_worker_app(FakeEngine(), Limits(max_body_bytes=1000))
    with RunningApp(app) as running:
        for length in ("1001", "9" * 30):
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", running.port), timeout=60) as sock:
                sock.sendall(head.encode())
                assert sock.recv(65536).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_body_that_grows_too_large_is_cut_off():
    async def endless():
        for _ in range(100):
            yield b"x" * 100

    for path in (CHAT, WORKER):
        app = create_worker_app(FakeEngine(), Limits(max_body_bytes=1000))
        response = call(app, "POST", path, content=endless(), headers={"content-type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
        assert app.state.limiter.held_bytes == app.state.limiter.in_flight == 0


def test_a_body_that_does_not_come_times_out(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    app = create_worker_app(FakeEngine(), Limits(body_seconds=0.2))
    with RunningApp(app) as running:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n" + "{"
        start = time.monotonic()
        answer = raw_exchange(running.port, head.encode())
        assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer
        assert time.monotonic() - start < 30  # and the connection was closed, although the client never finished
        wait_until(lambda: app.state.limiter.in_flight == 0)


def test_large_headers_in_one_piece_are_refused_too():
    app = create_worker_app(FakeEngine())
    assert call(app, "GET", "/health", headers={"X-Large": "a" * 20_000}).status_code == 413
    assert call(app, "GET", "/health?" + "a" * 20_000).status_code == 413


@pytest.mark.parametrize("path", [CHAT, WORKER])
def test_a_full_server_says_so_before_the_body_comes(path):
    engine = FakeEngine(start_delay=60)
    app = create_worker_app(engine, Limits(max_queue=1), concurrency=1)
    with RunningApp(app) as running:
        held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(2)]
        body = json.dumps(chat_body()).encode()
        whole = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        for sock in held:
            sock.sendall(whole)
        wait_until(lambda: app.state.limiter.in_flight == 2)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as sock:
            sock.sendall(head)  # and not one byte of the body
            answer = b""
            while b"request_id" not in answer:
                answer += sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer.lower() and b"overloaded" in answer
        assert HTTP.get(f"{running.url}/health").status_code == 200
        for sock in held:
            sock.close()
        wait_until(lambda: app.state.limiter.in_flight == 0 and len(engine.cancelled) == 2)
        engine.start_delay = 0
        post = HTTP.post(f"{running.url}{CHAT}", json=chat_body())
        assert post.status_code == 200


def test_refusing_takes_less_than_50_milliseconds():
    app = create_worker_app(FakeEngine(start_delay=60), Limits(max_queue=0), concurrency=1)

    async def measure():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            first = asyncio.create_task(client.post(CHAT, json=chat_body()))
            while not app.state.limiter.in_flight:
                await asyncio.sleep(0.01)
            took = []
            for _ in range(20):
                start = time.perf_counter()
                response = await client.post(WORKER, json=worker_body())
                took.append(time.perf_counter() - start)
                assert response.status_code == 503 and response.headers["retry-after"] == "1"
                assert response.json()["error_code"] == 20 and response.json()["text"].startswith("The server is at capacity")
            first.cancel()
            return sorted(took)[10]

    assert asyncio.run(measure()) < 0.05


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
def test_head_is_answered_as_get_without_a_body(path):
    with RunningApp(create_worker_app(FakeEngine())) as running:
        answer = raw_exchange(running.port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and body == b""


def test_websockets_are_closed():
    sent = []

    async def run():
        app = create_worker_app(FakeEngine())

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await app({"type": "websocket", "path": "/v1/models", "headers": [], "app": app}, receive, send)

    asyncio.run(run())
    assert sent == [{"type": "websocket.close", "code": 1008}]
