"""Connections whose client sends headers slowly, too large, or two requests at once."""

from __future__ import annotations

import time

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http import connections
from tests.serve.fake_engine import FakeEngine
from tests.serve.http.test_middleware import raw_exchange
from tests.serve.running import RunningApp


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


def test_two_requests_on_one_connection_are_both_answered():
    with RunningApp(create_worker_app(FakeEngine())) as running:
        one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = raw_exchange(running.port, one + last)
        assert answer.count(b"HTTP/1.1 200") == 2
