"""Events on their way from the engine's threads to the callers' event loops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeAlias

from llava.serve.protocol import Event, ServeError

logger = logging.getLogger(__name__)

Delivery: TypeAlias = Event | ServeError | None
"""What a caller gets: events, and at the end `None` or an error."""


class EngineGeneration:
    """One answer on its way to the caller's event loop, in which it is made; see `protocol.Generation`.

    Args:
        wake_engine: called when the caller has cancelled.
    """

    def __init__(self, wake_engine: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self._wake_engine = wake_engine
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()

    def put(self, delivery: Delivery) -> None:
        """Called in the event loop."""
        self._deliveries.put_nowait(delivery)

    def cancel(self) -> None:
        self.cancelled = True
        self._wake_engine()

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (delivery := await self._deliveries.get()) is not None:
                if isinstance(delivery, ServeError):
                    raise delivery
                yield delivery
        finally:
            self.cancel()


class Outbox:
    """Collects one thread's deliveries and posts them with one call per event loop."""

    def __init__(self) -> None:
        self._collected: list[tuple[EngineGeneration, Delivery]] = []

    def put(self, generation: EngineGeneration, delivery: Delivery) -> None:
        self._collected.append((generation, delivery))

    def deliver(self) -> None:
        """Post everything collected."""
        collected, self._collected = self._collected, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EngineGeneration, Delivery]]] = {}
        for generation, delivery in collected:
            by_loop.setdefault(generation.loop, []).append((generation, delivery))
        for loop, deliveries in by_loop.items():
            _post(loop, deliveries)


def deliver_now(generation: EngineGeneration, delivery: Delivery) -> None:
    """Post one delivery, from any thread."""
    _post(generation.loop, [(generation, delivery)])


def _post(loop: asyncio.AbstractEventLoop, deliveries: Sequence[tuple[EngineGeneration, Delivery]]) -> None:
    try:
        loop.call_soon_threadsafe(_put_all, deliveries)
    except RuntimeError:  # the caller's loop was closed
        logger.warning("%d events had no event loop to go to", len(deliveries))


def _put_all(deliveries: Sequence[tuple[EngineGeneration, Delivery]]) -> None:
    for generation, delivery in deliveries:
        generation.put(delivery)
