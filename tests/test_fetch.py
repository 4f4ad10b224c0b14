"""Fetching from web addresses: redirects and addresses in disguise. What pictures need of it stands in `test_images.py`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from llava import fetch as fetch_module
from llava.fetch import FetchError, fetch, is_public_address


class Scripted:
    """Public hosts that answer with these answers, one per connection; TLS is left out."""

    def __init__(self, stack: ExitStack, *answers: bytes) -> None:
        self.stack, self.answers = stack, list(answers)
        self.ports: list[int] = []

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        self.ports.append(port)
        ours, theirs = socket.socketpair()
        self.stack.enter_context(theirs)
        theirs.sendall(self.answers.pop(0))
        theirs.shutdown(socket.SHUT_WR)
        return ours

    def fetch(self, url: str) -> bytes:
        return fetch(url, max_bytes=1000, resolve=lambda host, port: ["8.8.8.8"], connect=self.connect)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(fetch_module, "_secure", lambda sock, host, deadline: sock)
    with ExitStack() as stack:
        yield stack


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


FOUND = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    "location", ["http://b.example/x", "HTTP://b.example/x", "//b.example/x", "https://b.example/x", "HTTPS://b.example/x", "/x"]
)
def test_https_redirects_to_https_alone(scripted: ExitStack, location: str) -> None:
    network = Scripted(scripted, redirect(location), FOUND)
    if location.lower().startswith("http:"):
        with pytest.raises(FetchError, match="'a.example' redirects away from https"):
            network.fetch("https://a.example/x")
        assert network.ports == [443]
    else:
        assert network.fetch("https://a.example/x") == b"ok" and network.ports == [443, 443]


def test_http_may_redirect_to_either_and_https_stays_from_then_on(scripted: ExitStack) -> None:
    assert Scripted(scripted, redirect("http://b.example/"), FOUND).fetch("http://a.example/") == b"ok"
    assert Scripted(scripted, redirect("HTTPS://b.example/"), FOUND).fetch("http://a.example/") == b"ok"
    back = Scripted(scripted, redirect("https://b.example/"), redirect("http://a.example/"), FOUND)
    with pytest.raises(FetchError, match="'b.example' redirects away from https"):
        back.fetch("http://a.example/")
    assert back.ports == [80, 443]


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("2002:808:808::", True),  # 8.8.8.8 by 6to4
        ("2002:808:808:7f00:1:a00:1:7f00", True),  # what stands to its right is the site's own
        ("2002:a00:1::", False),  # 10.0.0.1
        ("2002:a00:1::808:808", False),
        ("2002:7f00:1:808:808:808:808:808", False),  # 127.0.0.1
        ("2002:a9fe:a9fe::1", False),  # 169.254.169.254
    ],
)
def test_6to4_is_judged_by_the_address_inside(address: str, is_public: bool) -> None:
    assert is_public_address(address) is is_public
