"""What a controller consists of, and how a client's request becomes a job for the relay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request

from llava.fetch import resolve_host
from llava.serve.api.paths import CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH, WORKER_PATH
from llava.serve.api.validation import validate
from llava.serve.cluster.bodies import ModelRequest
from llava.serve.cluster.dispatch import RegisteredWorker, WorkerTable
from llava.serve.cluster.metrics import ControllerMetrics
from llava.serve.cluster.model_cards import ModelCards
from llava.serve.cluster.registry import WorkerRegistry
from llava.serve.cluster.relay import Job, Relay
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.cluster.stream_protocols import EVENTS, FRAMES, TYPED_EVENTS
from llava.serve.cluster.worker_client import WorkerClient
from llava.serve.http.addresses import Resolver
from llava.serve.http.client import BoundedClient, Timeouts
from llava.serve.http.errors import FieldError
from llava.serve.http.request_limiter import MAX_HELD_BODIES, RequestLimiter
from llava.serve.http.strict_json import read_json
from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

STREAM_PROTOCOLS = {CHAT_PATH: EVENTS, COMPLETIONS_PATH: EVENTS, RESPONSES_PATH: TYPED_EVENTS, WORKER_PATH: FRAMES}
"""How each endpoint streams; the others never do."""


class Controller:
    """The parts of one controller.

    table: who is registered. registry: the workers' side. relay, cards: the clients' side. limiter: how many requests are inside.
    metrics: what is counted.

    Args:
        settings: see there.
        outbound: carries the calls to workers; the network unless another is given.
        resolve: how a worker's host becomes addresses.
        clock: of the table.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        outbound: BoundedClient | None = None,
        resolve: Resolver = resolve_host,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outbound = outbound or BoundedClient()
        self.workers = WorkerClient(self.outbound, settings.worker_key)
        self.table = WorkerTable(settings.method, settings.expiry_seconds, clock, on_lost=self._on_lost)
        self.limiter = RequestLimiter(settings.max_in_flight, max_bytes=MAX_HELD_BODIES * settings.limits.max_body_bytes)
        self.metrics = ControllerMetrics(self.table, self.limiter)
        self.cards = ModelCards(self.workers.models)
        self.registry = WorkerRegistry(self.table, self.workers, settings.rules, settings.worker_tokens, resolve)
        self.relay = Relay(
            self.table,
            self.outbound,
            worker_key=settings.worker_key,
            timeouts=Timeouts(3.0, settings.worker_seconds, settings.worker_seconds, total=12 * settings.worker_seconds),
            send_seconds=settings.limits.send_seconds,
            on_retry=self.metrics.retried,
            on_error=self.metrics.failed,
            card_of=self.cards.of,
        )

    def _on_lost(self, worker: RegisteredWorker) -> None:
        logger.warning("worker %s is lost: it is gone, or was silent for too long", worker.name)
        self.metrics.lost()

    async def read_job(self, request: Request) -> Job:
        """A client's request to be relayed.

        Raises:
            ServeError: it cannot be read, or nobody serves its model.
        """
        body = await read_json(request)
        model = validate(ModelRequest, body).model
        self.check_model(model)
        path = request.url.path
        is_streamed = path == WORKER_PATH or body.get("stream") is True
        return Job(model, path, await request.body(), STREAM_PROTOCOLS.get(path) if is_streamed else None)

    def check_model(self, model: str) -> None:
        """Refuse a model that is not served: one that never was, while others are, is a client's mistake.

        Raises:
            ServeError: it is not served.
        """
        models = self.table.models()
        if model in models:
            return
        if not models or self.table.was_served(model):
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE)
        shown = ", ".join(repr(name[:100]) for name in models[:10])
        raise FieldError(f"There is no model {model[:100]!r} here, only {shown}.", "model", ErrorKind.MODEL_NOT_FOUND)

    def status(self) -> dict[str, Any]:
        """All workers as one, for a controller above this one."""
        workers = self.table.workers
        return {
            "model_names": self.table.models(),
            "speed": sum(worker.status.speed for worker in workers),
            "queue_length": sum(worker.status.queue_length for worker in workers),
        }
