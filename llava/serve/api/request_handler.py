"""From a request's body to its answer, for every endpoint that asks the engine: parsed, its images loaded, generated, written.

A client that disconnects, or that stops reading, cancels its generations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response

from llava import __version__
from llava.serve.api.coalescing import CoalescedPieces, IndexedEvent, merge_events
from llava.serve.api.endpoints import GeneratingEndpoint
from llava.serve.api.image_loader import ImageLoader
from llava.serve.api.parsed_request import ParsedRequest, StreamWriter, Writer
from llava.serve.api.streamed_response import StreamedResponse
from llava.serve.api.tokenize import read_detokenize, read_tokenize, token_fields
from llava.serve.http.disconnect import cancel_on_disconnect
from llava.serve.http.errors import request_id_of, typed_error
from llava.serve.http.json_response import JsonResponse
from llava.serve.http.metrics import Metrics
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.http.strict_json import read_json
from llava.serve.protocol import (
    Engine,
    Event,
    Finished,
    Generation,
    GenerationRequest,
    Limits,
    Piece,
    ServeError,
    Started,
    TokenScore,
)

logger = logging.getLogger(__name__)


class RequestHandler:
    """Answers the requests of every API.

    Args:
        engine: generates. limits: of one request. limiter: counts requests in flight. image_loader: fetches and decodes. metrics: counts.
        stream_interval: tokens between two parts of a stream, see `CoalescedPieces`. report_cache_hits: see `create_worker_app`.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        limiter: RequestLimiter,
        image_loader: ImageLoader,
        metrics: Metrics,
        stream_interval: int = 1,
        report_cache_hits: bool = False,
    ) -> None:
        self.engine, self.limits, self.limiter = engine, limits, limiter
        self.image_loader, self.metrics, self.stream_interval = image_loader, metrics, stream_interval
        self.report_cache_hits = report_cache_hits
        self.created = int(time.time())

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would run."""
        return self.engine.ready and not self.limiter.draining

    def status(self) -> dict[str, Any]:
        """The worker's status as LLaVA's controller reads it."""
        return {"model_names": [self.engine.card.name], "speed": 1, "queue_length": self.limiter.in_flight}

    async def answer(self, request: Request, endpoint: GeneratingEndpoint) -> Response:
        """Answer a request of one of the APIs: with a stream where it asks for one, else with one body.

        An error before a stream's first event is a response with that error's status.
        """
        request_id = request_id_of(request.scope)
        parsed = endpoint.read(await read_json(request), self.engine.card, self.limits)
        writer = endpoint.writer(request_id, self.engine.card.name, parsed)
        events = self._loaded_events(parsed, request_id)
        if not parsed.stream:
            answers = await cancel_on_disconnect(request.receive, _collected(events, parsed.count))
            return JsonResponse(cast(Writer, writer).completion(answers))
        first = await cancel_on_disconnect(request.receive, anext(events))
        return StreamedResponse(self._streamed(parsed, writer, first, events, request_id), writer.media_type, self.limits.send_seconds)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Answer `/tokenize`."""
        card = self.engine.card
        parsed, asked = read_tokenize(await read_json(request), card, self.limits)
        request_id = request_id_of(request.scope)
        async with self.image_loader.loaded(parsed.sources, request_id) as images:
            [wanted] = parsed.requests(request_id, images)
            try:
                found = await cancel_on_disconnect(request.receive, self.engine.tokenize(wanted, asked.add_special_tokens is not False))
            except ServeError as error:
                raise parsed.with_client_names(error) from error
        return token_fields(found, card, bool(asked.return_token_strs))

    async def detokenize(self, request: Request) -> dict[str, str]:
        """Answer `/detokenize`."""
        ids = read_detokenize(await read_json(request), self.engine.card, self.limits)
        return {"prompt": await cancel_on_disconnect(request.receive, self.engine.detokenize(ids))}

    def server_info(self) -> dict[str, Any]:
        """What routers ask a server for, under SGLang's names."""
        card = self.engine.card
        return {
            "served_model_name": card.name,
            "version": __version__,
            "dp_size": 1,
            "tp_size": 1,
            "max_running_requests": self.limiter.capacity - self.limits.max_queue,
            "context_length": card.context_length,
        }

    def model_info(self) -> dict[str, Any]:
        """The same about the model. `model_path` is its name: where its files are is not disclosed."""
        card = self.engine.card
        return {
            "model_path": card.name,
            "is_generation": True,
            "model_type": "avg_llava" if card.granularities else None,
            "has_image_understanding": card.takes_images,
            "has_audio_understanding": False,
            "max_context_length": card.context_length,
        }

    async def _loaded_events(self, parsed: ParsedRequest, request_id: str) -> AsyncGenerator[IndexedEvent, None]:
        if parsed.user is not None:
            logger.info("request %s is of user %r", request_id, parsed.user)
        with self.limiter.admit_more(parsed.count - 1):
            async with self.image_loader.loaded(parsed.sources, request_id) as images:
                try:
                    async with aclosing(self._events(parsed.requests(request_id, images), parsed.stream)) as events:
                        async for event in events:
                            yield event
                except ServeError as error:
                    raise parsed.with_client_names(error) from error

    async def _streamed(
        self, parsed: ParsedRequest, writer: StreamWriter, first: IndexedEvent, events: AsyncGenerator[IndexedEvent, None], request_id: str
    ) -> AsyncGenerator[bytes, None]:
        endings: dict[int, Finished] = {}
        tail = b""
        async with aclosing(events):
            try:
                async for index, event in _with_first(first, events):
                    if isinstance(event, Started):
                        yield writer.on_started(index, event)
                    elif isinstance(event, Piece):
                        yield writer.on_text(index, event.text, event.scores)
                    else:
                        endings[index] = event
                        tail = writer.on_finished(index, event)
                        if len(endings) < parsed.count:
                            yield tail
                tail += writer.on_all_finished(endings)
            except Exception as raised:
                tail = writer.on_error(self._failed(raised, request_id), request_id)
            yield tail  # in one part: each costs a system call

    def _failed(self, raised: Exception, request_id: str) -> ServeError:
        error = typed_error(raised, request_id)
        self.metrics.failed(error.kind)
        return error

    async def _events(self, requests: Sequence[GenerationRequest], streamed: bool) -> AsyncGenerator[IndexedEvent, None]:
        """The events of all of one request's generations; whatever still runs at the end is cancelled."""
        running: list[Generation] = []
        try:
            for request in requests:
                running.append(self.engine.submit(request))
            merged = merge_events(running)
            async with aclosing(CoalescedPieces(merged, self.stream_interval).events() if streamed else merged) as events:
                async for index, event in events:
                    self._count(event)
                    yield index, event if self.report_cache_hits else _without_cache_hits(event)
        finally:
            for generation in running:
                generation.cancel()

    def _count(self, event: Event) -> None:
        if isinstance(event, Started):
            self.metrics.started(event)
        elif isinstance(event, Finished):
            self.metrics.finished(event)


def _without_cache_hits(event: Event) -> Event:
    if isinstance(event, Piece) or not event.images:
        return event
    return replace(event, images=tuple(replace(image, cached=None) for image in event.images))


async def _with_first(first: IndexedEvent, rest: AsyncIterator[IndexedEvent]) -> AsyncIterator[IndexedEvent]:
    yield first
    async for event in rest:
        yield event


async def _collected(events: AsyncGenerator[IndexedEvent, None], count: int) -> list[tuple[str, list[TokenScore], Finished]]:
    """Every choice's text, scores and end."""
    texts: list[list[str]] = [[] for _ in range(count)]
    scores: list[list[TokenScore]] = [[] for _ in range(count)]
    endings: dict[int, Finished] = {}
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, Piece):
                texts[index].append(event.text)
                scores[index].extend(event.scores)
            elif isinstance(event, Finished):
                endings[index] = event
    return [("".join(texts[index]), scores[index], endings[index]) for index in range(count)]
