"""The HTTP app of a worker over any `Engine`: the OpenAI API, LLaVA's worker protocol, and what operators and routers ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.responses import Response

from llava import __version__
from llava.serve.api.answer_fields import ErrorBody
from llava.serve.api.endpoints import BODY_SCHEMAS, GENERATING_ENDPOINTS, GeneratingEndpoint
from llava.serve.api.image_loader import ImageLoader
from llava.serve.api.llava import LLAVA_ERROR_BODIES
from llava.serve.api.model_list import ModelFields, ModelList, model_fields
from llava.serve.api.paths import DETOKENIZE_PATH, STATUS_PATH, TOKENIZE_PATH
from llava.serve.api.request_fields import check_model
from llava.serve.api.request_handler import RequestHandler
from llava.serve.api.tokenize import Tokens
from llava.serve.http.errors import error_response
from llava.serve.http.json_response import JsonResponse
from llava.serve.http.metrics import CONTENT_TYPE, Metrics
from llava.serve.http.middleware import guard_app
from llava.serve.http.openapi import describe_bodies
from llava.serve.http.request_limiter import MAX_HELD_BODIES, RequestLimiter
from llava.serve.http.server import DRAIN_SECONDS, make_server, run_server
from llava.serve.protocol import (
    DEFAULT_CONCURRENCY,
    Engine,
    ErrorKind,
    Limits,
    ServeError,
)

LEFTOVER_SECONDS = 5.0
"""For the engine to release what nobody waits for any more, once everyone was answered or cancelled."""


class Registrar(Protocol):
    """Registers a worker with whoever sends it requests, such as `llava.serve.cluster.registration.Registration`."""

    async def run(self, status: Callable[[], dict[str, Any]], leaving: Awaitable[None]) -> None:
        """Keep the worker registered until `leaving` is done; `status` is its current state."""
        ...


def create_worker_app(
    engine: Engine,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    registration: Registrar | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
    stream_interval: int = 1,
    not_ready: ErrorKind = ErrorKind.OVERLOADED,
    open_prefixes: Sequence[str] = (),
    image_loader: ImageLoader | None = None,
    report_cache_hits: bool = False,
) -> FastAPI:
    """The app of one worker.

    Args:
        engine: generates; started with the app, drained and closed when it ends.
        limits: of one request and of the queue.
        api_keys: every request but `/health` must present one of them; none: no key is required.
        allowed_origins: of web sites whose pages may call this server from a browser.
        registration: keeps the worker registered at a controller, or `None`.
        concurrency: requests that the engine runs at once; with `limits.max_queue` more waiting, the next is refused.
        stream_interval: tokens between two parts of a stream, see `CoalescedPieces`.
        not_ready: the error that `/ready` reports while the engine accepts no requests.
        open_prefixes: paths that need no key, such as those of a page mounted into this app.
        image_loader: fetches and decodes images; by default one that follows `limits`.
        report_cache_hits: report in answers which images' features were cached, which reveals what others have asked about.

    Returns:
        The app; `app.state.handler` is its `RequestHandler` and `app.state.limiter` its `RequestLimiter`.
    """
    limits = limits or Limits()
    limiter = RequestLimiter(concurrency + limits.max_queue, MAX_HELD_BODIES * limits.max_body_bytes)
    metrics = Metrics(engine.stats)
    image_loader = image_loader or ImageLoader(limits, engine.prepare_image)
    handler = RequestHandler(engine, limits, limiter, image_loader, metrics, stream_interval, report_cache_hits)
    app = FastAPI(
        title="AVG-LLaVA worker",
        version=__version__,
        lifespan=_lifespan_of(handler, registration),
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
        responses={"default": {"model": ErrorBody, "description": "What went wrong."}},
    )
    app.state.handler = handler
    app.state.failed = lambda: engine.stats().failed is not None
    _add_api_routes(app, handler)
    _add_operator_routes(app, handler, not_ready)
    describe_bodies(app, BODY_SCHEMAS, guarded=bool(api_keys))
    guard_app(
        app,
        limiter,
        limits,
        api_keys=api_keys,
        allowed_origins=allowed_origins,
        generating_paths=tuple(BODY_SCHEMAS),
        open_paths=("/health",),
        open_prefixes=open_prefixes,
        on_error=metrics.failed,
        error_bodies=LLAVA_ERROR_BODIES,
    )
    return app


def _lifespan_of(handler: RequestHandler, registration: Registrar | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    engine, limiter = handler.engine, handler.limiter

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        heartbeats = asyncio.create_task(registration.run(handler.status, limiter.wait_draining())) if registration is not None else None
        yield
        limiter.start_draining()  # unless a signal did
        if heartbeats is not None:
            await heartbeats
        with suppress(asyncio.TimeoutError):  # the server has waited for running answers, by its own `drain_seconds`
            await asyncio.wait_for(engine.drain(), LEFTOVER_SECONDS)
        handler.image_loader.close()
        await engine.close()

    return lifespan


def _add_api_routes(app: FastAPI, handler: RequestHandler) -> None:
    for path, endpoint in GENERATING_ENDPOINTS.items():
        _add_generating(app, path, handler, endpoint)

    @app.post(TOKENIZE_PATH, response_model=None, responses={200: {"model": Tokens}})
    async def tokenize(request: Request) -> dict[str, Any]:
        return await handler.tokenize(request)

    @app.post(DETOKENIZE_PATH, response_model=None, responses={200: {"model": dict[str, str]}})
    async def detokenize(request: Request) -> dict[str, str]:
        return await handler.detokenize(request)

    @app.get("/get_server_info", include_in_schema=False)  # older routers' names
    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        return handler.server_info()

    @app.get("/get_model_info", include_in_schema=False)
    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        return handler.model_info()

    @app.post(STATUS_PATH)
    async def worker_get_status() -> dict[str, Any]:
        return handler.status()

    @app.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_fields(handler.engine.card, handler.created)]}

    @app.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelFields}})
    async def get_model(model: str) -> dict[str, Any]:
        check_model(model, handler.engine.card)
        return model_fields(handler.engine.card, handler.created)


def _add_operator_routes(app: FastAPI, handler: RequestHandler, not_ready: ErrorKind) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", response_model=None, responses={200: {"model": dict[str, str]}})
    async def ready(request: Request) -> Response:
        if handler.is_ready:
            return JsonResponse({"status": "ready"})
        if handler.limiter.draining:
            return error_response(ServeError(ErrorKind.DRAINING), request.scope)
        if failed := handler.engine.stats().failed:
            return error_response(ServeError(failed), request.scope)
        detail = "The engine accepts no requests now." if not_ready is ErrorKind.OVERLOADED else None
        return error_response(ServeError(not_ready, detail), request.scope)

    @app.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(handler.metrics.render(), media_type=CONTENT_TYPE)


def _add_generating(app: FastAPI, path: str, handler: RequestHandler, endpoint: GeneratingEndpoint) -> None:
    answers: dict[int | str, dict[str, Any]] = {200: {"model": endpoint.answer}} if endpoint.answer is not None else {}

    @app.post(path, name=path.strip("/").replace("/", "_"), response_model=None, responses=answers)
    async def answer(request: Request) -> Response:
        return await handler.answer(request, endpoint)


def run_worker(app: FastAPI, host: str, port: int, *, log_level: str = "info", drain_seconds: float = DRAIN_SECONDS, **options: Any) -> int:
    """Serve an app until SIGTERM or SIGINT, then drain: finish running requests and refuse new ones.

    Args:
        port: 0 takes a free one; it is printed.
        options: uvicorn's own, such as `ssl_keyfile`.

    Returns:
        0, or 1 when the server could not start or its engine failed for good.
    """
    return run_server(make_server(app, host, port, log_level=log_level, drain_seconds=drain_seconds, **options))
