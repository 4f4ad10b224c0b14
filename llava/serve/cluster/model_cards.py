"""What the models behind a controller can do, as their workers describe them at `/v1/models`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from llava.serve.api.validation import validate
from llava.serve.cluster.bodies import LenientModel
from llava.serve.cluster.dispatch import RegisteredWorker
from llava.serve.http.client import BrokenResponse, Unreachable
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ModelCard

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 5.0
"""How long a worker's description of its models is used before it is asked again."""


class ModelCards:
    """A cache of the workers' `/v1/models`.

    Args:
        ask: requests it from a worker.
    """

    def __init__(self, ask: Callable[[RegisteredWorker], Awaitable[Any]]) -> None:
        self._ask = ask
        self._entries: dict[str, dict[str, dict[str, Any]]] = {}  # by worker, then by model
        self._due: dict[str, float] = {}
        self._updating = asyncio.Lock()
        self._created = int(time.time())

    def expire(self, name: str) -> None:
        """Ask this worker again when its models are looked up next."""
        self._due.pop(name, None)

    async def of(self, worker: RegisteredWorker, model: str) -> ModelCard | None:
        """A worker's description of one of its models; `None` where it gives none, or an incomplete one."""
        async with self._updating:
            await self._update(worker)
        return read_card(self._entries.get(worker.name, {}).get(model))

    async def listed(self, workers: Sequence[RegisteredWorker]) -> dict[str, Any]:
        """The body of `/v1/models` for all workers together; a model without a description is listed by its name alone."""
        async with self._updating:
            names = {worker.name for worker in workers}
            self._due = {name: due for name, due in self._due.items() if name in names}
            self._entries = {name: entries for name, entries in self._entries.items() if name in names}
            await asyncio.gather(*(self._update(worker) for worker in workers))
        found: dict[str, dict[str, Any]] = {}
        for worker in workers:
            entries = self._entries.get(worker.name, {})
            for model in worker.status.models:
                plain = {"id": model, "object": "model", "created": self._created, "owned_by": "avg-llava"}
                if model not in found or model in entries:
                    found[model] = entries.get(model, plain)
        return {"object": "list", "data": [found[model] for model in sorted(found)]}

    async def _update(self, worker: RegisteredWorker) -> None:
        """Ask a worker again, unless its description is fresh."""
        if self._due.get(worker.name, 0.0) > time.monotonic():
            return
        self._due[worker.name] = time.monotonic() + _FRESH_SECONDS
        try:
            listed = await self._ask(worker)
        except (Unreachable, BrokenResponse) as error:
            logger.warning("worker %s does not describe its models: %s", worker.name, error)
            return
        entries = listed.get("data") if isinstance(listed, dict) else None
        by_name = {entry["id"]: entry for entry in entries if _is_named(entry)} if isinstance(entries, list) else {}
        self._entries[worker.name] = {model: by_name[model] for model in worker.status.models if model in by_name}


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), str)


class _CardFields(LenientModel):
    """A model as our own workers describe it."""

    id: str
    context_length: int = Field(ge=1)
    granularities: Annotated[list[Annotated[int, Field(ge=1, le=10**6)]], Field(max_length=64)]
    has_router: bool
    takes_images: bool
    max_images: int = Field(ge=0)


def read_card(entry: dict[str, Any] | None) -> ModelCard | None:
    """An entry of a worker's `/v1/models`; `None` where it is not one of our own workers'."""
    try:
        card = validate(_CardFields, entry)
    except FieldError:
        return None
    return ModelCard(card.id, card.context_length, tuple(card.granularities), card.has_router, card.takes_images, card.max_images)
