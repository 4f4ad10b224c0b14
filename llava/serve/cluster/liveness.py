"""Which of the controller's workers are alive: expired heartbeats are noticed in time, and workers that send none are probed.

A worker that hangs keeps its connections open; requests that wait for it are aborted when the table drops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from llava.serve.cluster.dispatch import RegisteredWorker, WorkerTable

EXPIRE_SECONDS = 0.5
"""Between two searches for workers whose heartbeats have stopped."""
PROBE_SECONDS = 5.0
"""Between two probes of a worker that sends no heartbeats, and for one answer."""


async def watch(table: WorkerTable, is_alive: Callable[[RegisteredWorker, float], Awaitable[bool]]) -> None:
    """Keep a table up to date until cancelled.

    Args:
        is_alive: probes a worker, waiting at most a given number of seconds.
    """
    often = table.expiry_seconds / 4  # several probes before a worker's silence is too long

    async def expire() -> None:
        while True:
            table.expire()
            await asyncio.sleep(min(EXPIRE_SECONDS, often))

    async def probe_all() -> None:
        seconds = min(PROBE_SECONDS, often)
        while True:
            await asyncio.gather(asyncio.sleep(seconds), *(probe(worker, seconds) for worker in table.without_heartbeat))

    async def probe(worker: RegisteredWorker, seconds: float) -> None:
        if await is_alive(worker, seconds):
            table.responded(worker)
        else:
            table.did_not_respond(worker)

    await asyncio.gather(expire(), probe_all())
