"""The controller as an ASGI app: one endpoint per function, for workers, clients and operators.

It speaks LLaVA's protocol (`/register_worker`, `/receive_heart_beat`, `/list_models`, `/get_worker_address`, `/refresh_all_workers`,
`/worker_generate_stream`, `/worker_get_status`; `/unregister_worker` is our own) and the OpenAI API. It keeps nothing on disk: after a
restart workers register again by themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from llava import __version__
from llava.fetch import resolve_host
from llava.serve.api.endpoints import BODY_SCHEMAS
from llava.serve.api.llava import LLAVA_ERROR_BODIES
from llava.serve.api.paths import STATUS_PATH
from llava.serve.api.validation import validate
from llava.serve.cluster.bodies import HeartbeatRequest, ModelRequest, RegisterRequest, UnregisterRequest
from llava.serve.cluster.controller import Controller
from llava.serve.cluster.liveness import watch
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.http.addresses import Resolver
from llava.serve.http.client import BoundedClient
from llava.serve.http.errors import error_response
from llava.serve.http.json_response import JsonResponse
from llava.serve.http.metrics import CONTENT_TYPE
from llava.serve.http.middleware import guard_app
from llava.serve.http.openapi import describe_bodies
from llava.serve.http.strict_json import read_json
from llava.serve.protocol import ErrorKind, ServeError

_WORKER_SCHEMAS: dict[str, type[BaseModel]] = {
    "/register_worker": RegisterRequest,
    "/receive_heart_beat": HeartbeatRequest,
    "/unregister_worker": UnregisterRequest,
}
SCHEMAS: dict[str, type[BaseModel]] = {**BODY_SCHEMAS, **_WORKER_SCHEMAS, "/get_worker_address": ModelRequest}
"""The body of each endpoint that takes one."""


def create_controller_app(
    settings: ControllerSettings | None = None,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    resolve: Resolver = resolve_host,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The controller as an ASGI app; its `Controller` is at `app.state.controller`.

    Args:
        transport: carries all calls to workers. resolve: how a worker's host becomes addresses. clock: of the table. Tests give their own.
    """
    settings = settings or ControllerSettings()
    controller = Controller(settings, BoundedClient(transport), resolve, clock)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch(controller.table, controller.workers.is_alive))
        yield
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await controller.outbound.close()

    app = FastAPI(title="AVG-LLaVA controller", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.controller = controller
    _add_worker_endpoints(app, controller)
    _add_client_endpoints(app, controller)
    _add_operator_endpoints(app, controller)
    describe_bodies(app, SCHEMAS, guarded=bool(settings.api_keys))
    guard_app(
        app,
        controller.limiter,
        settings.limits,
        api_keys=settings.api_keys,
        allowed_origins=settings.allowed_origins,
        generating_paths=tuple(BODY_SCHEMAS),
        small_paths=tuple(_WORKER_SCHEMAS),
        open_paths=("/health", "/ready", *_WORKER_SCHEMAS),  # workers send a token of their own, see `WorkerRegistry.read`
        on_error=controller.metrics.failed,
        error_bodies=LLAVA_ERROR_BODIES,
    )
    return app


def _add_worker_endpoints(app: FastAPI, controller: Controller) -> None:
    registry = controller.registry

    @app.post("/register_worker", summary="A worker announces itself")
    async def register_worker(request: Request) -> None:
        worker = await registry.register(*await registry.read(request, RegisterRequest))
        controller.cards.expire(worker.name)

    @app.post("/receive_heart_beat", summary="A worker is alive")
    async def receive_heart_beat(request: Request) -> dict[str, bool]:
        return {"exist": registry.heartbeat(*await registry.read(request, HeartbeatRequest))}

    @app.post("/unregister_worker", summary="A worker takes no more requests")
    async def unregister_worker(request: Request) -> dict[str, bool]:
        return {"exist": registry.unregister(*await registry.read(request, UnregisterRequest))}


def _add_client_endpoints(app: FastAPI, controller: Controller) -> None:
    @app.post("/refresh_all_workers", summary="Ask all workers how they are")
    async def refresh_all_workers() -> None:
        await controller.registry.refresh()

    @app.post("/list_models", summary="Names of the models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": controller.table.models()}

    @app.post("/get_worker_address", summary="The address of a worker that has a model, or an empty text")
    async def get_worker_address(request: Request) -> dict[str, str]:
        return {"address": controller.table.hand_out(validate(ModelRequest, await read_json(request)).model)}

    @app.post(STATUS_PATH, summary="All workers as one")
    async def worker_get_status() -> dict[str, Any]:
        return controller.status()

    @app.get("/v1/models", summary="The models")
    async def v1_models() -> dict[str, Any]:
        return await controller.cards.listed(controller.table.workers)

    @app.get("/v1/models/{model:path}", summary="One model")
    async def v1_model(model: str) -> dict[str, Any]:
        controller.check_model(model)
        listed = await controller.cards.listed(controller.table.workers)
        return next((entry for entry in listed["data"] if entry["id"] == model), {"id": model, "object": "model"})

    async def relay(request: Request) -> Response:
        return controller.relay.response(await controller.read_job(request))

    for path in BODY_SCHEMAS:
        name = path.strip("/").replace("/", "_")
        app.post(path, name=name, summary="Passed on to a worker of the model", response_model=None)(relay)


def _add_operator_endpoints(app: FastAPI, controller: Controller) -> None:
    @app.get("/health", summary="The process answers")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Some worker is there and requests are taken")
    async def ready(request: Request) -> Response:
        if controller.limiter.draining:
            return error_response(ServeError(ErrorKind.DRAINING), request.scope)
        if not controller.table.workers:
            return error_response(ServeError(ErrorKind.BACKEND_UNREACHABLE, "No worker is registered."), request.scope, 503)
        return JsonResponse({"status": "ready", "workers": len(controller.table.workers)})

    @app.get("/metrics", summary="Counts in Prometheus' text format")
    async def metrics() -> Response:
        return Response(controller.metrics.render(), media_type=CONTENT_TYPE)
