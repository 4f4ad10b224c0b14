"""How many requests a server has in flight, and whether it admits another one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.protocol.error_templates import TOO_MANY_ANSWERS

MAX_HELD_BODIES = 8
"""Bodies of the maximum size that may be held at once, all requests together."""


class RequestLimiter:
    """Counts generating requests, and refuses more than there is capacity for, and all of them while the server drains.

    uvicorn's `limit_concurrency` counts connections, idle ones too, and refuses without a typed error.

    Args:
        capacity: requests in flight at once, in the batch and in the queue.
        max_bytes: of all their bodies together.
    """

    def __init__(self, capacity: int, max_bytes: int) -> None:
        self.capacity, self.max_bytes = capacity, max_bytes
        self.in_flight = self.held_bytes = 0
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether the server is going down: requests in flight finish, no others are admitted."""
        return self._draining.is_set()

    def start_draining(self) -> None:
        """Admit no more requests."""
        self._draining.set()

    async def wait_draining(self) -> None:
        """Return once no more requests are admitted."""
        await self._draining.wait()

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Count requests as in flight until the block ends; raises as `check`."""
        self.check(count)
        with self._counted(count):
            yield

    def check(self, count: int = 1) -> None:
        """Refuse requests that would not be admitted now.

        Raises:
            ServeError: `DRAINING`, or `OVERLOADED` without capacity for all of them.
        """
        if self.draining:
            raise ServeError(ErrorKind.DRAINING)
        if self.in_flight + count > self.capacity:
            raise ServeError(ErrorKind.OVERLOADED)

    @contextmanager
    def admit_more(self, count: int) -> Iterator[None]:
        """Count further answers of a request that is in flight already; a draining server still finishes it.

        Raises:
            FieldError: it asks for more answers than the capacity. ServeError: `OVERLOADED` without capacity for all of them now.
        """
        if count >= self.capacity:
            raise FieldError(TOO_MANY_ANSWERS.format(number=count + 1, most=self.capacity), "n")
        if self.in_flight + count > self.capacity:
            raise ServeError(ErrorKind.OVERLOADED)
        with self._counted(count):
            yield

    @contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        self.in_flight += count
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= count
            if not self.in_flight:
                self._idle.set()

    def reserve_bytes(self, count: int, reserve: int = 0) -> None:
        """Count bytes of a body.

        Args:
            reserve: bytes of the budget that have to stay free for others.

        Raises:
            ServeError: `OVERLOADED` when all bodies together would exceed the rest of the budget.
        """
        if self.held_bytes + count > self.max_bytes - reserve:
            raise ServeError(ErrorKind.OVERLOADED)
        self.held_bytes += count

    def release_bytes(self, count: int) -> None:
        self.held_bytes -= count

    async def finish(self) -> None:
        """Admit no more requests, and return when none is in flight."""
        self.start_draining()
        await self._idle.wait()
