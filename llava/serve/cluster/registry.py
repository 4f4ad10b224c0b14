"""Who may register workers, and what their registrations, heartbeats and unregistrations do to the table.

A web page never may, since a browser may run anywhere. With a worker token only its holders may; without one, see
`llava.serve.http.addresses`. Afterwards whoever has registered a worker may speak for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TypeVar

import anyio
from fastapi import Request

from llava.fetch import FetchError
from llava.serve.api.validation import validate
from llava.serve.cluster.bodies import HeartbeatRequest, RegisterRequest, StatusFields, UnregisterRequest, read_status
from llava.serve.cluster.dispatch import RegisteredWorker, WorkerTable
from llava.serve.cluster.worker_client import WorkerClient
from llava.serve.http.addresses import AddressRules, Caller, Endpoint, Resolver, checked_endpoint, parse_worker_url, peer_may_register
from llava.serve.http.client import BrokenResponse, Unreachable
from llava.serve.http.errors import FieldError
from llava.serve.http.keys import KeySet
from llava.serve.http.strict_json import read_json
from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_RESOLVE_SECONDS = 5.0
_RESOLVING_AT_ONCE = 8
_REFRESH_SECONDS = 1.0
"""A refresh that is asked for sooner after the last one is answered by that one."""
_WRONG_TOKEN = "The worker token is missing or wrong."
_REFUSED = (
    "This controller does not take this worker: without a token only workers on its own machine that name a loopback address; its operator "
    "allows others with --registration-token or --allow-worker."
)

WorkerRequest = TypeVar("WorkerRequest", RegisterRequest, HeartbeatRequest, UnregisterRequest)


class WorkerRegistry:
    """The only way for workers to change the table.

    Args:
        table: of the workers. client: asks them for their status. rules: which addresses they may have.
        tokens: one of them has to come with a registration; none are asked for when empty. resolve: a worker's host to its addresses.
    """

    def __init__(self, table: WorkerTable, client: WorkerClient, rules: AddressRules, tokens: tuple[str, ...], resolve: Resolver) -> None:
        self._table, self._client, self._rules, self._resolve = table, client, rules, resolve
        self._tokens = KeySet(tokens)
        self._resolving = anyio.Semaphore(_RESOLVING_AT_ONCE)
        self._refreshing = asyncio.Lock()
        self._refreshed = -math.inf

    async def read(self, request: Request, schema: type[WorkerRequest]) -> tuple[Caller, WorkerRequest]:
        """Who sent a request of a worker, and its body. The head is checked before the body is read.

        Raises:
            ServeError: a web page sent it; the token in the Authorization header is wrong; this machine may not register workers at all;
                or the body cannot be read.
        """
        caller = self._caller(request)
        if request.headers.get("origin") is not None:
            raise ServeError(ErrorKind.FORBIDDEN)
        if self._tokens and request.headers.get("authorization") is not None and not caller.has_token:
            raise ServeError(ErrorKind.UNAUTHORIZED, _WRONG_TOKEN)
        if schema is RegisterRequest and not self._tokens:
            self._check_may_register(caller)
        body = validate(schema, await read_json(request))
        return self._caller(request, body.token), body

    def _caller(self, request: Request, token: str | None = None) -> Caller:
        """Who asks.

        Args:
            token: the one in the body, where LLaVA's workers can be made to send it; one in the Authorization header is as good.
        """
        shown = (request.headers.get("authorization"), None if token is None else f"Bearer {token}")
        has_token = bool(self._tokens) and any([self._tokens.accepts(each) for each in shown])
        # Behind a proxy everybody seems to be on this machine.
        proxied = any(name in request.headers for name in _PROXY_HEADERS)
        peer = None if request.client is None or (proxied and not has_token) else request.client.host
        return Caller(peer, has_token)

    def _check_may_register(self, caller: Caller) -> None:
        if not peer_may_register(self._rules, caller):
            if self._rules.token_required:
                raise ServeError(ErrorKind.UNAUTHORIZED, _WRONG_TOKEN)
            raise ServeError(ErrorKind.FORBIDDEN, _REFUSED)

    async def register(self, caller: Caller, body: RegisterRequest) -> RegisteredWorker:
        """Add a worker to the table.

        Raises:
            ServeError: the caller may not register workers, or not this one; or a field makes no sense.
        """
        self._check_may_register(caller)
        endpoint = await self._endpoint(caller, body.worker_name)
        status = read_status(body.worker_status or await self._ask_status(endpoint))
        try:
            worker = self._table.register(endpoint, status, body.check_heart_beat, caller.peer)
        except OverflowError as error:
            raise ServeError(ErrorKind.OVERLOADED, str(error)) from error
        logger.info("worker %s registered: %s", worker.name, ", ".join(status.models))
        return worker

    async def _endpoint(self, caller: Caller, name: str) -> Endpoint:
        try:
            url = parse_worker_url(name)
            async with self._resolving:
                with anyio.fail_after(_RESOLVE_SECONDS):
                    return await anyio.to_thread.run_sync(checked_endpoint, self._rules, caller, url, self._resolve, abandon_on_cancel=True)
        except PermissionError as error:
            logger.warning("a worker at %s:%d was refused: %s", url.host, url.port, error)
            raise ServeError(ErrorKind.FORBIDDEN, _REFUSED) from error
        except (FetchError, TimeoutError) as error:
            raise FieldError("The worker's host cannot be resolved.", "worker_name") from error
        except ValueError as error:
            raise FieldError(str(error), "worker_name") from error

    async def _ask_status(self, endpoint: Endpoint) -> StatusFields:
        """The status of a worker that registered without one, as LLaVA's protocol allows."""
        try:
            return validate(StatusFields, await self._client.status(endpoint))
        except (Unreachable, BrokenResponse) as error:
            logger.warning("worker %s registered without a status and reports none: %s", endpoint.url.text, error)
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE, "The worker does not answer when asked for its status.") from error

    def heartbeat(self, caller: Caller, body: HeartbeatRequest) -> bool:
        """Record a heartbeat; whether the worker is known.

        A heartbeat without the token counts when it comes from where the registration came from. To anybody else the worker is unknown, so
        that a worker whose address has changed registers again.
        """
        name = _worker_name(body.worker_name)
        if not self._is_registrant(caller, name) and not peer_may_register(self._rules, caller):
            return False
        return self._table.heartbeat(name, body.queue_length)

    def unregister(self, caller: Caller, body: UnregisterRequest) -> bool:
        """Remove a worker that shuts down; whether it was known. Its running requests go on.

        Only whoever may register workers is heard, and without the token only from where that worker's registration came from.
        """
        name = _worker_name(body.worker_name)
        allowed = peer_may_register(self._rules, caller) and (caller.has_token or self._is_registrant(caller, name))
        if not allowed or self._table.find(name) is None:
            return False
        self._table.remove(name)
        logger.info("worker %s has unregistered", name)
        return True

    def _is_registrant(self, caller: Caller, name: str) -> bool:
        worker = self._table.find(name)
        return worker is not None and caller.peer is not None and worker.registered_from == caller.peer

    async def refresh(self) -> None:
        """Ask all workers for their status, and drop those that are gone; concurrent calls share one round."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < _REFRESH_SECONDS:
                return
            await asyncio.gather(*(self._refresh_one(worker) for worker in self._table.workers))
            self._refreshed = time.monotonic()

    async def _refresh_one(self, worker: RegisteredWorker) -> None:
        try:
            status = read_status(validate(StatusFields, await self._client.status(worker.endpoint)))
        except Unreachable:
            self._table.drop_lost(worker)
        except (BrokenResponse, ServeError) as error:
            logger.warning("worker %s does not report its status: %s", worker.name, error)
            self._table.mark_down(worker)
        else:
            worker.note_status(status)


def _worker_name(text: str) -> str:
    """A worker's URL as the table spells it."""
    try:
        return parse_worker_url(text).text
    except ValueError as error:
        raise FieldError(str(error), "worker_name") from error
