"""Passing a request on to one of several workers, and the worker's answer back to the client.

Until the first token has gone out, a worker that cannot be reached, refuses, breaks off or is dropped from the table (it hangs) is replaced
by another one, and the client does not notice. After that the client reads a typed error in its stream. Errors reach clients in the
controller's own words, see `llava.serve.cluster.refusals`. A client that disconnects cancels the worker's request: the answer is made in
one task, whose end closes the connection to the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava.serve.cluster.dispatch import RegisteredWorker, WorkerTable
from llava.serve.cluster.refusals import client_error, error_kind
from llava.serve.cluster.stream_protocols import RETRYABLE, FrameKind, StreamProtocol, reported_error
from llava.serve.cluster.worker_client import worker_headers
from llava.serve.http.client import BoundedClient, BrokenResponse, Reply, Timeouts, Unreachable, parse_json_object
from llava.serve.http.disconnect import cancel_on_disconnect
from llava.serve.http.errors import error_response, request_id_of
from llava.serve.http.watchdog import with_send_timeout
from llava.serve.protocol import ErrorKind, ModelCard, ServeError

logger = logging.getLogger(__name__)

MAX_WORKERS_TRIED = 3
"""For one request."""
MAX_BROKEN = 2
"""Workers that may break off on one request: a request that crashes its worker is not sent to all of them."""
MAX_ANSWER_BYTES = 256_000_000
MAX_REFUSAL_BYTES = 100_000
_MAX_HELD_BYTES = 1_000_000
"""Of a stream's beginning, held back until its first token."""

_EXPLAINED = frozenset((ErrorKind.INVALID_REQUEST, ErrorKind.CONTEXT_LENGTH))
"""Errors that whoever knows the model can find in the request itself."""
_CONTROLLER_REFUSED = (401, 403)
"""Statuses by which a worker refuses the controller itself; clients cannot do anything about them."""


@dataclass(frozen=True)
class Job:
    """A request to relay. path, body: as the client sent them. stream: how the answer is streamed; `None` where it is one body."""

    model: str
    path: str
    body: bytes
    stream: StreamProtocol | None


class _TryNextWorker(Exception):
    """A worker failed before anything reached the client.

    Args:
        error: what the client gets when no other worker helps. broken: whether the request may have crashed the worker.
        refusal: the worker's, which the client gets in place of `error`.
    """

    def __init__(self, error: ServeError, broken: bool, refusal: Refusal | None = None) -> None:
        self.error, self.broken, self.refusal = error, broken, refusal


@dataclass(frozen=True)
class Refusal:
    """A worker's refusal, in the controller's words. retry_after: the worker's own seconds, or `None`."""

    error: ServeError
    retry_after: str | None


class Relay:
    """Relays requests.

    Args:
        table: the workers. outbound: carries the calls. worker_key: see `worker_headers`.
        timeouts: with a worker's answer. send_seconds: that a client may take to read one piece.
        on_retry: called for each worker that was replaced by another.
        on_error: called with the kind of each error that reaches a client as a worker's refusal or inside a stream; the others are raised.
        card_of: a worker's description of a model, or `None`; with it refusals can be explained.
    """

    def __init__(
        self,
        table: WorkerTable,
        outbound: BoundedClient,
        *,
        worker_key: str | None = None,
        timeouts: Timeouts | None = None,
        send_seconds: float = 60.0,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[ErrorKind], None] = lambda kind: None,
        card_of: Callable[[RegisteredWorker, str], Awaitable[ModelCard | None]] | None = None,
    ) -> None:
        self.table, self.outbound, self.worker_key = table, outbound, worker_key
        self.timeouts = timeouts or Timeouts()
        self.send_seconds = send_seconds
        self.on_retry, self.on_error, self.card_of = on_retry, on_error, card_of

    def response(self, job: Job) -> RelayResponse:
        """The response to a job; the worker is called when it is sent."""
        return RelayResponse(self, job)


class RelayResponse(Response):
    """The answer to one job, from whichever worker gives it."""

    def __init__(self, relay: Relay, job: Job) -> None:
        super().__init__()
        self.relay, self.job = relay, job
        self.begun = False  # whether something has gone out, so that no other worker can answer any more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await cancel_on_disconnect(receive, self._answer_patiently(scope, receive, send))

    async def _answer_patiently(self, scope: Scope, receive: Receive, send: Send) -> None:
        with with_send_timeout(send, self.relay.send_seconds) as sending:
            await self._answer(scope, receive, sending)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay, tried, broken = self.relay, list[str](), 0
        request_id = request_id_of(scope)
        failure = _TryNextWorker(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False)
        while len(tried) < MAX_WORKERS_TRIED and broken < MAX_BROKEN:
            worker = relay.table.choose(self.job.model, tried)
            if worker is None:
                break
            if tried:
                relay.on_retry()
            tried.append(worker.name)
            try:
                answer = await self._ask(worker, request_id, send)
            except _TryNextWorker as reason:
                failure = reason
                broken += reason.broken
                logger.warning("request %s: worker %s: %s", request_id, worker.name, reason.error.kind.value)
                continue
            if isinstance(answer, Refusal):
                await self._send_refusal(answer, scope, receive, send)
            elif answer is not None:
                await Response(answer, media_type="application/json")(scope, receive, send)
            return
        if failure.refusal is None:
            raise failure.error
        await self._send_refusal(failure.refusal, scope, receive, send)

    async def _ask(self, worker: RegisteredWorker, request_id: str, send: Send) -> bytes | Refusal | None:
        """A worker's answer, a body or a refusal; `None` where it was a stream, which has gone to the client already."""
        relay, job = self.relay, self.job
        try:
            with anyio.CancelScope() as waiting, relay.table.using(worker, waiting.cancel):
                async with relay.outbound.call(
                    "POST",
                    worker.endpoint,
                    job.path,
                    timeouts=relay.timeouts,
                    max_bytes=MAX_ANSWER_BYTES,
                    content=job.body,
                    headers=worker_headers(relay.worker_key, request_id),
                ) as reply:
                    if reply.status != 200:
                        return await self._read_refusal(worker, reply, request_id)
                    if job.stream is None:
                        return await self._read_body(reply)
                    await self._relay_stream(reply, job.stream, request_id, send)
                    return None
            raise BrokenResponse("it was dropped from the table while it was answering")
        except Unreachable as error:
            relay.table.mark_down(worker)
            raise _TryNextWorker(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False) from error
        except BrokenResponse as error:
            relay.table.mark_down(worker)
            logger.warning("request %s: worker %s: %s", request_id, worker.name, error)
            if not self.begun or job.stream is None:
                raise _TryNextWorker(ServeError(ErrorKind.BACKEND_FAILED), broken=True) from error
            await self._end_stream(ErrorKind.BACKEND_FAILED, job.stream, request_id, send)
            return None

    async def _read_refusal(self, worker: RegisteredWorker, reply: Reply, request_id: str) -> Refusal:
        """A worker's refusal for the client.

        Raises:
            _TryNextWorker: another worker may not refuse. BrokenResponse: its body is no readable error.
        """
        body = await reply.body()
        refused = parse_json_object(body) if len(body) <= MAX_REFUSAL_BYTES else None
        if reply.status in _CONTROLLER_REFUSED:
            logger.error("a worker refuses the controller with status %d; check --worker-api-key", reply.status)
            raise _TryNextWorker(ServeError(ErrorKind.BACKEND_FAILED), broken=False)
        if refused is None or not isinstance(refused.get("error"), dict) or reply.status < 400:
            raise BrokenResponse(f"it answered with status {reply.status} and no readable error")
        wait = reply.retry_after if reply.retry_after and reply.retry_after.isdecimal() and len(reply.retry_after) < 5 else None
        kind = error_kind(refused, reply.status)
        job, card_of = self.job, self.relay.card_of
        card = await card_of(worker, job.model) if card_of is not None and kind in _EXPLAINED else None
        error = await asyncio.to_thread(client_error, kind, refused, job.path, job.body, card)
        logger.info("request %s is refused by its worker: %s: %r", request_id, kind.value, str(refused["error"].get("message"))[:300])
        refusal = Refusal(error, wait)
        if kind in RETRYABLE:
            raise _TryNextWorker(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False, refusal=refusal)
        return refusal

    async def _send_refusal(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        self.relay.on_error(refusal.error.kind)
        headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
        await error_response(refusal.error, scope, headers=headers)(scope, receive, send)

    async def _read_body(self, reply: Reply) -> bytes:
        body = await reply.body()
        if await asyncio.to_thread(parse_json_object, body) is None:
            raise BrokenResponse("its answer is no JSON object")
        return body

    async def _relay_stream(self, reply: Reply, protocol: StreamProtocol, request_id: str, send: Send) -> None:
        held: list[bytes] = []
        ended = False
        async for frame in reply.frames(protocol.delimiter):
            ended = ended or (protocol.is_end is not None and protocol.is_end(frame))
            reported = reported_error(frame)
            kind = FrameKind.ANSWER if self.begun else protocol.kind(frame)
            if kind is FrameKind.FAILURE:
                raise _TryNextWorker(ServeError(reported or ErrorKind.BACKEND_FAILED), broken=False)
            held.append(frame + protocol.delimiter)
            if kind is FrameKind.PREAMBLE and sum(map(len, held)) <= _MAX_HELD_BYTES:
                continue
            if not self.begun:
                self.begun = True
                await _send_head(send, protocol.media_type)
            if reported is not None:
                held.pop()  # in the worker's words
                await self._end_stream(reported, protocol, request_id, send, b"".join(held))
                return
            await _send_piece(send, b"".join(held))
            held.clear()
        if not self.begun or (protocol.is_end is not None and not ended):
            raise BrokenResponse("its stream ended before the answer did")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_stream(self, kind: ErrorKind, protocol: StreamProtocol, request_id: str, send: Send, held: bytes = b"") -> None:
        """End a stream, of which some has gone out, with a typed error."""
        self.relay.on_error(kind)  # also where the client has gone by now
        await _send_piece(send, held + protocol.error(ServeError(kind), request_id))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_head(send: Send, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})
