"""Passing a request on to one of several workers, and the worker's answer back.

Until the first token has gone out, a worker that cannot be reached, refuses or breaks off is replaced by another one and nobody notices.
After that the client reads a typed error in its stream. A client that goes away takes the worker's request with it: the answer is made in
one task, whose end closes the connection to the worker.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava.serve.dispatch import Worker, WorkerTable
from llava.serve.errors import error_body, error_fields, request_id_of
from llava.serve.http_guard import unless_gone
from llava.serve.llava_api import null_ended
from llava.serve.openai_api import STREAM_END, server_sent
from llava.serve.outbound import BrokenOff, Outbound, Patience, Reply, Unreachable, parse_json_object
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.watchdog import patient

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
_ELSEWHERE_CODES = {kind.value for kind in _ELSEWHERE}
_ELSEWHERE_NUMBERS = {kind.fault.code for kind in _ELSEWHERE}
_KINDS: dict[Any, ErrorKind] = {kind.value: kind for kind in ErrorKind} | {kind.fault.code: kind for kind in ErrorKind}
"""By OpenAI's `code` and by LLaVA's `error_code`."""
_REPORT = re.compile(rb'"error"\s*:|"error_code"\s*:\s*[1-9]')
"""What a frame that reports an error holds. Inside an answer's text JSON would put a backslash before the quotes."""
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
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    return bool(choice.get("finish_reason") or (isinstance(delta, dict) and delta.get("content")))


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
        answer: the worker's own refusal, told in place of `error`.
    """

    def __init__(self, error: ServeError, broken: bool, answer: Refusal | None = None) -> None:
        self.error, self.broken, self.answer = error, broken, answer


@dataclass(frozen=True)
class Refusal:
    """A worker's answer other than 200. kind: of its error."""

    kind: ErrorKind
    status: int
    body: bytes
    retry_after: str | None

    async def send(self, send: Send) -> None:
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        await _send_whole(send, self.status, self.body, headers)


class Relay:
    """Passes requests on.

    Args:
        table: the workers. outbound: carries the calls. worker_key: shown to workers that ask for an API key; what the client showed the
            controller goes no further. patience: with a worker's answer. send_seconds: that a client may take to read one piece.
        on_retry: told of each worker that was replaced by another.
        on_error: told of the kind of each error that reaches a client as a worker's refusal or inside a stream; the others are raised.
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
    ) -> None:
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._answer_patiently(scope, send))

    async def _answer_patiently(self, scope: Scope, send: Send) -> None:
        with patient(send, self.relay.send_seconds) as sending:
            await self._answer(scope, sending)

    async def _answer(self, scope: Scope, send: Send) -> None:
        relay, tried, broken = self.relay, list[str](), 0
        failure = _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False)
        while len(tried) < MAX_WORKERS_TRIED and broken < MAX_BROKEN:
            worker = relay.table.choose(self.job.model, tried)
            if worker is None:
                break
            if tried:
                relay.on_retry()
            tried.append(worker.name)
            with relay.table.using(worker):
                try:
                    await self._ask(worker, request_id_of(scope), send)
                    return
                except _TryAnother as reason:
                    failure = reason
                    broken += reason.broken
                    logger.warning("request %s: worker %s: %s", request_id_of(scope), worker.name, reason.error.kind.value)
        if failure.answer is not None:
            await self._send_refusal(failure.answer, send)
            return
        raise failure.error

    async def _ask(self, worker: Worker, request_id: str, send: Send) -> None:
        relay, job = self.relay, self.job
        try:
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
                    await self._pass_refusal(reply, send)
                elif job.dialect is None:
                    await self._pass_body(reply, send)
                else:
                    await self._pass_stream(reply, job.dialect, worker, request_id, send)
        except Unreachable as error:
            relay.table.mark_down(worker)
            raise _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False) from error
        except BrokenOff as error:
            relay.table.mark_down(worker)
            logger.warning("request %s: worker %s: %s", request_id, worker.name, error)
            raise _TryAnother(ServeError(ErrorKind.BACKEND_FAILED), broken=True) from error

    async def _pass_refusal(self, reply: Reply, send: Send) -> None:
        """Give a worker's refusal to the client, or to the next worker to try."""
        body = await reply.body()
        refused = parse_json_object(body) if len(body) <= MAX_REFUSAL_BYTES else None
        if reply.status in _OUR_FAULT:
            logger.error("a worker refuses the controller with status %d; check --worker-api-key", reply.status)
            raise _TryAnother(ServeError(ErrorKind.BACKEND_FAILED), broken=False)
        if refused is None or not isinstance(refused.get("error"), dict) or reply.status < 400:
            raise BrokenOff(f"it answered with status {reply.status} and no error that can be read")
        wait = reply.retry_after if reply.retry_after and reply.retry_after.isdecimal() and len(reply.retry_after) < 5 else None
        refusal = Refusal(_told_kind(refused), reply.status, body, wait)
        if refused["error"].get("code") in _ELSEWHERE_CODES:
            raise _TryAnother(ServeError(ErrorKind.BACKEND_UNREACHABLE), broken=False, answer=refusal)
        await self._send_refusal(refusal, send)

    async def _send_refusal(self, refusal: Refusal, send: Send) -> None:
        self.relay.on_error(refusal.kind)
        await refusal.send(send)

    async def _pass_body(self, reply: Reply, send: Send) -> None:
        body = await reply.body()
        if await asyncio.to_thread(parse_json_object, body) is None:
            raise BrokenOff("its answer is no JSON object")
        await _send_whole(send, 200, body, {})

    async def _pass_stream(self, reply: Reply, dialect: Dialect, worker: Worker, request_id: str, send: Send) -> None:
        held: list[bytes] = []
        begun = ended = False
        reported: ErrorKind | None = None
        try:
            async for frame in reply.frames(dialect.delimiter):
                reported = reported or _reported_kind(frame)
                ended = ended or (dialect.is_end is not None and dialect.is_end(frame))
                if begun:
                    await _send_piece(send, frame + dialect.delimiter)
                    continue
                said = dialect.said(frame)
                if said is Said.FAILURE:
                    raise _TryAnother(ServeError(reported or ErrorKind.BACKEND_FAILED), broken=False)
                held.append(frame + dialect.delimiter)
                if said is Said.ANSWER or sum(map(len, held)) > _MAX_HELD_BYTES:
                    begun = True
                    await _send_head(send, dialect.media_type)
                    await _send_piece(send, b"".join(held))
            if not begun or (dialect.is_end is not None and not ended):
                raise BrokenOff("its stream ended before the answer did")
        except BrokenOff as error:
            if not begun:
                raise
            reported = reported or ErrorKind.BACKEND_FAILED
            self.relay.table.mark_down(worker)
            logger.warning("request %s: worker %s broke off while streaming: %s", request_id, worker.name, error)
            await _send_piece(send, dialect.error(ServeError(ErrorKind.BACKEND_FAILED), request_id))
        finally:
            if begun and reported is not None:  # also where the client has gone by now
                self.relay.on_error(reported)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _reported_kind(frame: bytes) -> ErrorKind | None:
    """The kind of the error that a frame of a worker's stream reports, or `None`; no other frame is parsed for it."""
    if _REPORT.search(frame) is None:
        return None
    told = parse_json_object(_event_data(frame) or frame) or {}
    return _told_kind(told) if told.get("error") or told.get("error_code") else None


def _told_kind(told: dict[str, Any]) -> ErrorKind:
    """The kind of a worker's error; `BACKEND_FAILED` where it is none of ours."""
    error = told.get("error")
    codes = (error.get("code") if isinstance(error, dict) else None, told.get("error_code"))
    return next((_KINDS[code] for code in codes if isinstance(code, str | int) and code in _KINDS), ErrorKind.BACKEND_FAILED)


async def _send_head(send: Send, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _send_whole(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    listed = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(key.lower().encode(), value.encode()) for key, value in listed.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": False})
