"""One timer for many waits: it lets in time what is in time, and ends what is not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.types import Message

from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.watchdog import Watchdog, patient


def timers() -> int:
    loop: Any = asyncio.get_running_loop()
    return sum(not timer.cancelled() for timer in loop._scheduled)


def test_many_waits_share_a_timer_that_goes_with_them() -> None:
    async def work(value: int) -> int:
        if value % 100 == 0:
            await asyncio.sleep(0)
        return value

    async def run() -> None:
        with Watchdog() as watchdog:
            assert [await watchdog.wait(work(value), 30.0) for value in range(1000)] == list(range(1000))
            assert timers() == 1
        assert timers() == 0

    asyncio.run(run())


def test_each_wait_has_its_whole_time_whenever_the_timer_was_set() -> None:
    async def run() -> float:
        with Watchdog() as watchdog:
            for _ in range(6):
                await watchdog.wait(asyncio.sleep(0.06), 0.1)
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                await watchdog.wait(asyncio.sleep(5), 0.1)
            return time.monotonic() - begun

    assert 0.09 < asyncio.run(run()) < 1


def test_a_shorter_time_than_before_counts_and_so_does_none_at_all() -> None:
    async def run() -> float:
        begun = time.monotonic()
        with Watchdog() as watchdog:
            await watchdog.wait(asyncio.sleep(0), 60.0)
            for seconds in (0.05, -1.0):
                with pytest.raises(TimeoutError):
                    await watchdog.wait(asyncio.sleep(5), seconds)
        return time.monotonic() - begun

    assert asyncio.run(run()) < 1


def test_a_pause_between_two_waits_is_nobodys() -> None:
    async def run() -> str:
        with Watchdog() as watchdog:
            await watchdog.wait(asyncio.sleep(0), 0.05)
            await asyncio.sleep(0.15)
            return await watchdog.wait(asyncio.sleep(0.01, "done"), 0.05)

    assert asyncio.run(run()) == "done"


def test_who_cancels_the_task_cancels_it() -> None:
    async def run() -> None:
        async def waiting() -> None:
            with Watchdog() as watchdog:
                await watchdog.wait(asyncio.sleep(5), 60.0)

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_client_that_does_not_read_is_an_error() -> None:
    async def run() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) == 3:
                await asyncio.sleep(5)

        with patient(send, 0.05) as sending:
            await sending({"type": "a"})
            await sending({"type": "b"})
            with pytest.raises(ServeError) as caught:
                await sending({"type": "c"})
        assert caught.value.kind is ErrorKind.CANCELLED
        return sent

    assert [message["type"] for message in asyncio.run(run())] == ["a", "b", "c"]
