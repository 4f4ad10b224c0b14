"""What stands before the endpoints: ids, errors, keys, admission, and bounds on headers, bodies and time."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import time

import httpx
import pytest
from fastapi import FastAPI

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http import connections
from llava.serve.http.errors import FieldError
from llava.serve.http.keys import KeySet, read_secrets
from llava.serve.http.origins import AllowedHosts, is_own_page
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.http.server import INTERRUPTED, make_server, run_program, run_server
from llava.serve.http.strict_json import MAX_JSON_ITEMS, parse_json
from llava.serve.protocol import ErrorKind, Limits, ServeError
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


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b'"\xed\xa0\x80"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[" + b"1," * MAX_JSON_ITEMS + b"1]",
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\n"}',
        b"{} {}",
    ],
)  # fmt: skip
def test_json_is_read_strictly(body):
    with pytest.raises(FieldError) as refused:
        parse_json(body)
    assert refused.value.kind is ErrorKind.INVALID_REQUEST and len(refused.value.detail) < 100


def test_plain_json_is_read():
    assert parse_json(b'{"a": [1, -2.5, "\\ud83d\\ude00", null, true]}') == {"a": [1, -2.5, "\U0001f600", None, True]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Hello \\ud83d", "Hello \ufffd"),
        ("\\uDE00 world", "\ufffd world"),
        ("\\ud83d\\ud83d\\uDe00", "\ufffd\U0001f600"),
        ("\\uDBFF\\uDFFF", "\U0010ffff"),
        ("\\\\ud83d", "\\ud83d"),  # an escaped backslash before plain letters
        ("\\\\\\ud83d", "\\\ufffd"),
        ("\\ud83d\\n", "\ufffd\n"),
    ],
)
def test_half_a_character_is_read_as_the_sign_for_one_that_is_not_known(written, read):
    assert parse_json(f'{{"a": ["{written}"]}}'.encode()) == {"a": [read]}
    assert parse_json(f'{{"{written}": 1}}'.encode()) == {read: 1}


@pytest.mark.parametrize(
    "body", [b'{"\\ud800": 1, "\\ud801": 2}', b'{"a": "\\ud8"}', b'{"a": "\\UD83D"}', b'{"a": \\ud83d}', b'"\xed\xa0\xbd"']
)
def test_half_a_character_lets_no_other_mistake_through(body):
    with pytest.raises(FieldError):
        parse_json(body)


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


def test_every_path_but_health_asks_for_a_key():
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


def test_all_keys_are_compared_in_constant_time_whichever_fits(monkeypatch):
    compared = []

    def recording(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", recording)
    ring = KeySet(("first", "second-much-longer", "third"))
    for given in ("Bearer first", "Bearer third", "Bearer x", "Bearer " + "y" * 9999, "", None):
        compared.clear()
        ring.accepts(given)
        assert compared == [(32, 32)] * 3  # digests of one length: neither the key's length nor its start matters


def test_keys_are_never_logged(caplog):
    app = create_worker_app(FakeEngine(), api_keys=("the-right-key",))
    with caplog.at_level(logging.DEBUG):
        for key in ("the-right-key", "the-wrong-key"):
            call(app, "GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
    assert "metrics" in caplog.text and "-key" not in caplog.text


@pytest.mark.parametrize("key", ["", "a b", "é", "a\n"])
def test_keys_that_no_header_can_carry_are_refused(key):
    with pytest.raises(ValueError, match="API key 2"):
        KeySet(("good", key))


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    assert read_secrets(["zero"], str(file)) == ("zero", "one", "two")
    assert read_secrets(["zero"], None) == ("zero",)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_secrets([], str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        read_secrets([], str(tmp_path))


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


def test_all_bodies_together_are_bounded():
    limiter = RequestLimiter(10, 1000)
    limiter.reserve_bytes(900)
    with pytest.raises(ServeError) as refused:
        limiter.reserve_bytes(101)
    assert refused.value.kind is ErrorKind.OVERLOADED and limiter.held_bytes == 900


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


def test_headers_that_do_not_come_or_are_too_large_end_the_connection(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with RunningApp(create_worker_app(FakeEngine())) as running:
        start = time.monotonic()
        assert raw_exchange(running.port, b"") == b""
        assert raw_exchange(running.port, b"GET /health HTTP/1.1\r\nHo") == b""
        assert time.monotonic() - start < 30
        large = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 20_000 + b"\r\n\r\n"
        assert raw_exchange(running.port, large).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
        many = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n"
        assert raw_exchange(running.port, many).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
        whole = raw_exchange(running.port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert whole.startswith(b"HTTP/1.1 200")


def test_large_headers_in_one_piece_are_refused_too():
    app = create_worker_app(FakeEngine())
    assert call(app, "GET", "/health", headers={"X-Large": "a" * 20_000}).status_code == 413
    assert call(app, "GET", "/health?" + "a" * 20_000).status_code == 413


def test_two_requests_on_one_connection_are_both_answered():
    with RunningApp(create_worker_app(FakeEngine())) as running:
        one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = raw_exchange(running.port, one + last)
        assert answer.count(b"HTTP/1.1 200") == 2


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


def test_choices_take_places_of_their_own():
    app = create_worker_app(FakeEngine(), Limits(max_queue=0), concurrency=2)
    assert call(app, "POST", CHAT, json=chat_body(n=2)).status_code == 200
    with app.state.limiter.admit():
        full = call(app, "POST", CHAT, json=chat_body(n=2))
    assert full.status_code == 503 and full.headers["retry-after"] == "1"
    assert app.state.limiter.in_flight == 0


def test_more_choices_than_all_places_are_refused_for_good():
    app = create_worker_app(FakeEngine(), Limits(max_queue=0), concurrency=2)
    for stream in (False, True):
        refused = call(app, "POST", CHAT, json=chat_body(n=3, stream=stream))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request", "n")
        assert "n is 3" in error["message"] and "at most 2" in error["message"] and "retry-after" not in refused.headers
    assert app.state.limiter.in_flight == 0


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
def test_head_is_answered_as_get_without_a_body(path):
    with RunningApp(create_worker_app(FakeEngine())) as running:
        answer = raw_exchange(running.port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and body == b""


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"origin": "http://chat.example.org"}, True),
        ({"origin": "https://Chat.Example.org:8443"}, True),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"origin": "http://localhost:3000"}, True),
        ({"origin": "https://mine.example"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://chat.example.org.evil.example"}, False),
        ({"origin": "http://mine.example.evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://[::1"}, False),
        ({"origin": "http://evil.example", "host": "[::1"}, False),
        ({"origin": "null", "host": ""}, False),
    ],
)
def test_a_page_is_our_own_by_its_origin(headers, is_own):
    sent = {"host": "chat.example.org", **headers}
    scope = {"headers": [(name.encode(), value.encode()) for name, value in sent.items()]}
    assert is_own_page(scope, ("mine.example",)) is is_own


def test_a_draining_gate_lets_nobody_in_but_those_inside_finish():
    limiter = RequestLimiter(5, 0)
    with limiter.admit():
        limiter.start_draining()
        with pytest.raises(ServeError) as refused, limiter.admit():
            pass
        assert refused.value.kind is ErrorKind.DRAINING
        with limiter.admit_more(2):
            assert limiter.in_flight == 3
    assert limiter.in_flight == 0
    asyncio.run(asyncio.wait_for(limiter.finish(), 60))


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


def test_a_signal_drains_and_leaves_no_handler_behind():
    done = []

    async def drain():
        done.append("drained")

    app = FastAPI()
    app.state.drain = drain
    before = signal.getsignal(signal.SIGTERM)
    server = make_server(app, "127.0.0.1", 0, log_level="warning", on_started=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_server(server) == 0 and done == ["drained"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_finish_is_left_after_its_time_or_at_the_second_signal(signals):
    def press():
        for _ in range(signals):
            server.stop()

    app = FastAPI()
    app.state.drain = asyncio.Event().wait
    server = make_server(app, "127.0.0.1", 0, log_level="error", drain_seconds=0.3 if signals == 1 else 60, on_started=press)
    start = time.monotonic()
    assert run_server(server) == 0 and time.monotonic() - start < 30


def test_ctrl_c_before_the_server_runs_is_a_status_and_no_traceback(monkeypatch):
    def main():
        app = FastAPI()
        app.state.drain = asyncio.Event().wait
        server = make_server(app, "127.0.0.1", 0)
        monkeypatch.setattr(server, "run", lambda: pytest.fail("it runs although it was interrupted"))
        return run_server(server)

    monkeypatch.setattr("gc.collect", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr("gc.freeze", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_program(main) == INTERRUPTED == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert run_program(lambda: 1) == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.0.2.7", 200),
        ("localhost", 200),
        ("LOCALHOST.:8000", 200),
        ("chat.localhost:8000", 200),
        ("mine.example", 200),
        ("Mine.Example.:80", 200),
        ("rebound.example", 403),
        ("mine.example.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("notlocalhost", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_only_names_that_nobody_else_can_point_here_are_answered(host, status):
    app = AllowedHosts(create_worker_app(FakeEngine()), ("mine.example",))
    assert call(app, "GET", "/health", headers={"Host": host}).status_code == status


def test_a_server_whose_engine_has_failed_for_good_ends_with_status_1():
    app, broken = create_worker_app(FakeEngine()), []
    app.state.failed = lambda: bool(broken)
    assert run_server(make_server(app, "127.0.0.1", 0, log_level="error", on_started=lambda: broken.append(1))) == 1
