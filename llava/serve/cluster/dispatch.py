"""The controller's table of workers: who is there, who is alive, and who gets the next request. No network, and a clock from outside."""

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
"""How long a worker that could not be reached is passed over while another one has the model."""


class DispatchMethod(Enum):
    """How one of several workers is chosen: `LOTTERY` draws by speed, `SHORTEST_QUEUE` takes the least work per speed."""

    LOTTERY = "lottery"
    SHORTEST_QUEUE = "shortest_queue"


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker says of itself. models: names it serves. speed: relative to others, above 0. queue_length: requests it has now."""

    models: tuple[str, ...]
    speed: float = 1.0
    queue_length: int = 0


@dataclass
class Worker:
    """A registered worker.

    name: its URL in one spelling. check_heart_beat: whether silence ends its registration. last_beat: when it was last heard of.
    in_flight: requests this controller has sent it. others: what it had besides these when it last told; clients that ask it themselves
    bring such work. handed_out: times its address was given to a client since the last heart beat. registered_from: the peer that
    registered it. down_until: it is passed over until then. last_chosen: number of the choice that fell on it last. silent: it has not
    answered for too long, and nobody gets it until it does again. on_lost: called once when it goes silent or is forgotten for it.
    """

    name: str
    endpoint: Endpoint
    status: WorkerStatus
    check_heart_beat: bool
    registered_from: str | None
    last_beat: float
    in_flight: int = 0
    others: int = 0
    handed_out: int = 0
    down_until: float = 0.0
    last_chosen: int = 0
    silent: bool = False
    on_lost: list[Callable[[], None]] = field(default_factory=list)

    @property
    def load(self) -> float:
        """Work ahead of a new request, in units of this worker's speed."""
        return (self.in_flight + self.others + self.handed_out) / self.status.speed

    def tell(self, status: WorkerStatus) -> None:
        """Note what the worker says of itself now.

        Of its queue only the others' work is kept: ours is counted as it comes and goes, and a number told at a burst's top would outlive
        the burst by a whole heart beat.
        """
        self.status, self.others = status, max(0, status.queue_length - self.in_flight)


class WorkerTable:
    """Workers by name.

    Args:
        method: how one of several is chosen.
        expiry_seconds: silence after which a worker is forgotten.
        clock: seconds that only grow.
        draw: source of the lottery's numbers.
        on_lost: told of each worker that is lost: silent for too long, or not there any more.
    """

    def __init__(
        self,
        method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE,
        expiry_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
        on_lost: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        self.method = method
        self.expiry_seconds = expiry_seconds
        self._clock = clock
        self._draw = draw or random.Random()
        self._on_lost = on_lost
        self._workers: dict[str, Worker] = {}
        self._remembered: dict[str, None] = {}
        self._choices = 0

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def workers(self) -> list[Worker]:
        """The living ones, in the order of their first registration."""
        self.expire()
        return [worker for worker in self._workers.values() if not worker.silent]

    @property
    def unbeating(self) -> list[Worker]:
        """Those that send no heart beats, and have to be asked whether they are alive; the silent ones too."""
        return [worker for worker in self._workers.values() if not worker.check_heart_beat]

    def register(
        self, endpoint: Endpoint, status: WorkerStatus, check_heart_beat: bool = True, registered_from: str | None = None
    ) -> Worker:
        """Add a worker, or renew it; what this controller knows of its own requests stays.

        Args:
            registered_from: the peer that speaks for it.

        Raises:
            OverflowError: the table is full.
        """
        self.expire()
        name = endpoint.url.text
        known = self._workers.get(name)
        if known is None and len(self._workers) >= MAX_WORKERS:
            raise OverflowError(f"There are {MAX_WORKERS} workers already, expected fewer; stop one or start a second controller.")
        if known is None:
            known = Worker(name, endpoint, status, check_heart_beat, registered_from, self._clock())
            self._workers[name] = known
        known.endpoint, known.check_heart_beat, known.registered_from = endpoint, check_heart_beat, registered_from
        known.tell(status)
        self.heard_of(known)
        for model in status.models:
            if len(self._remembered) < MAX_REMEMBERED_MODELS:
                self._remembered[model] = None
        return known

    def find(self, name: str) -> Worker | None:
        """A registered worker by its name."""
        self.expire()
        return self._workers.get(name)

    def beat(self, name: str, queue_length: int) -> bool:
        """Note a heart beat; `False` where the worker is not known and has to register again."""
        worker = self.find(name)
        if worker is None:
            return False
        worker.tell(replace(worker.status, queue_length=queue_length))
        self.heard_of(worker)
        return True

    def heard_of(self, worker: Worker) -> None:
        """Note a sign of life."""
        worker.last_beat, worker.down_until, worker.handed_out, worker.silent = self._clock(), 0.0, 0, False

    def not_heard_of(self, worker: Worker) -> None:
        """Note that a worker that sends no heart beats did not answer; after too long it counts as silent.

        It stays registered: nobody would register it again when it comes back.
        """
        if not worker.silent and worker.last_beat < self._clock() - self.expiry_seconds:
            worker.silent = True
            self._lose(worker)

    def _lose(self, worker: Worker) -> None:
        self._on_lost(worker)
        for call in tuple(worker.on_lost):
            call()

    def update(self, worker: Worker, status: WorkerStatus) -> None:
        """Note what a worker says of itself when it is asked; no heart beat."""
        worker.tell(status)

    def remove(self, name: str) -> None:
        """Forget a worker, if it is known; what it is answering goes on."""
        self._workers.pop(name, None)

    def lose(self, worker: Worker) -> None:
        """Forget a worker that is not there any more."""
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]
            self._lose(worker)

    def expire(self) -> None:
        """Forget the workers that were silent for too long."""
        oldest = self._clock() - self.expiry_seconds
        for worker in [w for w in self._workers.values() if w.check_heart_beat and w.last_beat < oldest]:
            self.lose(worker)

    def models(self) -> list[str]:
        """Names of all models that somebody serves, sorted."""
        return sorted({model for worker in self.workers for model in worker.status.models})

    def was_known(self, model: str) -> bool:
        """Whether somebody has served this model since the controller started."""
        return model in self._remembered

    def choose(self, model: str, excluded: Collection[str] = ()) -> Worker | None:
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

    def mark_down(self, worker: Worker) -> None:
        """Pass a worker over for a while, until its next heart beat at most: it could not be reached or broke off."""
        worker.down_until = self._clock() + DOWN_SECONDS

    @contextmanager
    def using(self, worker: Worker, on_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Count a request as sent to a worker while the block runs; `on_lost` is called if the worker is lost meanwhile."""
        worker.in_flight += 1
        worker.on_lost.append(on_lost)
        try:
            yield
        finally:
            worker.in_flight -= 1
            worker.on_lost.remove(on_lost)
