"""The table of workers, with a clock that the tests turn."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llava.serve.cluster.dispatch import DOWN_SECONDS, MAX_WORKERS, DispatchMethod, WorkerStatus, WorkerTable
from llava.serve.http.addresses import Endpoint, parse_worker_url


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def endpoint(port: int) -> Endpoint:
    return Endpoint(parse_worker_url(f"http://127.0.0.1:{port}"), ("127.0.0.1",))


def table(method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE) -> tuple[WorkerTable, Clock]:
    clock = Clock()
    return WorkerTable(method, 30.0, clock, random.Random(0)), clock


def test_a_worker_is_forgotten_after_too_long_a_silence_and_a_beat_keeps_it() -> None:
    workers, clock = table()
    workers.register(endpoint(1), WorkerStatus(("a",)))
    workers.register(endpoint(2), WorkerStatus(("b",)), check_heart_beat=False)
    clock.now += 29
    assert workers.heartbeat("http://127.0.0.1:1", 3) and workers.models() == ["a", "b"]
    clock.now += 29
    assert workers.models() == ["a", "b"]
    clock.now += 2
    assert workers.models() == ["b"] and not workers.heartbeat("http://127.0.0.1:1", 0)
    assert workers.was_served("a") and not workers.was_served("c")


def test_the_shortest_queue_counts_reports_and_own_requests_per_speed() -> None:
    workers, _ = table()
    slow = workers.register(endpoint(1), WorkerStatus(("a",), speed=1, queue_length=1))
    fast = workers.register(endpoint(2), WorkerStatus(("a",), speed=4, queue_length=2))
    assert workers.choose("a") is fast
    fast.in_flight = 8
    assert workers.choose("a") is slow
    assert workers.choose("a", excluded=[slow.name]) is fast
    assert workers.choose("a", excluded=[slow.name, fast.name]) is None and workers.choose("b") is None


def test_a_number_told_at_a_bursts_top_does_not_outlive_the_burst() -> None:
    workers, _ = table()
    busy = workers.register(endpoint(1), WorkerStatus(("a",)))
    idle = workers.register(endpoint(2), WorkerStatus(("a",)))
    busy.in_flight = 30
    workers.heartbeat(busy.name, 30)
    assert (busy.other_requests, busy.load) == (0, 30)
    busy.in_flight = 0  # the burst is over, the next beat seconds away
    assert (busy.load, idle.load) == (0, 0)
    chosen = []
    for _ in range(40):  # one after another
        worker = workers.choose("a")
        assert worker is not None
        with workers.using(worker):
            chosen.append(worker.name)
    assert Counter(chosen) == {busy.name: 20, idle.name: 20}


def test_work_of_others_counts_beside_our_own_until_the_next_number() -> None:
    workers, _ = table()
    worker = workers.register(endpoint(1), WorkerStatus(("a",), speed=2, queue_length=4))
    assert worker.load == 2  # 4 of others, at twice the speed
    worker.in_flight = 3
    assert worker.load == 3.5  # 4 of others and 3 of ours
    workers.heartbeat(worker.name, 9)
    assert (worker.other_requests, worker.load) == (6, 4.5)  # 9 told, 3 of them ours
    worker.in_flight = 1
    assert worker.load == 3.5
    worker.note_status(WorkerStatus(("a",), speed=1, queue_length=0))  # told before our request got there
    assert (worker.other_requests, worker.load) == (0, 1)
    workers.register(endpoint(1), WorkerStatus(("a",), speed=1, queue_length=6))
    assert (worker.other_requests, worker.load) == (5, 6)


def test_equal_queues_take_turns() -> None:
    workers, _ = table()
    for port in (1, 2, 3):
        workers.register(endpoint(port), WorkerStatus(("a",)))
    names = [worker.name for _ in range(6) if (worker := workers.choose("a"))]
    assert Counter(names) == {f"http://127.0.0.1:{port}": 2 for port in (1, 2, 3)}


def test_handed_out_addresses_count_until_the_next_beat() -> None:
    workers, _ = table()
    for port in (1, 2):
        workers.register(endpoint(port), WorkerStatus(("a",)))
    assert sorted(workers.hand_out("a") for _ in range(4)) == ["http://127.0.0.1:1"] * 2 + ["http://127.0.0.1:2"] * 2
    workers.heartbeat("http://127.0.0.1:2", 0)
    assert [workers.hand_out("a"), workers.hand_out("a"), workers.hand_out("b")] == ["http://127.0.0.1:2"] * 2 + [""]


def test_the_lottery_draws_by_speed() -> None:
    workers, _ = table(DispatchMethod.LOTTERY)
    workers.register(endpoint(1), WorkerStatus(("a",), speed=1, queue_length=0))
    workers.register(endpoint(2), WorkerStatus(("a",), speed=3, queue_length=99))
    drawn = Counter(worker.name for _ in range(2000) if (worker := workers.choose("a")))
    assert 0.70 < drawn["http://127.0.0.1:2"] / 2000 < 0.80


def test_a_worker_that_is_down_is_passed_over_while_there_is_another() -> None:
    workers, clock = table()
    one = workers.register(endpoint(1), WorkerStatus(("a",)))
    two = workers.register(endpoint(2), WorkerStatus(("a",), queue_length=9))
    workers.mark_down(one)
    assert workers.choose("a") is two
    assert workers.choose("a", excluded=[two.name]) is one
    clock.now += DOWN_SECONDS
    assert workers.choose("a") is one
    workers.mark_down(one)
    workers.heartbeat(one.name, 0)
    assert workers.choose("a") is one


def test_registering_again_renews_and_keeps_what_is_in_flight() -> None:
    workers, _ = table()
    worker = workers.register(endpoint(1), WorkerStatus(("a",)))
    with workers.using(worker):
        assert workers.register(endpoint(1), WorkerStatus(("b",))) is worker
        assert (worker.in_flight, workers.models(), len(workers)) == (1, ["b"], 1)
    assert worker.in_flight == 0


def test_what_a_worker_says_when_asked_is_no_heartbeat() -> None:
    workers, clock = table()
    worker = workers.register(endpoint(1), WorkerStatus(("a",)), registered_from="10.0.0.7")
    clock.now += 20
    worker.note_status(WorkerStatus(("a", "b"), queue_length=3))
    assert workers.models() == ["a", "b"] and worker.load == 3 and worker.registered_from == "10.0.0.7"
    clock.now += 11
    assert workers.models() == []


def test_the_table_is_bounded() -> None:
    workers, clock = table()
    for port in range(1, MAX_WORKERS + 1):
        workers.register(endpoint(port), WorkerStatus(("a",)))
    with pytest.raises(OverflowError, match="workers already"):
        workers.register(endpoint(60000), WorkerStatus(("a",)))
    workers.register(endpoint(1), WorkerStatus(("a",)))
    clock.now += 31
    workers.register(endpoint(60000), WorkerStatus(("a",)))
    assert len(workers) == 1


def lost_ones() -> tuple[WorkerTable, Clock, list[str]]:
    lost: list[str] = []
    clock = Clock()
    return WorkerTable(DispatchMethod.SHORTEST_QUEUE, 30.0, clock, on_lost=lambda worker: lost.append(worker.name)), clock, lost


def test_whoever_waits_for_a_worker_is_told_once_when_it_is_forgotten() -> None:
    workers, clock, lost = lost_ones()
    worker = workers.register(endpoint(1), WorkerStatus(("a",)))
    told: list[int] = []
    with workers.using(worker, lambda: told.append(1)), workers.using(worker, lambda: told.append(2)):
        with workers.using(worker, lambda: told.append(3)):
            pass
        clock.now += 30
        assert workers.choose("a") is worker and told == []
        clock.now += 0.1
        workers.expire()
        workers.expire()
        assert told == [1, 2] and lost == [worker.name] and workers.choose("a") is None
    assert workers.register(endpoint(1), WorkerStatus(("a",))) is not worker


def test_a_worker_that_leaves_by_its_own_word_finishes_and_one_that_is_gone_does_not() -> None:
    workers, _, lost = lost_ones()
    told: list[str] = []
    leaving, gone = workers.register(endpoint(1), WorkerStatus(("a",))), workers.register(endpoint(2), WorkerStatus(("a",)))
    with workers.using(leaving, lambda: told.append("leaving")), workers.using(gone, lambda: told.append("gone")):
        workers.remove(leaving.name)
        workers.drop_lost(gone)
        workers.drop_lost(gone)
    assert told == ["gone"] and lost == [gone.name] and workers.workers == []


def test_a_worker_without_heartbeats_falls_silent_and_comes_back() -> None:
    workers, clock, lost = lost_ones()
    asked = workers.register(endpoint(1), WorkerStatus(("a",)), check_heart_beat=False)
    assert workers.without_heartbeat == [asked]
    told: list[int] = []
    with workers.using(asked, lambda: told.append(1)):
        clock.now += 20
        workers.responded(asked)
        clock.now += 30
        workers.did_not_respond(asked)
        assert workers.workers == [asked] and told == []
        clock.now += 1
        workers.did_not_respond(asked)
        workers.did_not_respond(asked)
    assert told == [1] and lost == [asked.name] and asked.silent
    assert workers.workers == workers.models() == [] and workers.choose("a") is None and workers.was_served("a")
    assert workers.without_heartbeat == [asked] and len(workers) == 1
    workers.responded(asked)
    assert workers.choose("a") is asked
    clock.now += 31
    assert workers.workers == [asked]  # nobody has asked it meanwhile
