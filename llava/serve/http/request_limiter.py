"""How many requests are inside a server, and whether another one may come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.protocol.error_templates import TOO_MANY_ANSWERS

HELD_BODIES = 8
"""How many bodies of the largest size may be held at once, all requests together."""


class RequestLimiter:
    """Counts the requests that generate, and says no when there are too many or the server is going down.

    Args:
        capacity: requests inside at once: places in the batch and in the queue.
        held_bytes: bytes of all their bodies together.
    """

    def __init__(self, capacity: int, held_bytes: int) -> None:
        self.capacity, self.held_bytes = capacity, held_bytes
        self.inside = self.bytes_inside = 0
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether the server is going down: what is inside finishes, nobody else gets in."""
        return self._draining.is_set()

    def start_draining(self) -> None:
        """Let nobody in any more."""
        self._draining.set()

    async def wait_draining(self) -> None:
        """Return when nobody is let in any more."""
        await self._draining.wait()

    @contextmanager
    def places(self, count: int = 1) -> Iterator[None]:
        """Hold so many places; raises as `check`."""
        self.check(count)
        with self._holding(count):
            yield

    def check(self, count: int = 1) -> None:
        """Say no to whoever would get no places now.

        Raises:
            ServeError: `DRAINING`, or `OVERLOADED` when not all of them are free.
        """
        if self.draining:
            raise ServeError(ErrorKind.DRAINING)
        if self.inside + count > self.capacity:
            raise ServeError(ErrorKind.OVERLOADED)

    @contextmanager
    def more_places(self, count: int) -> Iterator[None]:
        """Hold places for further answers of a request that is inside already; a server that goes down still finishes it.

        Raises:
            FieldError: it asks for more answers than there are places at all. ServeError: `OVERLOADED` when not all of them are free.
        """
        if count >= self.capacity:
            raise FieldError(TOO_MANY_ANSWERS.format(number=count + 1, most=self.capacity), "n")
        if self.inside + count > self.capacity:
            raise ServeError(ErrorKind.OVERLOADED)
        with self._holding(count):
            yield

    @contextmanager
    def _holding(self, count: int) -> Iterator[None]:
        self.inside += count
        self._idle.clear()
        try:
            yield
        finally:
            self.inside -= count
            if not self.inside:
                self._idle.set()

    def take_bytes(self, count: int, kept: int = 0) -> None:
        """Hold bytes of a body.

        Args:
            kept: bytes of the budget that have to stay free for others.

        Raises:
            ServeError: `OVERLOADED` when all bodies together would exceed the rest of the budget.
        """
        if self.bytes_inside + count > self.held_bytes - kept:
            raise ServeError(ErrorKind.OVERLOADED)
        self.bytes_inside += count

    def give_bytes(self, count: int) -> None:
        self.bytes_inside -= count

    async def finish(self) -> None:
        """Let nobody in any more, and return when nothing is inside."""
        self.start_draining()
        await self._idle.wait()
