"""The controller as an ASGI app: registration of workers, the APIs relayed to them, and what operators ask.

It speaks LLaVA's protocol (`/register_worker`, `/receive_heart_beat`, `/list_models`, `/get_worker_address`, `/refresh_all_workers`,
`/worker_generate_stream`, `/worker_get_status`; `/unregister_worker` is our own) and the OpenAI API. Which addresses it calls is decided
by `llava.serve.http.addresses`, who gets a request by `llava.serve.cluster.dispatch`, and how it is passed on by
`llava.serve.cluster.relay`. Nothing is kept beyond its life: workers register again by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import httpx
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from pydantic import BaseModel
from starlette.responses import Response

from llava import __version__
from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.fetch import FetchError, resolve_host
from llava.serve.api.endpoints import BODIES
from llava.serve.api.openai_chat import validate
from llava.serve.cluster.bodies import HeartBeat, Leave, ModelName, RegisterRequest, StatusFields, read_status
from llava.serve.cluster.dispatch import DispatchMethod, Worker, WorkerTable
from llava.serve.cluster.liveness import watch
from llava.serve.cluster.model_cards import ModelCards
from llava.serve.cluster.relay import EVENTS, FRAMES, TYPED_EVENTS, Job, Relay
from llava.serve.http.addresses import (
    AddressRules,
    Caller,
    Endpoint,
    Resolver,
    checked_endpoint,
    parse_worker_url,
    peer_may_register,
)
from llava.serve.http.client import BrokenOff, Outbound, Patience, Unreachable
from llava.serve.http.errors import FieldError, error_response
from llava.serve.http.gate import HELD_BODIES, Gate
from llava.serve.http.json_writer import JsonResponse
from llava.serve.http.keys import KeyRing
from llava.serve.http.metrics import CONTENT_TYPE
from llava.serve.http.middleware import guard_app
from llava.serve.http.openapi import describe_bodies
from llava.serve.http.strict_json import read_json
from llava.serve.protocol import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    RESPONSES_PATH,
    STATUS_PATH,
    WORKER_PATH,
    ErrorKind,
    Limits,
    ServeError,
)

logger = logging.getLogger(__name__)

STREAMS = {CHAT_PATH: EVENTS, COMPLETIONS_PATH: EVENTS, RESPONSES_PATH: TYPED_EVENTS, WORKER_PATH: FRAMES}
"""How each endpoint's streams are cut and read; the others of `BODIES` have none."""
_REGISTRATION_PATHS = ("/register_worker", "/receive_heart_beat", "/unregister_worker")
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_RESOLVE_SECONDS = 5.0
_RESOLVING_AT_ONCE = 8
_ASK_PATIENCE = Patience(connect=2.0, head=5.0, piece=5.0, total=10.0)
_MAX_ASKED_BYTES = 1_000_000
_REFRESH_SECONDS = 1.0
"""Refreshes that come sooner after the last one are answered by that one."""


@dataclass(frozen=True)
class ControllerSettings:
    """How a controller behaves.

    rules: which worker addresses are called. worker_tokens: what workers show to register; empty asks for none.
    api_keys: what clients show; empty asks for none. worker_key: what the controller shows to its workers.
    allowed_origins: of web sites whose pages may ask from a browser.
    method, expiry_seconds: see `WorkerTable`. worker_seconds: how long a worker may be silent.
    max_in_flight: requests passed on at once; the next gets 503. limits: of one request.
    """

    rules: AddressRules = field(default_factory=AddressRules)
    worker_tokens: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    worker_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE
    expiry_seconds: float = CONTROLLER_HEART_BEAT_EXPIRATION
    worker_seconds: float = 300.0
    max_in_flight: int = 256
    limits: Limits = field(default_factory=Limits)


Message = TypeVar("Message", RegisterRequest, HeartBeat, Leave)

SCHEMAS: dict[str, type[BaseModel]] = {
    **BODIES,
    "/register_worker": RegisterRequest,
    "/receive_heart_beat": HeartBeat,
    "/unregister_worker": Leave,
    "/get_worker_address": ModelName,
}
"""What is sent to each path."""


class ControllerMetrics:
    """Counts of one controller."""

    def __init__(self, table: WorkerTable, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        workers = Gauge("avg_llava_controller_workers", "Registered workers.", registry=self.registry)
        workers.set_function(lambda: len(table.workers))
        running = Gauge("avg_llava_controller_in_flight", "Requests being passed on.", registry=self.registry)
        running.set_function(lambda: gate.inside)
        self._errors = Counter("avg_llava_controller_errors", "Failed requests by kind.", ["kind"], registry=self.registry)
        self._retries = Counter("avg_llava_controller_retries", "Workers replaced by another one.", registry=self.registry)
        self._lost = Counter("avg_llava_controller_lost_workers", "Workers that went silent or were gone.", registry=self.registry)
        for kind in ErrorKind:
            self._errors.labels(kind.value)

    def failed(self, kind: ErrorKind) -> None:
        self._errors.labels(kind.value).inc()

    def retried(self) -> None:
        self._retries.inc()

    def lost(self) -> None:
        self._lost.inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class Controller:
    """What the endpoints do.

    Args:
        settings: see there.
        outbound: carries the calls to workers; the network unless another is given.
        resolve: how a worker's host becomes addresses.
        clock: of the table.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        outbound: Outbound | None = None,
        resolve: Resolver = resolve_host,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.outbound = outbound or Outbound()
        self.table = WorkerTable(settings.method, settings.expiry_seconds, clock, on_lost=self._lost)
        self.gate = Gate(settings.max_in_flight, held_bytes=HELD_BODIES * settings.limits.max_body_bytes)
        self.metrics = ControllerMetrics(self.table, self.gate)
        self.cards = ModelCards(lambda worker: self._ask(worker.endpoint, "GET", "/v1/models"))
        self.relay = Relay(
            self.table,
            self.outbound,
            worker_key=settings.worker_key,
            patience=Patience(connect=3.0, head=settings.worker_seconds, piece=settings.worker_seconds, total=12 * settings.worker_seconds),
            send_seconds=settings.limits.send_seconds,
            on_retry=self.metrics.retried,
            on_error=self.metrics.failed,
            card_of=self.cards.of,
        )
        self._tokens = KeyRing(settings.worker_tokens)
        self._resolve = resolve
        self._resolving = anyio.Semaphore(_RESOLVING_AT_ONCE)
        self._refreshing = asyncio.Lock()
        self._refreshed = -math.inf

    async def read_from_worker(self, request: Request, schema: type[Message]) -> tuple[Caller, Message]:
        """Who sent a registration, heart beat or good-bye, and what it says. The head is judged before the body is read.

        Raises:
            ServeError: a web page speaks, through a browser that may stand anywhere; the token in the Authorization header is wrong; a
                machine that may not register at all; or a body that cannot be read.
        """
        caller = self._caller(request)
        if request.headers.get("origin") is not None:
            raise ServeError(ErrorKind.FORBIDDEN)
        if self._tokens and request.headers.get("authorization") is not None and not caller.has_token:
            raise ServeError(ErrorKind.UNAUTHORIZED, _WRONG_TOKEN)
        if schema is RegisterRequest and not self._tokens:
            self._check_may_register(caller)
        asked = validate(schema, await read_json(request))
        return self._caller(request, asked.token), asked

    def _caller(self, request: Request, token: str | None = None) -> Caller:
        """Who asks.

        Args:
            token: the one in the body, as LLaVA's workers may be made to send it; one in the Authorization header is as good.
        """
        shown = (request.headers.get("authorization"), None if token is None else f"Bearer {token}")
        has_token = bool(self._tokens) and any([self._tokens.accepts(each) for each in shown])
        # Behind a proxy everybody seems to be on this machine.
        proxied = any(name in request.headers for name in _PROXY_HEADERS)
        peer = None if request.client is None or (proxied and not has_token) else request.client.host
        return Caller(peer, has_token)

    def _check_may_register(self, caller: Caller) -> None:
        if not peer_may_register(self.settings.rules, caller):
            if self.settings.rules.token_required:
                raise ServeError(ErrorKind.UNAUTHORIZED, _WRONG_TOKEN)
            raise ServeError(ErrorKind.FORBIDDEN, _REFUSED)

    async def register(self, caller: Caller, asked: RegisterRequest) -> None:
        """Take a worker in.

        Raises:
            ServeError: the caller may not register workers, or not this one; or a field makes no sense.
        """
        self._check_may_register(caller)
        endpoint = await self._endpoint(caller, asked.worker_name)
        told = asked.worker_status or validate(StatusFields, await self._ask_status(endpoint))
        status = read_status(told)
        try:
            worker = self.table.register(endpoint, status, asked.check_heart_beat, caller.peer)
        except OverflowError as error:
            raise ServeError(ErrorKind.OVERLOADED, str(error)) from error
        self.cards.forget(worker.name)
        logger.info("worker %s registered: %s", worker.name, ", ".join(status.models))

    async def _endpoint(self, caller: Caller, name: str) -> Endpoint:
        try:
            url = parse_worker_url(name)
            async with self._resolving:
                with anyio.fail_after(_RESOLVE_SECONDS):
                    return await anyio.to_thread.run_sync(
                        checked_endpoint, self.settings.rules, caller, url, self._resolve, abandon_on_cancel=True
                    )
        except PermissionError as error:
            logger.warning("a worker at %s:%d was refused: %s", url.host, url.port, error)
            raise ServeError(ErrorKind.FORBIDDEN, _REFUSED) from error
        except (FetchError, TimeoutError) as error:
            raise FieldError("The worker's host cannot be resolved.", "worker_name") from error
        except ValueError as error:
            raise FieldError(str(error), "worker_name") from error

    def beat(self, caller: Caller, asked: HeartBeat) -> bool:
        """Note a heart beat; whether the worker is known.

        A beat without the token counts when it comes from where the registration came from. To anybody else the worker is not known, so
        that a worker whose address has changed registers again.
        """
        name = _worker_name(asked.worker_name)
        if not self._is_registrant(caller, name) and not peer_may_register(self.settings.rules, caller):
            return False
        return self.table.beat(name, asked.queue_length)

    def leave(self, caller: Caller, asked: Leave) -> bool:
        """Forget a worker that is going down; whether it was known. What it is answering goes on.

        Only whoever may register workers is heard, and without the token only from where that worker's registration came from.
        """
        name = _worker_name(asked.worker_name)
        may = peer_may_register(self.settings.rules, caller) and (caller.has_token or self._is_registrant(caller, name))
        if not may or self.table.find(name) is None:
            return False
        self.table.remove(name)
        logger.info("worker %s has left", name)
        return True

    def _is_registrant(self, caller: Caller, name: str) -> bool:
        worker = self.table.find(name)
        return worker is not None and caller.peer is not None and worker.registered_from == caller.peer

    async def refresh(self) -> None:
        """Ask all workers how they are, and forget those that are not there; several at the same time are one."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < _REFRESH_SECONDS:
                return
            await asyncio.gather(*(self._refresh_one(worker) for worker in self.table.workers))
            self._refreshed = time.monotonic()

    async def _refresh_one(self, worker: Worker) -> None:
        try:
            status = read_status(validate(StatusFields, await self._ask(worker.endpoint, "POST", STATUS_PATH)))
        except Unreachable:
            self.table.lose(worker)
        except (BrokenOff, ServeError) as error:
            logger.warning("worker %s does not say how it is: %s", worker.name, error)
            self.table.mark_down(worker)
        else:
            self.table.update(worker, status)

    def _lost(self, worker: Worker) -> None:
        logger.warning("worker %s is lost: it is not there any more, or was silent for too long", worker.name)
        self.metrics.lost()

    async def answers(self, worker: Worker, seconds: float) -> bool:
        """Whether a worker answers `/health` within so many seconds, be it to say that it has no such address."""
        patience = Patience(connect=seconds, head=seconds, piece=seconds, total=seconds)
        try:
            async with self.outbound.call("GET", worker.endpoint, "/health", patience=patience, max_bytes=_MAX_ASKED_BYTES):
                return True
        except (Unreachable, BrokenOff):
            return False

    async def _ask_status(self, endpoint: Endpoint) -> Any:
        try:
            return await self._ask(endpoint, "POST", STATUS_PATH)
        except (Unreachable, BrokenOff) as error:
            logger.warning("worker %s came without a status and does not tell one: %s", endpoint.url.text, error)
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE, "The worker does not answer when asked for its status.") from error

    async def _ask(self, endpoint: Endpoint, method: str, path: str) -> Any:
        content = b"{}" if method == "POST" else None
        headers = self.relay.headers("controller")
        async with self.outbound.call(
            method, endpoint, path, patience=_ASK_PATIENCE, max_bytes=_MAX_ASKED_BYTES, content=content, headers=headers
        ) as reply:
            if reply.status != 200:
                raise BrokenOff(f"{path} answered with status {reply.status}")
            return await reply.json()

    def status(self) -> dict[str, Any]:
        """All workers as one, for a controller above this one."""
        workers = self.table.workers
        return {
            "model_names": self.table.models(),
            "speed": sum(worker.status.speed for worker in workers),
            "queue_length": sum(worker.status.queue_length for worker in workers),
        }

    async def job(self, request: Request) -> Job:
        """A client's request to be passed on.

        Raises:
            ServeError: it cannot be read, or nobody serves its model.
        """
        body = await read_json(request)
        model = validate(ModelName, body).model
        self.check_model(model)
        path = request.url.path
        is_streamed = path == WORKER_PATH or body.get("stream") is True
        return Job(model, path, await request.body(), STREAMS.get(path) if is_streamed else None)

    def check_model(self, model: str) -> None:
        """Refuse a model that nobody serves: one that nobody ever has, while others are there, is a client's mistake."""
        models = self.table.models()
        if model in models:
            return
        if not models or self.table.was_known(model):
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE)
        shown = ", ".join(repr(name[:100]) for name in models[:10])
        raise FieldError(f"There is no model {model[:100]!r} here, only {shown}.", "model", ErrorKind.MODEL_NOT_FOUND)


_WRONG_TOKEN = "The worker token is missing or wrong."
_REFUSED = (
    "This controller does not take this worker: without a token only workers on its own machine that name a loopback address; its operator "
    "allows others with --worker-token or --allow-worker."
)


def _worker_name(text: str) -> str:
    """A worker's address in the one spelling that the table knows."""
    try:
        return parse_worker_url(text).text
    except ValueError as error:
        raise FieldError(str(error), "worker_name") from error


def create_controller_app(
    settings: ControllerSettings | None = None,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    resolve: Resolver = resolve_host,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The controller as an ASGI app; its `Controller` stands at `app.state.controller`.

    Args:
        transport: carries all calls to workers. resolve: how a worker's host becomes addresses. clock: of the table. Tests give their own.
    """
    settings = settings or ControllerSettings()
    controller = Controller(settings, Outbound(transport), resolve, clock)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch(controller.table, controller.answers))
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
        controller.gate,
        settings.limits,
        api_keys=settings.api_keys,
        allowed_origins=settings.allowed_origins,
        generating_paths=tuple(BODIES),
        small_paths=_REGISTRATION_PATHS,
        # workers show a token of their own, see `Controller.read_from_worker`
        open_paths=("/health", "/ready", *_REGISTRATION_PATHS),
        on_error=controller.metrics.failed,
    )
    return app


def _add_worker_endpoints(app: FastAPI, controller: Controller) -> None:
    @app.post("/register_worker", summary="A worker announces itself")
    async def register_worker(request: Request) -> None:
        caller, asked = await controller.read_from_worker(request, RegisterRequest)
        await controller.register(caller, asked)

    @app.post("/receive_heart_beat", summary="A worker is alive")
    async def receive_heart_beat(request: Request) -> dict[str, bool]:
        caller, asked = await controller.read_from_worker(request, HeartBeat)
        return {"exist": controller.beat(caller, asked)}

    @app.post("/unregister_worker", summary="A worker takes no more requests")
    async def unregister_worker(request: Request) -> dict[str, bool]:
        caller, asked = await controller.read_from_worker(request, Leave)
        return {"exist": controller.leave(caller, asked)}


def _add_client_endpoints(app: FastAPI, controller: Controller) -> None:
    @app.post("/refresh_all_workers", summary="Ask all workers how they are")
    async def refresh_all_workers() -> None:
        await controller.refresh()

    @app.post("/list_models", summary="Names of the models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": controller.table.models()}

    @app.post("/get_worker_address", summary="The address of a worker that has a model, or an empty text")
    async def get_worker_address(request: Request) -> dict[str, str]:
        return {"address": controller.table.hand_out(validate(ModelName, await read_json(request)).model)}

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

    async def pass_on(request: Request) -> Response:
        return controller.relay.response(await controller.job(request))

    for path in BODIES:
        name = path.strip("/").replace("/", "_")
        app.post(path, name=name, summary="Passed on to a worker of the model", response_model=None)(pass_on)


def _add_operator_endpoints(app: FastAPI, controller: Controller) -> None:
    @app.get("/health", summary="The process answers")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Some worker is there and requests are taken")
    async def ready(request: Request) -> Response:
        if controller.gate.draining:
            return error_response(ServeError(ErrorKind.DRAINING), request.scope)
        if not controller.table.workers:
            return error_response(ServeError(ErrorKind.BACKEND_UNREACHABLE, "No worker is registered."), request.scope, 503)
        return JsonResponse({"status": "ready", "workers": len(controller.table.workers)})

    @app.get("/metrics", summary="Counts in Prometheus' text format")
    async def metrics() -> Response:
        return Response(controller.metrics.render(), media_type=CONTENT_TYPE)
