"""One timer for many waits: it lets in time what is in time, and ends what is not."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, cast

import pytest
from starlette.types import Message

from llava.serve.http.watchdog import Watchdog, with_send_timeout
from llava.serve.protocol import ErrorKind, ServeError


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


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop that does not wait: where nothing is to be done, it is at once the time of the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.turns = 0.0, 0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        loop: Any = self
        self.turns += 1
        assert self.turns < 1000, "a timer is set again and again for a time that has come"
        if not loop._ready and loop._scheduled:
            self.now = max(self.now, min(timer.when() for timer in loop._scheduled if not timer.cancelled()))
        cast(Any, super())._run_once()


@pytest.mark.parametrize("seconds", [0.3, 0.47, 0.499, 0.5, 0.501, 0.53, 3.0])
def test_a_wait_ends_when_it_is_due_whenever_the_timer_was_set_for(seconds: float) -> None:
    async def run() -> float:
        loop = asyncio.get_running_loop()
        with Watchdog() as watchdog:
            await watchdog.wait(asyncio.sleep(0.5), 1.0)  # its timer is left, half a second ahead
            begun = loop.time()
            with pytest.raises(TimeoutError):
                await watchdog.wait(asyncio.sleep(9.0), seconds)
            assert await watchdog.wait(asyncio.sleep(seconds - 0.001, "in time"), seconds) == "in time"
        return loop.time() - begun

    loop = JumpingLoop()
    try:
        assert loop.run_until_complete(run()) == pytest.approx(2 * seconds - 0.001, abs=1e-6)
    finally:
        loop.close()


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


def test_a_timer_that_fires_between_two_waits_does_nothing() -> None:
    async def run() -> list[dict[str, Any]]:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        with Watchdog() as watchdog:
            await watchdog.wait(asyncio.sleep(0), 0.01)
            await asyncio.sleep(0.05)
        return errors

    assert asyncio.run(run()) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not count their cancellations yet")
def test_a_task_whose_wait_took_too_long_was_not_asked_to_end() -> None:
    async def run() -> int:
        task: Any = asyncio.current_task()
        with Watchdog() as watchdog, pytest.raises(TimeoutError):
            await watchdog.wait(asyncio.sleep(5), 0.01)
        return task.cancelling()

    assert asyncio.run(run()) == 0


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

        with with_send_timeout(send, 0.05) as sending:
            await sending({"type": "a"})
            await sending({"type": "b"})
            with pytest.raises(ServeError) as caught:
                await sending({"type": "c"})
        assert caught.value.kind is ErrorKind.CANCELLED
        return sent

    assert [message["type"] for message in asyncio.run(run())] == ["a", "b", "c"]
