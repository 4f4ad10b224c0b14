"""The table of registered workers: which are alive, and which one gets the next request. No network, and the clock is passed in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum

from llava.serve.http.addresses import Endpoint

MAX_WORKERS = 256
MAX_REMEMBERED_MODELS = 1024
DOWN_SECONDS = 5.0
"""How long a worker that could not be reached is skipped while another one serves the model."""


class DispatchMethod(Enum):
    """How one of several workers is chosen: `LOTTERY` draws at random, weighted by speed; `SHORTEST_QUEUE` takes the least load."""

    LOTTERY = "lottery"
    SHORTEST_QUEUE = "shortest_queue"


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker reports. models: names it serves. speed: relative to other workers, above 0. queue_length: requests it has now."""

    models: tuple[str, ...]
    speed: float = 1.0
    queue_length: int = 0


@dataclass
class RegisteredWorker:
    """A registered worker.

    name: its normalised URL. check_heart_beat: whether missing heartbeats end its registration. last_heard: when it last gave a sign of
    life. in_flight: requests this controller has sent it. other_requests: what it had besides these in its last report, from clients that
    call it directly. handed_out: times its address was given to a client since the last report. registered_from: the peer that registered
    it. down_until: it is skipped until then. last_chosen: number of the last choice that fell on it. silent: it has not answered for too
    long and gets no requests until it does. on_lost: called once when it goes silent or its registration expires.
    """

    name: str
    endpoint: Endpoint
    status: WorkerStatus
    check_heart_beat: bool
    registered_from: str | None
    last_heard: float
    in_flight: int = 0
    other_requests: int = 0
    handed_out: int = 0
    down_until: float = 0.0
    last_chosen: int = 0
    silent: bool = False
    on_lost: list[Callable[[], None]] = field(default_factory=list)

    @property
    def load(self) -> float:
        """Work ahead of a new request, in units of this worker's speed."""
        return (self.in_flight + self.other_requests + self.handed_out) / self.status.speed

    def note_status(self, status: WorkerStatus) -> None:
        """Take over what the worker reports now.

        Only other clients' share of its queue is kept: ours is counted as requests start and end, and a length reported at the peak of a
        burst would outlive the burst by a whole heartbeat interval.
        """
        self.status, self.other_requests = status, max(0, status.queue_length - self.in_flight)


class WorkerTable:
    """Workers by name.

    Args:
        method: how one of several is chosen.
        expiry_seconds: silence after which a registration expires.
        clock: monotonic seconds.
        draw: source of randomness of the lottery.
        on_lost: called with each worker that is lost: silent for too long, or gone.
    """

    def __init__(
        self,
        method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE,
        expiry_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
        on_lost: Callable[[RegisteredWorker], None] = lambda worker: None,
    ) -> None:
        self.method = method
        self.expiry_seconds = expiry_seconds
        self._clock = clock
        self._draw = draw or random.Random()
        self._on_lost = on_lost
        self._workers: dict[str, RegisteredWorker] = {}
        self._remembered: dict[str, None] = {}
        self._choices = 0

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def workers(self) -> list[RegisteredWorker]:
        """Those that are alive, in the order of their first registration."""
        self.expire()
        return [worker for worker in self._workers.values() if not worker.silent]

    @property
    def without_heartbeat(self) -> list[RegisteredWorker]:
        """Those that send no heartbeats and have to be probed instead, the silent ones included."""
        return [worker for worker in self._workers.values() if not worker.check_heart_beat]

    def register(
        self, endpoint: Endpoint, status: WorkerStatus, check_heart_beat: bool = True, registered_from: str | None = None
    ) -> RegisteredWorker:
        """Add a worker or renew its registration; the count of requests in flight stays.

        Args:
            registered_from: address of the peer that registered it.

        Raises:
            OverflowError: the table is full.
        """
        self.expire()
        name = endpoint.url.text
        known = self._workers.get(name)
        if known is None and len(self._workers) >= MAX_WORKERS:
            raise OverflowError(f"There are {MAX_WORKERS} workers already, expected fewer; stop one or start a second controller.")
        if known is None:
            known = RegisteredWorker(name, endpoint, status, check_heart_beat, registered_from, self._clock())
            self._workers[name] = known
        known.endpoint, known.check_heart_beat, known.registered_from = endpoint, check_heart_beat, registered_from
        known.note_status(status)
        self.responded(known)
        for model in status.models:
            if len(self._remembered) < MAX_REMEMBERED_MODELS:
                self._remembered[model] = None
        return known

    def find(self, name: str) -> RegisteredWorker | None:
        """A registered worker by its name."""
        self.expire()
        return self._workers.get(name)

    def heartbeat(self, name: str, queue_length: int) -> bool:
        """Record a heartbeat; `False` where the worker is unknown and has to register again."""
        worker = self.find(name)
        if worker is None:
            return False
        worker.note_status(replace(worker.status, queue_length=queue_length))
        self.responded(worker)
        return True

    def responded(self, worker: RegisteredWorker) -> None:
        """Record a sign of life."""
        worker.last_heard, worker.down_until, worker.handed_out, worker.silent = self._clock(), 0.0, 0, False

    def did_not_respond(self, worker: RegisteredWorker) -> None:
        """Record that a worker without heartbeats failed a probe; after `expiry_seconds` of silence it gets no requests.

        It stays registered: nobody would register it again when it comes back.
        """
        if not worker.silent and worker.last_heard < self._clock() - self.expiry_seconds:
            worker.silent = True
            self._announce_lost(worker)

    def _announce_lost(self, worker: RegisteredWorker) -> None:
        self._on_lost(worker)
        for call in tuple(worker.on_lost):
            call()

    def remove(self, name: str) -> None:
        """Unregister a worker, if it is known; its running requests go on."""
        self._workers.pop(name, None)

    def drop_lost(self, worker: RegisteredWorker) -> None:
        """Unregister a worker that is gone; its running requests are aborted."""
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]
            self._announce_lost(worker)

    def expire(self) -> None:
        """Drop the workers whose heartbeats stopped `expiry_seconds` ago."""
        oldest = self._clock() - self.expiry_seconds
        for worker in [w for w in self._workers.values() if w.check_heart_beat and w.last_heard < oldest]:
            self.drop_lost(worker)

    def models(self) -> list[str]:
        """Names of all models that are served now, sorted."""
        return sorted({model for worker in self.workers for model in worker.status.models})

    def was_served(self, model: str) -> bool:
        """Whether somebody has served this model since the controller started."""
        return model in self._remembered

    def choose(self, model: str, excluded: Collection[str] = ()) -> RegisteredWorker | None:
        """The worker for the next request, or `None`.

        Args:
            excluded: names of workers that were tried already.
        """
        able = [worker for worker in self.workers if model in worker.status.models and worker.name not in excluded]
        now = self._clock()
        candidates = [worker for worker in able if worker.down_until <= now] or able
        if not candidates:
            return None
        if self.method is DispatchMethod.LOTTERY:
            chosen = self._draw.choices(candidates, weights=[worker.status.speed for worker in candidates])[0]
        else:
            chosen = min(candidates, key=lambda worker: (worker.load, worker.last_chosen))
        self._choices += 1
        chosen.last_chosen = self._choices
        return chosen

    def hand_out(self, model: str) -> str:
        """The address of a worker for a client that will call it itself; empty where nobody serves the model."""
        worker = self.choose(model)
        if worker is None:
            return ""
        worker.handed_out += 1
        return worker.name

    def mark_down(self, worker: RegisteredWorker) -> None:
        """Pass a worker over for a while, until its next heartbeat at most: it could not be reached or broke off."""
        worker.down_until = self._clock() + DOWN_SECONDS

    @contextmanager
    def using(self, worker: RegisteredWorker, on_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Count a request as sent to a worker while the block runs; `on_lost` is called if the worker is lost meanwhile."""
        worker.in_flight += 1
        worker.on_lost.append(on_lost)
        try:
            yield
        finally:
            worker.in_flight -= 1
            worker.on_lost.remove(on_lost)
