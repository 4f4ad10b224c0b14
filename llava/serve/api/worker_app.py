"""The HTTP side of a worker, whatever engine stands behind it: LLaVA's worker protocol and the OpenAI API over one `Engine`.

A body becomes generation requests, events become parts of a stream or one answer. A client that goes away, or that does not read, ends
its generation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol, cast

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava import __version__
from llava.serve.api.coalescing import CoalescedPieces, IndexedEvent, merged
from llava.serve.api.endpoints import BODY_SCHEMAS, GENERATING_ENDPOINTS, GeneratingEndpoint
from llava.serve.api.image_loader import ImageLoader
from llava.serve.api.llava import LLAVA_ERROR_BODIES
from llava.serve.api.openai_chat import ErrorBody, ModelFields, ModelList, check_model, model_fields
from llava.serve.api.parsed_request import Call, StreamWriter, Writer
from llava.serve.api.paths import DETOKENIZE_PATH, STATUS_PATH, TOKENIZE_PATH
from llava.serve.api.tokenize import Tokens, read_detokenize, read_tokenize, token_fields
from llava.serve.http.errors import error_response, request_id_of, typed_error
from llava.serve.http.json_response import JsonResponse
from llava.serve.http.metrics import CONTENT_TYPE, Metrics
from llava.serve.http.middleware import cancel_on_disconnect, guard_app
from llava.serve.http.openapi import describe_bodies
from llava.serve.http.request_limiter import HELD_BODIES, RequestLimiter
from llava.serve.http.server import DRAIN_SECONDS, make_server, run_server
from llava.serve.http.strict_json import read_json
from llava.serve.http.watchdog import with_send_timeout
from llava.serve.protocol import (
    Engine,
    ErrorKind,
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

__all__ = ["Worker", "create_worker_app", "run_worker"]

logger = logging.getLogger(__name__)

DEFAULT_PLACES = 16
LEFTOVER_SECONDS = 5.0
"""That the engine gets, after everyone was answered or cancelled, to let go of what nobody waits for any more."""


class Worker:
    """Answers the calls of all protocols.

    Args:
        engine: makes the answers. limits: of one request. limiter: counts the requests inside. pictures: decodes. metrics: counts.
        stream_interval: tokens between two parts of a stream, see `CoalescedPieces`. report_cache_hits: see `create_worker_app`.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        limiter: RequestLimiter,
        pictures: ImageLoader,
        metrics: Metrics,
        stream_interval: int = 1,
        report_cache_hits: bool = False,
    ) -> None:
        self.engine, self.limits, self.limiter = engine, limits, limiter
        self.pictures, self.metrics, self.stream_interval = pictures, metrics, stream_interval
        self.report_cache_hits = report_cache_hits
        self.created = int(time.time())

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be worked on."""
        return self.engine.ready and not self.limiter.draining

    def status(self) -> dict[str, Any]:
        """What LLaVA's controller wants to know."""
        return {"model_names": [self.engine.card.name], "speed": 1, "queue_length": self.limiter.inside}

    async def answer(self, request: Request, endpoint: GeneratingEndpoint) -> Response:
        """Answer a request of one of the APIs: with a stream where one is asked for, else with one body.

        What goes wrong before a stream's first event has a status of its own.
        """
        request_id = request_id_of(request.scope)
        call = endpoint.read(await read_json(request), self.engine.card, self.limits)
        writer = endpoint.writer(request_id, self.engine.card.name, call)
        events = self._call_events(call, request_id)
        if not call.stream:
            answers = await cancel_on_disconnect(request.receive, _collected(events, call.count))
            return JsonResponse(cast(Writer, writer).completion(answers))
        first = await cancel_on_disconnect(request.receive, anext(events))
        return StreamedResponse(self._parts(call, writer, first, events, request_id), writer.media_type, self.limits.send_seconds)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Answer `/tokenize`."""
        card = self.engine.card
        call, asked = read_tokenize(await read_json(request), card, self.limits)
        async with self.pictures.loaded(call.sources) as images:
            [wanted] = call.requests(request_id_of(request.scope), images)
            try:
                found = await cancel_on_disconnect(request.receive, self.engine.tokenize(wanted, asked.add_special_tokens is not False))
            except ServeError as error:
                raise call.named(error) from error
        return token_fields(found, card, bool(asked.return_token_strs))

    async def detokenize(self, request: Request) -> dict[str, str]:
        """Answer `/detokenize`."""
        ids = read_detokenize(await read_json(request), self.engine.card, self.limits)
        return {"prompt": await cancel_on_disconnect(request.receive, self.engine.detokenize(ids))}

    def server_info(self) -> dict[str, Any]:
        """What routers in front of servers ask for, under the names that SGLang gives it."""
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
        """The same about the model. `model_path` is its name: where its files are is nobody's business."""
        card = self.engine.card
        return {
            "model_path": card.name,
            "is_generation": True,
            "model_type": "avg_llava" if card.granularities else None,
            "has_image_understanding": card.takes_images,
            "has_audio_understanding": False,
            "max_context_length": card.context_length,
        }

    async def _call_events(self, call: Call, request_id: str) -> AsyncGenerator[IndexedEvent, None]:
        if call.user is not None:
            logger.info("request %s is of user %r", request_id, call.user)
        with self.limiter.more_places(call.count - 1):
            async with self.pictures.loaded(call.sources) as images:
                try:
                    async with aclosing(self._events(call.requests(request_id, images), call.stream)) as events:
                        async for event in events:
                            yield event
                except ServeError as error:
                    raise call.named(error) from error

    async def _parts(
        self, call: Call, writer: StreamWriter, first: IndexedEvent, events: AsyncGenerator[IndexedEvent, None], request_id: str
    ) -> AsyncGenerator[bytes, None]:
        endings: dict[int, Finished] = {}
        tail = b""
        async with aclosing(events):
            try:
                async for index, event in _with_first(first, events):
                    if isinstance(event, Started):
                        yield writer.opening(index, event)
                    elif isinstance(event, Piece):
                        yield writer.piece(index, event.text, event.scores)
                    else:
                        endings[index] = event
                        tail = writer.ending(index, event)
                        if len(endings) < call.count:
                            yield tail
                tail += writer.closing(endings)
            except Exception as raised:
                tail = writer.failure(self._failed(raised, request_id), request_id)
            yield tail  # in one piece: each costs a call of the system

    def _failed(self, raised: Exception, request_id: str) -> ServeError:
        error = typed_error(raised, request_id)
        self.metrics.failed(error.kind)
        return error

    async def _events(self, requests: Sequence[GenerationRequest], streamed: bool) -> AsyncGenerator[IndexedEvent, None]:
        """The events of all of one call's generations as they come; what is left of them at the end is cancelled."""
        running: list[Generation] = []
        try:
            for request in requests:
                running.append(self.engine.submit(request))
            found = merged(running)
            async with aclosing(CoalescedPieces(found, self.stream_interval).events() if streamed else found) as events:
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
    """Every choice's text, scores and ending."""
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


class StreamedResponse(Response):
    """A response whose parts go out one by one, each at once.

    Args:
        parts: closed at the end, whatever the end is. send_seconds: that the client may take to read one part.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, send_seconds: float) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.parts, self.send_seconds = parts, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await cancel_on_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.parts):
            with with_send_timeout(send, self.send_seconds) as sending:
                await sending({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for part in self.parts:
                    await sending({"type": "http.response.body", "body": part, "more_body": True})
                await sending({"type": "http.response.body", "body": b"", "more_body": False})


class Registrar(Protocol):
    """Makes a worker known to whoever sends it requests, such as `llava.serve.cluster.registration.Registration`."""

    async def run(self, status: Callable[[], dict[str, Any]], leaving: Awaitable[None]) -> None:
        """Keep the worker known until `leaving` is done; `status` is its state as of now."""
        ...


def create_worker_app(
    engine: Engine,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    registration: Registrar | None = None,
    places: int = DEFAULT_PLACES,
    stream_interval: int = 1,
    not_ready: ErrorKind = ErrorKind.OVERLOADED,
    open_prefixes: Sequence[str] = (),
    pictures: ImageLoader | None = None,
    report_cache_hits: bool = False,
) -> FastAPI:
    """The app of one worker.

    Args:
        engine: makes the answers; drained and closed when the app ends.
        limits: of one request and of the queue.
        api_keys: one of them must come with every request but `/health`; none given, none asked for.
        allowed_origins: of web sites whose pages may ask from a browser.
        registration: a controller to register at, or `None`.
        places: requests that the engine answers at once; with `limits.max_queue` more waiting, the next is refused.
        stream_interval: tokens between two parts of a stream, see `CoalescedPieces`.
        not_ready: what `/ready` says where the engine takes no requests.
        open_prefixes: paths that need no key, such as those of a page mounted into this app.
        pictures: decodes and fetches; one by `limits` when missing.
        report_cache_hits: tell in answers which images' features were there already, and with that what others have asked about.

    Returns:
        The app; `app.state.worker` is its `Worker` and `app.state.limiter` its `RequestLimiter`.
    """
    limits = limits or Limits()
    limiter = RequestLimiter(places + limits.max_queue, HELD_BODIES * limits.max_body_bytes)
    metrics = Metrics(engine.stats)
    pictures = pictures or ImageLoader(limits, engine.prepare_image)
    worker = Worker(engine, limits, limiter, pictures, metrics, stream_interval, report_cache_hits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        beats = asyncio.create_task(registration.run(worker.status, limiter.wait_draining())) if registration is not None else None
        yield
        limiter.start_draining()  # if no signal said so before
        if beats is not None:
            await beats
        with suppress(asyncio.TimeoutError):  # the server has waited for running answers, by its own `drain_seconds`
            await asyncio.wait_for(engine.drain(), LEFTOVER_SECONDS)
        worker.pictures.close()
        await engine.close()

    app = FastAPI(
        title="AVG-LLaVA worker",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
    )
    app.state.worker = worker
    app.state.failed = lambda: engine.stats().failed is not None
    _add_routes(app, worker, metrics, not_ready)
    describe_bodies(app, BODY_SCHEMAS, guarded=bool(api_keys))
    guard_app(
        app,
        limiter,
        limits,
        api_keys=api_keys,
        allowed_origins=allowed_origins,
        generating_paths=tuple(BODY_SCHEMAS),
        open_prefixes=open_prefixes,
        on_error=metrics.failed,
        error_bodies=LLAVA_ERROR_BODIES,
    )
    return app


def _add_routes(app: FastAPI, worker: Worker, metrics: Metrics, not_ready: ErrorKind) -> None:
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "What went wrong."}}

    for path, endpoint in GENERATING_ENDPOINTS.items():
        _add_answering(app, path, worker, endpoint, errors)

    @app.post(TOKENIZE_PATH, response_model=None, responses={200: {"model": Tokens}, **errors})
    async def tokenize(request: Request) -> dict[str, Any]:
        return await worker.tokenize(request)

    @app.post(DETOKENIZE_PATH, response_model=None, responses={200: {"model": dict[str, str]}, **errors})
    async def detokenize(request: Request) -> dict[str, str]:
        return await worker.detokenize(request)

    @app.get("/get_server_info", include_in_schema=False)  # older routers' names
    @app.get("/server_info", responses=errors)
    async def server_info() -> dict[str, Any]:
        return worker.server_info()

    @app.get("/get_model_info", include_in_schema=False)
    @app.get("/model_info", responses=errors)
    async def model_info() -> dict[str, Any]:
        return worker.model_info()

    @app.post(STATUS_PATH, responses=errors)
    async def worker_get_status() -> dict[str, Any]:
        return worker.status()

    @app.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **errors})
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_fields(worker.engine.card, worker.created)]}

    @app.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelFields}, **errors})
    async def get_model(model: str) -> dict[str, Any]:
        check_model(model, worker.engine.card)
        return model_fields(worker.engine.card, worker.created)

    @app.get("/health", responses=errors)
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", response_model=None, responses={200: {"model": dict[str, str]}, **errors})
    async def ready(request: Request) -> Response:
        if worker.is_ready:
            return JsonResponse({"status": "ready"})
        if worker.limiter.draining:
            return error_response(ServeError(ErrorKind.DRAINING), request.scope)
        if failed := worker.engine.stats().failed:
            return error_response(ServeError(failed), request.scope)
        detail = "The engine takes no requests now." if not_ready is ErrorKind.OVERLOADED else None
        return error_response(ServeError(not_ready, detail), request.scope)

    @app.get("/metrics", response_model=None, responses=errors)
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _add_answering(app: FastAPI, path: str, worker: Worker, endpoint: GeneratingEndpoint, errors: dict[int | str, dict[str, Any]]) -> None:
    told: dict[int | str, dict[str, Any]] = {200: {"model": endpoint.answer}} if endpoint.answer is not None else {}

    @app.post(path, name=path.strip("/").replace("/", "_"), response_model=None, responses={**told, **errors})
    async def answer(request: Request) -> Response:
        return await worker.answer(request, endpoint)


def run_worker(app: FastAPI, host: str, port: int, *, log_level: str = "info", drain_seconds: float = DRAIN_SECONDS, **options: Any) -> int:
    """Serve an app until SIGTERM or SIGINT, then finish what runs, refusing new requests.

    Args:
        port: 0 takes a free one; it is printed.
        options: uvicorn's own, such as `ssl_keyfile`.

    Returns:
        0, or 1 when the server could not start or its engine failed for good.
    """
    return run_server(make_server(app, host, port, log_level=log_level, drain_seconds=drain_seconds, **options))
