"""A timeout for each of many short waits, one after the other, at the price of one timer.

A stream waits twice per piece: for the piece, and for the client to read it. A cancel scope around each of those waits costs more than
everything else that happens to the piece, and Python 3.10 has no `asyncio.timeout` to reschedule.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from starlette.types import Message, Send

from llava.serve.protocol import ErrorKind, ServeError

T = TypeVar("T")


class Watchdog:
    """`with Watchdog() as watchdog: await watchdog.wait(work, seconds)`, as often as needed, but only one wait at a time.

    The timer keeps running from one wait to the next; when it fires, it checks whether the current wait is overdue.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._due = math.inf
        self._expired = False

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def wait(self, work: Awaitable[T], seconds: float) -> T:
        """The result of `work`.

        Raises:
            TimeoutError: it took longer, and was cancelled.
        """
        loop = asyncio.get_running_loop()
        self._due = loop.time() + seconds
        if self._timer is None or self._timer.when() > self._due:
            self._schedule(loop)
        self._waiting, self._expired = asyncio.current_task(), False
        try:
            return await work
        except asyncio.CancelledError:
            if self._expired:
                if sys.version_info >= (3, 11) and self._waiting is not None:
                    self._waiting.uncancel()  # nobody else cancelled it: keep that from task groups around it
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._due, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiting is None:
            return
        if loop.time() < self._due:
            self._schedule(loop)
            return
        self._expired = True
        self._waiting.cancel()


@contextmanager
def with_send_timeout(send: Send, seconds: float) -> Iterator[Send]:
    """A `send` for one response that raises `ServeError` (`CANCELLED`) when the client takes longer than this to read one message."""
    with Watchdog() as watchdog:

        async def sending(message: Message) -> None:
            try:
                await watchdog.wait(send(message), seconds)
            except TimeoutError as error:
                raise ServeError(ErrorKind.CANCELLED, "The client did not read its answer.") from error

        yield sending
