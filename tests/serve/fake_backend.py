"""A server on a free port of 127.0.0.1 that answers however a test says, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import httpx

HTTP = httpx.Client(timeout=60, verify=False, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
"""For the tests' own calls; `httpx.get` would read the list of certificates anew for each."""

Behaviour = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request and the means to answer it."""

    handler: BaseHTTPRequestHandler
    path: str
    headers: dict[str, str]
    body: bytes
    server: FakeBackend

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def head(self, status: int, content_type: str, **headers: str) -> None:
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.flush()

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.head(status, "application/json", Content_Length=str(len(data)), **headers)
        self.handler.wfile.write(data)

    def begin_stream(self, content_type: str = "text/event-stream") -> None:
        self.head(200, content_type, Transfer_Encoding="chunked")

    def piece(self, data: bytes) -> None:
        """One HTTP chunk; raises when the other side is gone."""
        self.handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.handler.wfile.flush()

    def event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        self.piece(f"data: {text}\n\n".encode())

    def end_stream(self) -> None:
        self.piece(b"")

    def chat(self, words: Iterable[str], usage: bool = True, pause: float = 0.0) -> None:
        """A whole streamed chat completion."""
        self.begin_stream()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for word in words:
            time.sleep(pause)
            self.event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if usage:
            self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        self.event("[DONE]")
        self.end_stream()

    def until_gone(self, seconds: float = 60.0) -> None:
        """Say nothing until the other side closes the connection; then note that it did. A side that stays is left after some time."""
        self.handler.connection.settimeout(seconds)
        with suppress(TimeoutError):
            if self.handler.connection.recv(1) == b"":
                self.server.gone.set()

    def die(self) -> None:
        """Close the connection in the middle."""
        self.handler.close_connection = True


@dataclass
class FakeBackend:
    """`with FakeBackend(answer) as backend:` calls `answer` with each POST; GET tells a model list.

    requests: what came. gone: set when a client closed a connection that `until_gone` waited on.
    """

    answer: Behaviour
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": "other", "object": "model", "max_model_len": 2048}]})
    requests: list[Exchange] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FakeBackend:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                exchange = Exchange(self, self.path, dict(self.headers), b"", fake)
                if callable(fake.models):
                    fake.models(exchange)
                else:
                    exchange.reply(fake.models)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                exchange = Exchange(self, self.path, dict(self.headers), body, fake)
                fake.requests.append(exchange)
                try:
                    fake.answer(exchange)
                except OSError:
                    fake.gone.set()
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
