"""Whether the controller's workers are alive: silence is noticed as it happens, and those that send no heart beats are asked.

A worker that hangs keeps its connections open. Whoever waits for its answer learns from here that none will come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from llava.serve.cluster.dispatch import Worker, WorkerTable

LOOK_SECONDS = 0.5
"""Between two looks for workers that have been silent for too long."""
PROBE_SECONDS = 5.0
"""Between two questions to a worker that sends no heart beats, and for one answer."""


async def watch(table: WorkerTable, answers: Callable[[Worker, float], Awaitable[bool]]) -> None:
    """Look after the workers of a table until cancelled.

    Args:
        answers: asks a worker whether it is alive, and waits for so many seconds.
    """
    often = table.expiry_seconds / 4  # a worker is asked several times before its silence is too long

    async def look() -> None:
        while True:
            table.expire()
            await asyncio.sleep(min(LOOK_SECONDS, often))

    async def ask() -> None:
        seconds = min(PROBE_SECONDS, often)
        while True:
            await asyncio.gather(asyncio.sleep(seconds), *(probe(worker, seconds) for worker in table.unbeating))

    async def probe(worker: Worker, seconds: float) -> None:
        if await answers(worker, seconds):
            table.heard_of(worker)
        else:
            table.not_heard_of(worker)

    await asyncio.gather(look(), ask())
