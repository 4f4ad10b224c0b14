"""Looking after workers: the table's clock is the test's, and so are the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest

from llava.serve.cluster import liveness
from llava.serve.cluster.dispatch import RegisteredWorker, WorkerStatus, WorkerTable
from llava.serve.cluster.liveness import watch
from tests.serve.cluster.test_dispatch import Clock, endpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "EXPIRE_SECONDS", 0.001)
    monkeypatch.setattr(liveness, "PROBE_SECONDS", 0.001)


class Watched:
    """A table that is looked after; `hung` are the ports of the workers that do not answer."""

    def __init__(self) -> None:
        self.clock, self.hung = Clock(), set[int]()
        self.asked: list[tuple[int, float]] = []
        self.table = WorkerTable(expiry_seconds=30.0, clock=self.clock)

    async def is_alive(self, worker: RegisteredWorker, seconds: float) -> bool:
        self.asked.append((worker.endpoint.url.port, seconds))
        return worker.endpoint.url.port not in self.hung

    async def until(self, condition: Callable[[], bool]) -> None:
        watching = asyncio.ensure_future(watch(self.table, self.is_alive))
        while not condition():
            assert not watching.done()
            await asyncio.sleep(0.001)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    def run(self, condition: Callable[[], bool]) -> None:
        asyncio.run(asyncio.wait_for(self.until(condition), 60))


def test_silence_is_noticed_though_nobody_asks_for_a_worker() -> None:
    watched = Watched()
    worker = watched.table.register(endpoint(1), WorkerStatus(("a",)))
    told: list[int] = []
    with watched.table.using(worker, lambda: told.append(1)):
        watched.clock.now += 31
        watched.run(lambda: told == [1])
    assert watched.asked == []


def test_workers_without_heartbeats_are_asked_and_those_that_hang_are_lost() -> None:
    watched = Watched()
    good, bad = (watched.table.register(endpoint(port), WorkerStatus(("a",)), check_heart_beat=False) for port in (1, 2))
    watched.hung.add(2)
    watched.clock.now += 31
    watched.run(lambda: good.last_heard == watched.clock.now and bad.silent)
    assert watched.table.workers == [good]
    watched.hung.clear()
    watched.run(lambda: not bad.silent)
    assert {port for port, _ in watched.asked} == {1, 2} and {seconds for _, seconds in watched.asked} == {0.001}


def test_a_worker_is_asked_several_times_before_its_silence_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PROBE_SECONDS", 5.0)
    watched = Watched()
    watched.table.expiry_seconds = 0.02
    watched.table.register(endpoint(1), WorkerStatus(("a",)), check_heart_beat=False)
    watched.run(lambda: len(watched.asked) >= 3)
    assert watched.asked[0] == (1, 0.005)
