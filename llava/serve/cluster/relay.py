"""Passing a request on to one of several workers, and the worker's answer back.

Until the first token has gone out, a worker that cannot be reached, refuses, breaks off or is lost (it hangs, and the table has forgotten
it) is replaced by another one and nobody notices. After that the client reads a typed error in its stream. Errors reach clients in the
controller's own words, see `llava.serve.cluster.refusals`. A client that goes away takes the worker's request with it: the answer is made
in one task, whose end closes the connection to the worker.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava.serve.api.llava import null_ended
from llava.serve.api.openai_chat import STREAM_END, server_sent
from llava.serve.api.openai_responses import error_event
from llava.serve.cluster.dispatch import Worker, WorkerTable
from llava.serve.cluster.refusals import own_words, told_kind
from llava.serve.http.client import BrokenOff, Outbound, Patience, Reply, Unreachable, parse_json_object
from llava.serve.http.errors import error_body, error_fields, error_response, request_id_of
from llava.serve.http.middleware import unless_gone
from llava.serve.http.watchdog import patient
from llava.serve.protocol import ErrorKind, ModelCard, ServeError

logger = logging.getLogger(__name__)

MAX_WORKERS_TRIED = 3
"""For one request."""
MAX_BROKEN = 2
"""Workers that may break off on one request: a request that brings its worker down is not sent round to all of them."""
MAX_ANSWER_BYTES = 256_000_000
MAX_REFUSAL_BYTES = 100_000
_MAX_HELD_BYTES = 1_000_000
"""Of a stream's beginning, kept back until its first token."""

_ELSEWHERE = frozenset(
    (
        ErrorKind.MODEL_NOT_FOUND,
        ErrorKind.OVERLOADED,
        ErrorKind.DRAINING,
        ErrorKind.OUT_OF_MEMORY,
        ErrorKind.BACKEND_UNREACHABLE,
        ErrorKind.BACKEND_FAILED,
    )
)
"""Errors of one worker that another one may not have."""
_EXPLAINED = frozenset((ErrorKind.INVALID_REQUEST, ErrorKind.CONTEXT_LENGTH))
"""Errors that a request shows by itself to whoever knows the model."""
_ELSEWHERE_CODES = {kind.value for kind in _ELSEWHERE}
_ELSEWHERE_NUMBERS = {kind.fault.code for kind in _ELSEWHERE}
_REPORT = re.compile(rb'"error"\s*:|"error_code"\s*:\s*(?!0\s*[,}])|"type"\s*:\s*"(?:error|response\.failed)"|event:\s*error|\\u00[4-7]')
"""What a frame that reports an error holds, or one that hides it: nobody writes letters as escapes. Inside an answer's text JSON would
put a backslash before the quotes."""
_NAMED = re.compile(rb"\s*event:\s*error\s")
_OUR_FAULT = (401, 403)
"""Statuses by which a worker refuses the controller itself; its clients cannot do anything about them."""


class Said(Enum):
    """What a frame of a stream means for its beginning: nothing yet, an answer, or a failure that another worker may not have."""

    NOTHING = "nothing"
    ANSWER = "answer"
    FAILURE = "failure"


@dataclass(frozen=True)
class Dialect:
    """How a stream of one protocol is cut and read.

    delimiter: ends a frame. media_type: of the response. said: reads a frame. is_end: whether a frame is the stream's last; `None` where
    the protocol has none. error: a frame that reports one.
    """

    delimiter: bytes
    media_type: str
    said: Callable[[bytes], Said]
    is_end: Callable[[bytes], bool] | None
    error: Callable[[ServeError, str], bytes]


def _event_data(frame: bytes) -> bytes:
    lines = (line.strip() for line in frame.split(b"\n"))
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


def _said_by_event(frame: bytes) -> Said:
    data = _event_data(frame)
    if not data:
        return Said.NOTHING
    if data == b"[DONE]":
        return Said.ANSWER
    chunk = parse_json_object(data)
    if chunk is None:
        raise BrokenOff("the stream holds something else than JSON objects")
    if (error := chunk.get("error")) is not None:
        return Said.FAILURE if isinstance(error, dict) and error.get("code") in _ELSEWHERE_CODES else Said.ANSWER
    choices = chunk.get("choices")
    return Said.ANSWER if isinstance(choices, list) and any(map(_has_content, choices)) else Said.NOTHING


def _has_content(choice: Any) -> bool:
    """Whether a choice of a chat or of a text completion holds some text, or its end."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    return bool(choice.get("finish_reason") or choice.get("text") or (isinstance(delta, dict) and delta.get("content")))


def _said_by_typed_event(frame: bytes) -> Said:
    data = _event_data(frame)
    event = parse_json_object(data) if data else {}
    if event is None:
        raise BrokenOff("the stream holds something else than JSON objects")
    if event.get("type") == "error":
        return Said.FAILURE if event.get("code") in _ELSEWHERE_CODES else Said.ANSWER
    return Said.ANSWER if event.get("type") in _TYPED_TEXT | _TYPED_ENDS else Said.NOTHING


_TYPED_TEXT = frozenset(("response.output_text.delta",))
_TYPED_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))


def _is_typed_end(frame: bytes) -> bool:
    name, _, _ = frame.lstrip().partition(b"\n")
    return name.removeprefix(b"event:").strip().decode("latin-1") in _TYPED_ENDS


def _event_error(error: ServeError, request_id: str) -> bytes:
    return server_sent({"error": error_fields(error, request_id)}) + STREAM_END


def _said_by_frame(frame: bytes) -> Said:
    answer = parse_json_object(frame)
    if answer is None:
        raise BrokenOff("the stream holds something else than JSON objects")
    if answer.get("error_code") in _ELSEWHERE_NUMBERS:
        return Said.FAILURE
    is_opening = "avg_llava" in answer and "usage" not in answer  # what the pictures cost, no token yet
    return Said.NOTHING if is_opening else Said.ANSWER


def _frame_error(error: ServeError, request_id: str) -> bytes:
    return null_ended(error_body(error, request_id, worker_protocol=True))


def _is_done(frame: bytes) -> bool:
    return b"[DONE]" in frame and _event_data(frame) == b"[DONE]"


EVENTS = Dialect(b"\n\n", "text/event-stream", _said_by_event, _is_done, _event_error)
"""Server-sent events of the OpenAI API."""
TYPED_EVENTS = Dialect(b"\n\n", "text/event-stream", _said_by_typed_event, _is_typed_end, error_event)
"""Server-sent events of the Responses API, each with its type."""
FRAMES = Dialect(b"\0", "application/octet-stream", _said_by_frame, None, _frame_error)
"""LLaVA's JSON objects with a null byte behind each."""


@dataclass(frozen=True)
class Job:
    """A request to pass on. path, body: as the client sent them. dialect: of the stream that is asked for; `None` where one body is."""

    model: str
    path: str
    body: bytes
    dialect: Dialect | None


class _TryAnother(Exception):
    """A worker failed before anything reached the client.

    Args:
        error: what the client is told when nobody else helps. broken: whether the worker may have died of this request.
        answer: the worker's refusal, told in place of `error`.
    """

    def __init__(self, error: ServeError, broken: bool, answer: Refusal | None = None) -> None:
        self.error, self.broken, self.answer = error, broken, answer


@dataclass(frozen=True)
class Whole:
    """An answer in one piece."""

    body: bytes


@dataclass(frozen=True)
class Refusal:
    """A worker's refusal, in the controller's words. retry_after: the worker's own seconds, or `None`."""

    error: ServeError
    retry_after: str | None


class Relay:
    """Passes requests on.

    Args:
        table: the workers. outbound: carries the calls. worker_key: shown to workers that ask for an API key; what the client showed the
            controller goes no further. patience: with a worker's answer. send_seconds: that a client may take to read one piece.
        on_retry: told of each worker that was replaced by another.
        on_error: told of the kind of each error that reaches a client as a worker's refusal or inside a stream; the others are raised.
        card_of: what a worker says of a model, `None` where it does not tell; with it refusals can be explained.
    """

    def __init__(
        self,
        table: WorkerTable,
        outbound: Outbound,
        *,
        worker_key: str | None = None,
        patience: Patience | None = None,
        send_seconds: float = 60.0,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[ErrorKind], None] = lambda kind: None,
        card_of: Callable[[Worker, str], Awaitable[ModelCard | None]] | None = None,
    ) -> None:
        self.card_of = card_of
        self.table, self.outbound, self.worker_key = table, outbound, worker_key
        self.patience = patience or Patience()
        self.send_seconds = send_seconds
        self.on_retry, self.on_error = on_retry, on_error

    def response(self, job: Job) -> RelayResponse:
        """The response to a job; everything happens when it is sent."""
        return RelayResponse(self, job)

    def headers(self, request_id: str) -> dict[str, str]:
        """What every call to a worker carries."""
        key = {"Authorization": f"Bearer {self.worker_key}"} if self.worker_key else {}
        return {"Content-Type": "application/json", "X-Request-Id": request_id, **key}


class RelayResponse(Response):
    """A worker's answer to one job, from whichever worker gives it."""

    def __init__(self, relay: Relay, job: Job) -> None:
        super().__init__()
        self.relay, self.job = relay, job
        self.begun = False  # something has gone out, so that no other worker can answer any more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._answer_patiently(scope, receive, send))

    async def _answer_patiently(self, scope: Scope, receive: Receive, send: Send) -> None:
        with patient(send, self.relay.send_seconds) as sending:
            await self._answer(scope, receive, sending)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay, tried, broken = self.relay, list[str](), 0
        request_id = request_id_of(scope)
        failure = _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False)
        while len(tried) < MAX_WORKERS_TRIED and broken < MAX_BROKEN:
            worker = relay.table.choose(self.job.model, tried)
            if worker is None:
                break
            if tried:
                relay.on_retry()
            tried.append(worker.name)
            try:
                whole = await self._ask(worker, request_id, send)
            except _TryAnother as reason:
                failure = reason
                broken += reason.broken
                logger.warning("request %s: worker %s: %s", request_id, worker.name, reason.error.kind.value)
                continue
            if isinstance(whole, Refusal):
                await self._send_refusal(whole, scope, receive, send)
            elif whole is not None:
                await _send_whole(send, whole)
            return
        if failure.answer is None:
            raise failure.error
        await self._send_refusal(failure.answer, scope, receive, send)

    async def _ask(self, worker: Worker, request_id: str, send: Send) -> Whole | Refusal | None:
        """A worker's answer; `None` where it was a stream, which has been passed on."""
        relay, job = self.relay, self.job
        try:
            with anyio.CancelScope() as waiting, relay.table.using(worker, waiting.cancel):
                async with relay.outbound.call(
                    "POST",
                    worker.endpoint,
                    job.path,
                    patience=relay.patience,
                    max_bytes=MAX_ANSWER_BYTES,
                    content=job.body,
                    headers=relay.headers(request_id),
                ) as reply:
                    if reply.status != 200:
                        return await self._read_refusal(worker, reply, request_id)
                    if job.dialect is None:
                        return await self._read_body(reply)
                    await self._pass_stream(reply, job.dialect, request_id, send)
                    return None
            raise BrokenOff("it has not been heard of for too long")
        except Unreachable as error:
            relay.table.mark_down(worker)
            raise _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False) from error
        except BrokenOff as error:
            relay.table.mark_down(worker)
            logger.warning("request %s: worker %s: %s", request_id, worker.name, error)
            if not self.begun or job.dialect is None:
                raise _TryAnother(ServeError(ErrorKind.BACKEND_FAILED), broken=True) from error
            await self._end_stream(ErrorKind.BACKEND_FAILED, job.dialect, request_id, send)
            return None

    async def _read_refusal(self, worker: Worker, reply: Reply, request_id: str) -> Refusal:
        """A worker's refusal for the client.

        Raises:
            _TryAnother: another worker may not refuse. BrokenOff: it is no error that can be read.
        """
        body = await reply.body()
        refused = parse_json_object(body) if len(body) <= MAX_REFUSAL_BYTES else None
        if reply.status in _OUR_FAULT:
            logger.error("a worker refuses the controller with status %d; check --worker-api-key", reply.status)
            raise _TryAnother(ServeError(ErrorKind.BACKEND_FAILED), broken=False)
        if refused is None or not isinstance(refused.get("error"), dict) or reply.status < 400:
            raise BrokenOff(f"it answered with status {reply.status} and no error that can be read")
        wait = reply.retry_after if reply.retry_after and reply.retry_after.isdecimal() and len(reply.retry_after) < 5 else None
        kind = told_kind(refused, reply.status)
        job, card_of = self.job, self.relay.card_of
        card = await card_of(worker, job.model) if card_of is not None and kind in _EXPLAINED else None
        error = await asyncio.to_thread(own_words, kind, refused, job.path, job.body, card)
        logger.info("request %s is refused by its worker: %s: %r", request_id, kind.value, str(refused["error"].get("message"))[:300])
        refusal = Refusal(error, wait)
        if kind in _ELSEWHERE:
            raise _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False, answer=refusal)
        return refusal

    async def _send_refusal(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        self.relay.on_error(refusal.error.kind)
        headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
        await error_response(refusal.error, scope, headers=headers)(scope, receive, send)

    async def _read_body(self, reply: Reply) -> Whole:
        body = await reply.body()
        if await asyncio.to_thread(parse_json_object, body) is None:
            raise BrokenOff("its answer is no JSON object")
        return Whole(body)

    async def _pass_stream(self, reply: Reply, dialect: Dialect, request_id: str, send: Send) -> None:
        held: list[bytes] = []
        ended = False
        async for frame in reply.frames(dialect.delimiter):
            ended = ended or (dialect.is_end is not None and dialect.is_end(frame))
            reported = _reported_kind(frame)
            said = Said.ANSWER if self.begun else dialect.said(frame)
            if said is Said.FAILURE:
                raise _TryAnother(ServeError(reported or ErrorKind.BACKEND_FAILED), broken=False)
            held.append(frame + dialect.delimiter)
            if said is Said.NOTHING and sum(map(len, held)) <= _MAX_HELD_BYTES:
                continue
            if not self.begun:
                self.begun = True
                await _send_head(send, dialect.media_type)
            if reported is not None:
                held.pop()  # in the worker's words
                await self._end_stream(reported, dialect, request_id, send, b"".join(held))
                return
            await _send_piece(send, b"".join(held))
            held.clear()
        if not self.begun or (dialect.is_end is not None and not ended):
            raise BrokenOff("its stream ended before the answer did")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_stream(self, kind: ErrorKind, dialect: Dialect, request_id: str, send: Send, held: bytes = b"") -> None:
        """End a stream that has begun with a typed error."""
        self.relay.on_error(kind)  # also where the client has gone by now
        await _send_piece(send, held + dialect.error(ServeError(kind), request_id))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _reported_kind(frame: bytes) -> ErrorKind | None:
    """The kind of the error that a frame of a worker's stream reports, or `None`; no other frame is parsed for it.

    Raises:
        BrokenOff: it may report one, but is no JSON object that tells.
    """
    if _REPORT.search(frame) is None:
        return None
    told = parse_json_object(_event_data(frame) or frame)
    if told is None:
        raise BrokenOff("the stream holds something else than JSON objects")
    if told.get("type") == "error" or _NAMED.match(frame):
        return told_kind({"error": told})
    if told.get("type") == "response.failed":
        return told_kind(told["response"]) if isinstance(told.get("response"), dict) else ErrorKind.BACKEND_FAILED
    return told_kind(told) if told.get("error") or told.get("error_code") else None


async def _send_head(send: Send, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _send_whole(send: Send, whole: Whole) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(whole.body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": whole.body, "more_body": False})
