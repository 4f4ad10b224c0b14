"""The events of one request, its choices merged and quick pieces coalesced, so that a stream costs little more than one body."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from llava.serve.protocol import Event, Generation, Piece

IndexedEvent = tuple[int, Event]
"""An event, and the index of the choice that it belongs to."""

PART_SECONDS = 0.02
"""Minimum time between two parts of one choice: faster than anybody reads, and fifty parts a second instead of hundreds."""
MAX_JOINED = 64
"""Pieces after which a part is sent regardless of time, so that a client that does not read applies backpressure to its generation."""


async def merge_events(running: Sequence[Generation]) -> AsyncGenerator[IndexedEvent, None]:
    """The events of several generations in order of arrival; the first failure ends all of them."""
    if len(running) == 1:
        async for event in running[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=len(running))

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for event in generation:
                await queue.put((index, event))
            await queue.put((index, None))
        except Exception as error:  # raised again below, by the reader
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, generation)) for index, generation in enumerate(running)]
    left = len(pumps)
    try:
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass
class _Pending:
    """One choice's pending pieces. due: loop time before which its next part is not sent."""

    pieces: list[Piece] = field(default_factory=list)
    due: float = 0.0
    timer: asyncio.TimerHandle | None = None


class CoalescedPieces:
    """Joins pieces of one choice that arrive in quick succession; other events pass unchanged, each choice's in order.

    Each part of a stream costs a system call, a switch between threads and a wake-up of the client. A choice's pieces are sent as one once
    there are `interval` of them, but not within `seconds` of its last part; then a timer flushes them, whether or not another piece
    arrives. The first part, the end and errors are never delayed: pending text is flushed before them.

    Args:
        events: read ahead by a task, which pauses while its output is not consumed; closed at the end.
        interval: pieces that make a part. seconds: between two parts of one choice.
    """

    def __init__(self, events: AsyncGenerator[IndexedEvent, None], interval: int, seconds: float = PART_SECONDS) -> None:
        self._events, self._interval, self._seconds = events, interval, seconds
        self._most = max(interval, MAX_JOINED)
        self._pending: dict[int, _Pending] = {}
        self._ready: deque[IndexedEvent] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()

    async def events(self) -> AsyncGenerator[IndexedEvent, None]:
        """The coalesced events; raises what the source raises."""
        reading = asyncio.create_task(self._read())
        reading.add_done_callback(lambda _: self._news.set())
        try:
            while self._ready or not reading.done():
                if self._ready:
                    yield self._ready.popleft()
                    continue
                self._news.clear()
                self._room.set()
                await self._news.wait()
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async with aclosing(self._events) as events:
                async for index, event in events:
                    if self._ready:
                        self._room.clear()
                        await self._room.wait()
                    self._take(index, event)
        finally:
            for index in self._pending:
                self._flush(index)

    def _take(self, index: int, event: Event) -> None:
        pending = self._pending.setdefault(index, _Pending())
        if not isinstance(event, Piece):
            self._flush(index)
            self._put(index, event)
            return
        pending.pieces.append(event)
        if len(pending.pieces) < self._interval:
            return
        loop = asyncio.get_running_loop()
        if len(pending.pieces) >= self._most or loop.time() >= pending.due:
            self._flush(index)
        elif pending.timer is None:
            pending.timer = loop.call_at(pending.due, self._flush, index)

    def _flush(self, index: int) -> None:
        """Hand a choice's pending pieces, if any, to the reader."""
        pending = self._pending[index]
        if pending.timer is not None:
            pending.timer.cancel()
            pending.timer = None
        if pending.pieces:
            self._put(index, joined(pending.pieces))
            pending.pieces = []
            pending.due = asyncio.get_running_loop().time() + self._seconds

    def _put(self, index: int, event: Event) -> None:
        self._ready.append((index, event))
        self._news.set()


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece("".join(piece.text for piece in pieces), tuple(score for piece in pieces for score in piece.scores))
