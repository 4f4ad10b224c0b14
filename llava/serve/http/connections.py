"""Connections within limits: how many, of one client and in all, and how long one may stay idle.

uvicorn's `limit_concurrency` counts neither by client nor before a request arrives, and it has no timeout for headers.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from contextlib import suppress
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llava.serve.http.asgi import network_of

HEADER_SECONDS = 15.0
"""In which a connection has to deliver a request's headers, or the rest of a body that is no longer read."""
FLUSH_SECONDS = 30.0
"""In which a client has to read what was sent, once its connection is to be closed."""
MAX_FILES = 65_536
"""Open files, connections included, that a server requests from the system."""


def max_connections() -> int:
    """Half of the files that this process may open; the rest is for outgoing connections, images and the log.

    With none left, the event loop could not accept connections, and would log that thousands of times a second.
    """
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def max_connections_per_client() -> int:
    """Three quarters of `max_connections`: one client cannot use them all.

    No less, because everybody behind a proxy is one client, and so is a controller to its workers.
    """
    return max_connections() * 3 // 4


def allow_many_files() -> None:
    """Raise the limit on open files as far as the system allows; many shells start with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_connections_of: WeakKeyDictionary[ServerState, Counter[str]] = WeakKeyDictionary()
"""Open connections by client, of each server."""


class GuardedProtocol(H11Protocol):
    """One connection, which its client cannot keep open while idle.

    The app finds the transport in `scope["state"]["connection"]` and may abort it.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": transport}
        self._counted = _connections_of.setdefault(self.server_state, Counter())
        self._network = network_of(self.client[0] if self.client else "")
        self._counted[self._network] += 1
        if len(self.connections) > max_connections() or self._counted[self._network] > max_connections_per_client():
            transport.abort()
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._counted[self._network] -= 1
        if not self._counted[self._network]:
            del self._counted[self._network]
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(FLUSH_SECONDS, self.transport.abort)
        self._update_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(FLUSH_SECONDS, self.transport.abort)

    def _update_timer(self) -> None:
        """Run the timer while headers are due from the client, or the rest of a body that was already answered."""
        answered = self.cycle is None or self.cycle.response_complete
        owes = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)
        if not owes:
            self._stop_timer()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_timeout(self) -> None:
        self._deadline = None
        self.transport.abort()
