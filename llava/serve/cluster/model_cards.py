"""What the models behind a controller can do, as their workers describe them at `/v1/models`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from llava.serve.api.openai_chat import validate
from llava.serve.cluster.bodies import LenientModel
from llava.serve.cluster.dispatch import Worker
from llava.serve.http.client import BrokenOff, Unreachable
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ModelCard

logger = logging.getLogger(__name__)

_CARDS_SECONDS = 5.0
"""After which a worker is asked again for what its models can do."""


class ModelCards:
    """What the workers say of their models at `/v1/models`, each asked now and then.

    Args:
        ask: a worker, for its list.
    """

    def __init__(self, ask: Callable[[Worker], Awaitable[Any]]) -> None:
        self._ask = ask
        self._cards: dict[str, dict[str, dict[str, Any]]] = {}  # per worker and model
        self._due: dict[str, float] = {}
        self._learning = asyncio.Lock()
        self._created = int(time.time())

    def forget(self, name: str) -> None:
        """Ask this worker again when its models are wanted next."""
        self._due.pop(name, None)

    async def of(self, worker: Worker, model: str) -> ModelCard | None:
        """What a worker says of one of its models; `None` where it does not, or not in full."""
        async with self._learning:
            if self._due.get(worker.name, 0.0) <= time.monotonic():
                await self._learn(worker)
        return read_card(self._cards.get(worker.name, {}).get(model))

    async def listed(self, workers: Sequence[Worker]) -> dict[str, Any]:
        """The value of `/v1/models` for all workers together; a model that nobody describes is named all the same."""
        async with self._learning:
            now, names = time.monotonic(), {worker.name for worker in workers}
            self._due = {name: due for name, due in self._due.items() if name in names}
            self._cards = {name: cards for name, cards in self._cards.items() if name in names}
            await asyncio.gather(*(self._learn(worker) for worker in workers if self._due.get(worker.name, 0.0) <= now))
        found: dict[str, dict[str, Any]] = {}
        for worker in workers:
            cards = self._cards.get(worker.name, {})
            for model in worker.status.models:
                plain = {"id": model, "object": "model", "created": self._created, "owned_by": "avg-llava"}
                if model not in found or model in cards:
                    found[model] = cards.get(model, plain)
        return {"object": "list", "data": [found[model] for model in sorted(found)]}

    async def _learn(self, worker: Worker) -> None:
        self._due[worker.name] = time.monotonic() + _CARDS_SECONDS
        try:
            listed = await self._ask(worker)
        except (Unreachable, BrokenOff) as error:
            logger.warning("worker %s does not describe its models: %s", worker.name, error)
            return
        entries = listed.get("data") if isinstance(listed, dict) else None
        told = {entry["id"]: entry for entry in entries if _is_card(entry)} if isinstance(entries, list) else {}
        self._cards[worker.name] = {model: told[model] for model in worker.status.models if model in told}


def _is_card(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), str)


class _CardFields(LenientModel):
    """A model as a worker of ours tells it."""

    id: str
    context_length: int = Field(ge=1)
    granularities: Annotated[list[Annotated[int, Field(ge=1, le=10**6)]], Field(max_length=64)]
    has_router: bool
    takes_images: bool
    max_images: int = Field(ge=0)


def read_card(entry: dict[str, Any] | None) -> ModelCard | None:
    """An entry of a worker's `/v1/models`; `None` where it is not one of ours."""
    try:
        told = validate(_CardFields, entry)
    except FieldError:
        return None
    return ModelCard(told.id, told.context_length, tuple(told.granularities), told.has_router, told.takes_images, told.max_images)
