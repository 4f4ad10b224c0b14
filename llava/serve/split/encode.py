"""From prepared requests to the rows that take their images' places: encode, route, pool and merge, batched over requests."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.inference import Assistant
from llava.model.compose import ImageInput, RoutingPlan
from llava.model.image_embeds import check_rows
from llava.model.merge import MergedLayout
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.encode import ImageEncoder
from llava.serve.engine.task import Prepared
from llava.serve.protocol import GenerationRequest, ImageReport
from llava.timing import StageTimer

logger = logging.getLogger(__name__)

_MAX_TOGETHER = 16
"""Requests that are encoded in one pass."""


@dataclass(frozen=True)
class EncodedImages:
    """The images of one request, decided. rows: (T, D) of each, on the model's device. milliseconds: of the pass that encoded them."""

    rows: tuple[Tensor, ...]
    reports: tuple[ImageReport, ...]
    milliseconds: dict[str, float]


class RowEncoder:
    """Makes rows of images, and keeps them by image, granularity and model revision.

    One cache holds both features and rows. Features answer any granularity and feed the router; rows are what is sent, a small part of
    that, and enough where a request leaves the router no choice.

    Args:
        assistant: the front of the model. kept: the cache.
    """

    def __init__(self, assistant: Assistant, kept: TensorCache) -> None:
        self.model, self.kept = assistant.model, kept
        self.images = ImageEncoder(assistant, kept)

    def encode(self, requests: Sequence[GenerationRequest], prepared: Sequence[Prepared]) -> list[EncodedImages]:
        """
        Raises:
            FloatingPointError: rows that are not finite.
        """
        timer = StageTimer(self.model.device)
        prompts = [each.prompt for each in prepared]
        images = [image for each in prepared for image in each.images]
        keys = [key for each in prepared for key in each.keys]
        sizes = [image.size for request in requests for image in request.images]
        plan = self.model.plan(prompts, images, [request.routing for request in requests])
        known = self._known(plan, keys)
        open_rows = [row for row, owned in enumerate(plan.owners) if not all(image in known for image in owned)]
        found, hits = self.images.encoded_images([prepared[row] for row in open_rows], timer)
        cached = dict.fromkeys(known, True)
        for image, encoded, hit in zip([image for row in open_rows for image in plan.owners[row]], found, hits, strict=True):
            images[image], cached[image] = encoded, hit
        logits = self.model.logits_where_asked(prompts, images, plan, timer)
        levels = plan.choose(logits)
        with timer("splice"):
            rows = [
                known[image] if image in known else self._pooled(keys[image], level, images[image], plan.layouts[image][level])
                for image, level in enumerate(levels)
            ]
        reports = [
            self.images.plain(self.model.report(level, plan.layouts[image], logits.get(image)), cached[image], sizes[image])
            for image, level in enumerate(levels)
        ]
        return [
            EncodedImages(tuple(rows[image] for image in owned), tuple(reports[image] for image in owned), dict(timer.milliseconds))
            for owned in plan.owners
        ]

    def _known(self, plan: RoutingPlan, keys: Sequence[str]) -> dict[int, Tensor]:
        """Cached rows by image, where the request leaves one level open."""
        known = {}
        for row, owned in enumerate(plan.owners):
            for image, levels in zip(owned, plan.levels(row), strict=True):
                key = self._key(keys[image], levels[0])
                if len(levels) == 1 and key in self.kept and (rows := self.kept.get(key)) is not None:
                    known[image] = rows[0]
        return known

    def _key(self, image: str, level: int) -> str:
        return f"{image} at {self.model.levels[level].tokens}"

    def _pooled(self, key: str, level: int, image: ImageInput, layout: MergedLayout) -> Tensor:
        rows: Tensor = self.model.visual_tokens(image.features, level, layout)
        check_rows(rows, layout.num_tokens, self.model.get_input_embeddings().weight.shape[1], self.model.dtype)
        self.kept.put(self._key(key, level), rows)
        return rows


@dataclass(frozen=True, eq=False)
class _Job:
    request: GenerationRequest
    prepared: Prepared
    done: Future[EncodedImages] = field(default_factory=Future)


class BatchedEncoder:
    """Encodes requests in one thread: those that came while it was busy, together.

    Args:
        rows: encodes them.
    """

    def __init__(self, rows: RowEncoder) -> None:
        self.rows = rows
        self._waiting: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

    async def encode(self, request: GenerationRequest, prepared: Prepared) -> EncodedImages:
        """
        Raises:
            ServeError: the request cannot be met. Exception: whatever else the pass failed with.
        """
        job = _Job(request, prepared)
        self._waiting.append(job)
        self._thread.submit(self._encode_waiting)
        return await asyncio.wrap_future(job.done)

    def close(self) -> None:
        """Wait for the running pass, and drop what waits."""
        self._thread.shutdown(cancel_futures=True)

    def _encode_waiting(self) -> None:
        """Whoever is called first takes all; the calls of the others find nothing left."""
        taken = [self._waiting.popleft() for _ in range(min(_MAX_TOGETHER, len(self._waiting)))]
        self._encode([job for job in taken if job.done.set_running_or_notify_cancel()])

    def _encode(self, jobs: Sequence[_Job]) -> None:
        """Encode together; if that fails, one by one, so that a bad request fails alone."""
        if not jobs:
            return
        try:
            with torch.inference_mode():
                found = self.rows.encode([job.request for job in jobs], [job.prepared for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
                return
            logger.warning("a batch of %d requests failed (%s); they are encoded one by one", len(jobs), type(error).__name__)
            for job in jobs:
                self._encode([job])
            return
        for job, images in zip(jobs, found, strict=True):
            job.done.set_result(images)
