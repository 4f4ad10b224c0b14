"""Running an app: uvicorn with limits on connections and headers, and a shutdown that lets running answers finish."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.http.asgi import abort_connection
from llava.serve.http.connections import FLUSH_SECONDS, GuardedProtocol, allow_many_files
from llava.serve.http.middleware import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""Interval at which threads yield the interpreter; a tenth of Python's default."""
KEEP_ALIVE_SECONDS = 15
OPEN_PAGE_SECONDS = 3
"""In place of `FLUSH_SECONDS` for a program with a page: browsers keep connections open as long as a page is shown."""
BACKLOG = 256
"""Connections that wait to be accepted. So many are accepted at once before any is counted: with 1024 open files, that makes 512 of
`max_connections` and 256 more, which leaves 256 for everything else."""
DRAIN_SECONDS = 300.0
"""In which running answers may finish after SIGTERM."""


class AbortOnCancel:
    """Handles the cancellation of requests that outlast a shutdown, without a traceback in the log for what was intended.

    A request's connection is aborted, so that no client takes half an answer for a complete one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cancelled = False

        async def received() -> Message:
            nonlocal cancelled
            try:
                return await receive()
            except asyncio.CancelledError:
                cancelled = True
                raise

        async def sent(message: Message) -> None:
            if not (cancelled and message["type"] == "lifespan.shutdown.failed"):  # it carries the cancellation's traceback
                await send(message)

        try:
            await self.app(scope, received, sent)
        except asyncio.CancelledError:  # nothing else cancels the tasks that run an app
            if scope["type"] == "http":
                logger.warning("%s %r was aborted by the shutdown", scope["method"], scope["path"][:200])
                abort_connection(scope)
                await asyncio.sleep(0)  # in which the connection is lost


class DrainingServer(uvicorn.Server):
    """A server that drains on SIGTERM and SIGINT: it refuses new requests, finishes running ones, and returns.

    A second signal ends it at once.

    Args:
        drain: refuses new requests, and returns when none is running.
        drain_seconds: after which requests still running are cancelled.
        on_started: called once connections are accepted.
        failed: whether what the app serves has failed for good; then the server ends.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Awaitable[None]],
        drain_seconds: float = DRAIN_SECONDS,
        on_started: Callable[[], None] | None = None,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config)
        self.failed = failed
        self.drain, self.drain_seconds, self.on_started = drain, drain_seconds, on_started
        self._finishing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, listen, and call `on_started`."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether to end."""
        return await super().on_tick(counter) or self.failed()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals on the loop. uvicorn's own handlers raise them again at the end, which would decide the exit status."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin to drain; called again, end at once."""
        if self._finishing is not None:
            logger.warning("second signal: ending at once")
            self.should_exit = self.force_exit = True
            return
        logger.info("draining: running requests have %g s to finish", self.drain_seconds)
        self._finishing = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.drain(), self.drain_seconds)
        self.should_exit = True


def make_server(
    app: FastAPI,
    host: str,
    port: int,
    *,
    log_level: str = "info",
    drain_seconds: float = DRAIN_SECONDS,
    on_started: Callable[[], None] | None = None,
    **options: Any,
) -> DrainingServer:
    """A server for an app; `run_server` runs it, and so does `await server.serve()`.

    Args:
        app: brings `DrainingServer.drain` in `app.state.drain`, where `guard_app` puts it, and `failed`, if it can fail, in
            `app.state.failed`.
        port: 0 takes a free one; it is printed.
        on_started: called once connections are accepted.
        options: uvicorn's own, such as `ssl_keyfile`.
    """
    settings: dict[str, Any] = {
        "http": GuardedProtocol,
        "ws": "none",
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "backlog": BACKLOG,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": int(FLUSH_SECONDS),
        "access_log": False,  # RequestIds writes one line per request, with its id
        "server_header": False,
        "proxy_headers": False,
        "log_level": log_level,
    }
    config = uvicorn.Config(AbortOnCancel(app), host=host, port=port, **{**settings, **options})
    return DrainingServer(config, app.state.drain, drain_seconds, on_started, getattr(app.state, "failed", lambda: False))


def run_server(server: DrainingServer) -> int:
    """Run until a signal; 0, or 1 if the server could not start, or ended because what it serves has failed for good."""
    allow_many_files()
    favour_event_loop()
    try:
        server.run()
    except SystemExit:  # raised by uvicorn for a port in use or a lifespan that failed; it logged which
        return 1
    return 0 if server.started and not server.failed() else 1


def favour_event_loop() -> None:
    """Keep the event loop responsive beside a thread that runs a model.

    What is loaded by now lives as long as the process, so the garbage collector need not traverse it again and again; and the model's
    thread yields the interpreter sooner: the loop waits for it after every system call.
    """
    with deferred_interrupts():
        gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block: raised in a callback of the garbage collector, it would be printed and lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set() and callable(before):
        before(signal.SIGINT, None)
