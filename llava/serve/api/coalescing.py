"""The events of one call: of all its choices as they come, quick pieces joined, so that a stream costs little more than a whole answer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from llava.serve.protocol import Event, Generation, Piece

IndexedEvent = tuple[int, Event]
"""An event, and which of the call's choices it belongs to."""

PART_SECONDS = 0.02
"""Between two parts of one choice, at least: faster than anybody reads, and fifty parts a second instead of hundreds."""
MAX_JOINED = 64
"""Pieces after which a part goes out all the same, so that a client that does not read holds up its generation."""


async def merged(running: Sequence[Generation]) -> AsyncGenerator[IndexedEvent, None]:
    """The events of several generations as they come; the first failure ends all."""
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
class _Held:
    """One choice's pieces that wait to go out. due: time of the loop before which no part follows the last one."""

    pieces: list[Piece] = field(default_factory=list)
    due: float = 0.0
    timer: asyncio.TimerHandle | None = None


class CoalescedPieces:
    """Joins pieces of the same choice that come in quick succession; other events pass unchanged, each choice's in order.

    Each part of a stream costs a call of the system, a hand-over of the interpreter and a wake-up of the client. A choice's pieces go out
    as one once there are `interval` of them, but not within `seconds` of its last part; then a timer lets them go, whether or not another
    piece comes. Nothing waits for a first part, for the end, or for an error: what was written before it goes out first.

    Args:
        events: read ahead by a task of its own, which stops while what it made ready is not taken; closed at the end.
        interval: pieces that make a part. seconds: between two parts of one choice.
    """

    def __init__(self, events: AsyncGenerator[IndexedEvent, None], interval: int, seconds: float = PART_SECONDS) -> None:
        self._events, self._interval, self._seconds = events, interval, seconds
        self._most = max(interval, MAX_JOINED)
        self._held: dict[int, _Held] = {}
        self._ready: deque[IndexedEvent] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()

    async def events(self) -> AsyncGenerator[IndexedEvent, None]:
        """What goes out; raises what the events end with."""
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
            for index in self._held:
                self._let_go(index)

    def _take(self, index: int, event: Event) -> None:
        held = self._held.setdefault(index, _Held())
        if not isinstance(event, Piece):
            self._let_go(index)
            self._put(index, event)
            return
        held.pieces.append(event)
        if len(held.pieces) < self._interval:
            return
        loop = asyncio.get_running_loop()
        if len(held.pieces) >= self._most or loop.time() >= held.due:
            self._let_go(index)
        elif held.timer is None:
            held.timer = loop.call_at(held.due, self._let_go, index)

    def _let_go(self, index: int) -> None:
        """Put a choice's pieces, if there are any, where the reader takes them."""
        held = self._held[index]
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
        if held.pieces:
            self._put(index, joined(held.pieces))
            held.pieces = []
            held.due = asyncio.get_running_loop().time() + self._seconds

    def _put(self, index: int, event: Event) -> None:
        self._ready.append((index, event))
        self._news.set()


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece("".join(piece.text for piece in pieces), tuple(score for piece in pieces for score in piece.scores))
