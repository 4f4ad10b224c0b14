"""How the streams of each API are cut into frames, and what a frame means to a relay that passes it on.

Frames come from a worker that is not trusted: what cannot be read raises `BrokenResponse`, and an error is recognised in any disguise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llava.serve.api.llava import llava_error_body, null_ended
from llava.serve.api.openai_chat import STREAM_END, server_sent
from llava.serve.api.openai_responses import error_event
from llava.serve.cluster.refusals import error_kind
from llava.serve.http.client import BrokenResponse, parse_json_object
from llava.serve.http.errors import error_fields
from llava.serve.http.sse import read_event
from llava.serve.protocol import ErrorKind, ServeError

RETRYABLE = frozenset(
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
_RETRYABLE_CODES = {kind.value for kind in RETRYABLE}
_RETRYABLE_NUMBERS = {kind.fault.code for kind in RETRYABLE}
_ERROR = re.compile(rb'"error"\s*:|"error_code"\s*:\s*(?!0\s*[,}])|"type"\s*:\s*"(?:error|response\.failed)"|event:\s*error|\\u00[4-7]')
"""Stands in every frame that reports an error, or hides one: nobody writes letters as escapes. Inside an answer's text JSON would put a
backslash before the quotes."""


class FrameKind(Enum):
    """What a frame means while nothing has gone out yet: a preamble, part of an answer, or a failure that another worker may not have."""

    PREAMBLE = "preamble"
    ANSWER = "answer"
    FAILURE = "failure"


@dataclass(frozen=True)
class StreamProtocol:
    """How a stream of one API is cut and read.

    delimiter: ends a frame. media_type: of the response. kind: classifies a frame. is_end: whether a frame is the stream's last; `None`
    where the API has no such frame. error: a frame that reports an error, for a request id.
    """

    delimiter: bytes
    media_type: str
    kind: Callable[[bytes], FrameKind]
    is_end: Callable[[bytes], bool] | None
    error: Callable[[ServeError, str], bytes]


def reported_error(frame: bytes) -> ErrorKind | None:
    """The kind of the error that a frame of any API reports, or `None`; only frames that look like it are parsed.

    Raises:
        BrokenResponse: it looks like an error and is no JSON object.
    """
    if _ERROR.search(frame) is None:
        return None
    name, data = _event(frame)
    value = _json_object(data or frame)
    if value.get("type") == "error" or name == "error":
        return error_kind({"error": value})
    if value.get("type") == "response.failed":
        return error_kind(value["response"]) if isinstance(value.get("response"), dict) else ErrorKind.BACKEND_FAILED
    return error_kind(value) if value.get("error") or value.get("error_code") else None


def _event(frame: bytes) -> tuple[str, str]:
    """The name and the data of a server-sent event; an empty text for data that is not there."""
    try:
        event = read_event(frame)
    except ValueError as error:
        raise BrokenResponse(f"the stream cannot be read: {error}") from error
    return (event.event, event.data) if event is not None else ("", "")


def _json_object(text: str | bytes) -> dict[str, Any]:
    value = parse_json_object(text)
    if value is None:
        raise BrokenResponse("the stream holds something else than JSON objects")
    return value


def _among(value: Any, known: Collection[str | int]) -> bool:
    return isinstance(value, str | int) and value in known


# ---- OpenAI's chat and text completions: events without names


def _chunk_kind(frame: bytes) -> FrameKind:
    _, data = _event(frame)
    if not data:
        return FrameKind.PREAMBLE
    if data.strip() == "[DONE]":
        return FrameKind.ANSWER
    chunk = _json_object(data)
    if (error := chunk.get("error")) is not None:
        return FrameKind.FAILURE if isinstance(error, dict) and _among(error.get("code"), _RETRYABLE_CODES) else FrameKind.ANSWER
    choices = chunk.get("choices")
    return FrameKind.ANSWER if isinstance(choices, list) and any(map(_has_content, choices)) else FrameKind.PREAMBLE


def _has_content(choice: Any) -> bool:
    """Whether a choice of a chat or of a text completion holds some text, or its end."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    return bool(choice.get("finish_reason") or choice.get("text") or (isinstance(delta, dict) and delta.get("content")))


def _is_done(frame: bytes) -> bool:
    return b"[DONE]" in frame and _event(frame)[1].strip() == "[DONE]"


def _chunk_error(error: ServeError, request_id: str) -> bytes:
    return server_sent({"error": error_fields(error, request_id)}) + STREAM_END


EVENTS = StreamProtocol(b"\n\n", "text/event-stream", _chunk_kind, _is_done, _chunk_error)
"""Server-sent events of OpenAI's completions."""

# ---- OpenAI's responses: events with names

_TEXT_EVENTS = frozenset(("response.output_text.delta",))
_END_EVENTS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))


def _typed_kind(frame: bytes) -> FrameKind:
    _, data = _event(frame)
    event = _json_object(data) if data else {}
    if event.get("type") == "error":
        return FrameKind.FAILURE if _among(event.get("code"), _RETRYABLE_CODES) else FrameKind.ANSWER
    return FrameKind.ANSWER if _among(event.get("type"), _TEXT_EVENTS | _END_EVENTS) else FrameKind.PREAMBLE


def _is_typed_end(frame: bytes) -> bool:
    """Looks at the first line alone: this is asked of every frame."""
    name, _, _ = frame.lstrip().partition(b"\n")
    return name.removeprefix(b"event:").strip().decode("latin-1") in _END_EVENTS


TYPED_EVENTS = StreamProtocol(b"\n\n", "text/event-stream", _typed_kind, _is_typed_end, error_event)
"""Server-sent events of OpenAI's Responses API."""

# ---- LLaVA's protocol: JSON objects with a null byte behind each


def _object_kind(frame: bytes) -> FrameKind:
    answer = _json_object(frame)
    if _among(answer.get("error_code"), _RETRYABLE_NUMBERS):
        return FrameKind.FAILURE
    is_report = "avg_llava" in answer and "usage" not in answer  # what the images cost, before the first token
    return FrameKind.PREAMBLE if is_report else FrameKind.ANSWER


def _object_error(error: ServeError, request_id: str) -> bytes:
    return null_ended(llava_error_body(error, request_id))


FRAMES = StreamProtocol(b"\0", "application/octet-stream", _object_kind, None, _object_error)
"""LLaVA's JSON objects."""
