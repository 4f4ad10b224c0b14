"""Running an app: uvicorn with bounds on headers and idle clients, and an end that lets running answers finish."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llava.serve.http.asgi import abort_connection, network_of
from llava.serve.http.middleware import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

HEADER_SECONDS = 15.0
"""In which a connection has to bring a request's headers, or the rest of a body that nobody reads any more."""
SWITCH_SECONDS = 0.0005
"""A tenth of Python's default between two threads that both want the interpreter."""
KEEP_ALIVE_SECONDS = 15
FLUSH_SECONDS = 30.0
"""In which a client has to take what was sent, once its connection is to be closed."""
OPEN_PAGE_SECONDS = 3
"""In place of it for a program with a page: browsers hold connections open for as long as a page is looked at."""
MAX_FILES = 65_536
"""Open files, connections included, that a server asks the system for."""
BACKLOG = 256
"""Connections that wait to be taken. So many are taken in one go before any is counted: with 1024 open files, that makes 512 of
`most_connections` and 256 more, which leaves 256 for everything else."""
DRAIN_SECONDS = 300.0
"""That running answers get to finish after SIGTERM."""
INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended before it ran."""


def most_connections() -> int:
    """Half of the files that this process may open; the rest is for connections to others, pictures and the log.

    Without any left, the event loop would take no connections at all, and write thousands of lines a second about it.
    """
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def most_of_one_client() -> int:
    """Three quarters of `most_connections`: whoever opens all they can leaves some to others.

    No less, because everybody behind a proxy is one client, and so is a controller to its workers.
    """
    return most_connections() * 3 // 4


_connections_of: WeakKeyDictionary[ServerState, Counter[str]] = WeakKeyDictionary()
"""Open connections by client, of each server."""


def check_address(host: str, port: int) -> None:
    """Find out whether a server could listen here, before a model is loaded for it: bind as it would, and let go again.

    Args:
        port: 0 stands for a free one.

    Raises:
        ValueError: it could not.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}, expected 0 to 65535.")
    foreign = f"--host is {host!r}, which is no address of this machine; use 127.0.0.1, or 0.0.0.0 for every interface."
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(foreign) from error
    problems = [_bind_problem(family, address) for family, _, _, _, address in found]
    if errno.EADDRINUSE in problems:
        raise ValueError(f"port {port} of {host} is taken; end what listens there, or choose another with --port.")
    if errno.EACCES in problems:
        raise ValueError(f"port {port} of {host} may not be used by this user; choose one above 1023 with --port.")
    if None not in problems:
        raise ValueError(foreign)


def _bind_problem(family: int, address: Any) -> int | None:
    """The number of the system's error, or `None` where the address is free."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn's: a server that has just ended is no obstacle
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno
    return None


def shown_url(host: str, port: int) -> str:
    """The address of a server on this machine, as people and programs here reach it.

    Args:
        host: what it listens at: an address, a name, or one of those that stand for every interface, of which the loopback one is named.
    """
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # whoever listens at :: has no IPv4 address
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def allow_many_files() -> None:
    """Raise the limit of open files as far as the system lets us; many shells start with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class GuardedProtocol(H11Protocol):
    """One connection whose client cannot hold it open by doing nothing.

    The app finds the transport at `scope["state"]["connection"]` and may abort it.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": transport}
        self._counted = _connections_of.setdefault(self.server_state, Counter())
        self._network = network_of(self.client[0] if self.client else "")
        self._counted[self._network] += 1
        if len(self.connections) > most_connections() or self._counted[self._network] > most_of_one_client():
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._counted[self._network] -= 1
        if not self._counted[self._network]:
            del self._counted[self._network]
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(FLUSH_SECONDS, self.transport.abort)
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(FLUSH_SECONDS, self.transport.abort)

    def _watch(self) -> None:
        """Run the clock while the client is to send a header, or the rest of a body that was already answered."""
        answered = self.cycle is None or self.cycle.response_complete
        owes = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)
        if not owes:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        self.transport.abort()


class AbortOnCancel:
    """Ends what a server cancels when its time is over, without a traceback in the log for what was asked for.

    A request's connection is cut, so that no client takes half an answer for a whole one.
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
        except asyncio.CancelledError:  # nobody else cancels the tasks that run an app
            if scope["type"] == "http":
                logger.warning("%s %r was cut short", scope["method"], scope["path"][:200])
                abort_connection(scope)
                await asyncio.sleep(0)  # in which the connection is lost


class DrainingServer(uvicorn.Server):
    """A server that answers SIGTERM and SIGINT by refusing new work, finishing what runs, and returning.

    A second signal ends it at once.

    Args:
        drain: refuses new work, and returns when nothing runs any more.
        drain_seconds: after which what still runs is cancelled.
        on_started: called once connections are taken.
        failed: whether what the app serves has failed for good; the server ends then.
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
        """Start the app, listen, and say so."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    async def on_tick(self, counter: int) -> bool:
        """Asked by uvicorn ten times a second: whether to end."""
        return await super().on_tick(counter) or self.failed()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals on the loop. uvicorn's own way raises them again at the end, which would make the exit status theirs."""
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
        logger.info("draining: what runs has %g s to finish", self.drain_seconds)
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
        app: has what a `DrainingServer` needs at `app.state.drain`, where `guard_app` leaves it, and where it may fail for good, at
            `app.state.failed`.
        port: 0 takes a free one; it is printed.
        on_started: called once connections are taken.
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


def run_program(main: Callable[[], int]) -> int:
    """Run a program's `main`; its exit status, or `INTERRUPTED`, without a traceback, where Ctrl-C comes before its server runs."""
    try:
        return main()
    except KeyboardInterrupt:
        return INTERRUPTED


def run_server(server: DrainingServer) -> int:
    """Run until a signal; 0, or 1 when the server could not start, or ended because what it serves has failed for good."""
    allow_many_files()
    share_the_interpreter()
    try:
        server.run()
    except SystemExit:  # uvicorn's word for a port that is taken or a lifespan that failed; it logged which
        return 1
    return 0 if server.started and not server.failed() else 1


def share_the_interpreter() -> None:
    """Keep the event loop quick beside a thread that runs a model.

    What is loaded by now lives as long as the process, so the garbage collector need not walk through it again and again; and the thread
    gives the interpreter up sooner: the loop waits for it after every system call.
    """
    with interrupts_held():
        gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block: raised in what the garbage collector calls, it would be written out and forgotten."""
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
