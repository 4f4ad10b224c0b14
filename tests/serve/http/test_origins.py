"""Which web pages and host names are answered."""

from __future__ import annotations

import pytest

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.origins import AllowedHosts, is_own_page
from tests.serve.fake_engine import FakeEngine
from tests.serve.http.test_middleware import call


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
