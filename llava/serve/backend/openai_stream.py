"""The answer of OpenAI's chat completions as an engine's events.

It was written by somebody else's server. Whatever is malformed raises `BrokenResponse`; the text of its errors goes to the log, and
clients get the constant texts of `llava.serve.protocol`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

from llava.serve.http.client import BrokenResponse, Reply, first_bytes, parse_json_object
from llava.serve.protocol import ErrorKind, Event, Finished, ImageReport, Piece, ServeError, Started, TokenScore

logger = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 64_000

_PASSED_ON = {
    kind.value: kind
    for kind in (
        ErrorKind.INVALID_IMAGE,
        ErrorKind.CONTEXT_LENGTH,
        ErrorKind.OVERLOADED,
        ErrorKind.OUT_OF_MEMORY,
        ErrorKind.NOT_FINITE,
        ErrorKind.TOO_LARGE,
    )
}
"""Errors of this project's own workers, by OpenAI's `code`, that mean the same here."""
_BY_STATUS = {
    400: ErrorKind.INVALID_REQUEST,
    413: ErrorKind.TOO_LARGE,
    422: ErrorKind.INVALID_REQUEST,
    429: ErrorKind.OVERLOADED,
    503: ErrorKind.OVERLOADED,
}
_MISCONFIGURED = (401, 403, 404, 405)
"""Statuses that mean that the bridge is set up wrongly, not that the client's request is wrong."""


async def check_head(reply: Reply, media_type: str = "text/event-stream") -> None:
    """Check that an answer is of the expected type.

    Raises:
        ServeError: the backend answered with an error. BrokenResponse: it answered with something else.
    """
    if reply.status != 200:
        raise await _refusal(reply)
    if reply.content_type != media_type:
        raise BrokenResponse(f"it answered with {reply.content_type or 'no type'}, not with {media_type}")


async def _refusal(reply: Reply) -> ServeError:
    body = await first_bytes(reply.chunks(), _MAX_ERROR_BYTES)
    logger.warning("the backend answered with status %d: %r", reply.status, body[:500])
    if reply.status in _MISCONFIGURED:
        return ServeError(ErrorKind.BACKEND_FAILED)
    passed_on = _PASSED_ON.get(_error_code(parse_json_object(body)))
    if passed_on is not None and passed_on.fault.status == reply.status:
        return ServeError(passed_on)
    if reply.status in _BY_STATUS:
        return ServeError(_BY_STATUS[reply.status])
    return ServeError(ErrorKind.INVALID_REQUEST if 400 <= reply.status < 500 else ErrorKind.BACKEND_FAILED)


def _error_code(body: dict[str, Any] | None) -> str:
    error = (body or {}).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


async def read_stream(reply: Reply, begun: float, queued: float) -> AsyncIterator[Event]:
    """Events of an answer from the chunks of a chat completion.

    Raises:
        BrokenResponse: the stream is not one, or ends before the answer does. ServeError: the backend reports an error.
    """
    parser = _StreamParser(begun, queued)
    async for chunk in chunks_of(reply):
        for answered in parser.take(chunk):
            yield answered
    yield parser.end()


async def chunks_of(reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed chat completion, up to the mark of its end.

    Raises:
        BrokenResponse: they are no JSON objects. ServeError: one reports an error.
    """
    async for event in reply.events():
        if event.data.strip() == "[DONE]":
            return
        chunk = parse_json_object(event.data)
        if chunk is None:
            raise BrokenResponse("the stream holds something else than JSON objects")
        if "error" in chunk:
            raise _reported(chunk)
        yield chunk


def _reported(chunk: dict[str, Any]) -> ServeError:
    logger.warning("the backend reported an error in its stream: %r", str(chunk)[:500])
    return ServeError(_PASSED_ON.get(_error_code(chunk), ErrorKind.BACKEND_FAILED))


class _StreamParser:
    """Turns the chunks of one answer into events.

    Args:
        begun, queued: when the request came, and when its turn at the backend came; monotonic seconds.
    """

    def __init__(self, begun: float, queued: float) -> None:
        self._begun, self._queued = begun, queued
        self._first: float | None = None
        self._chunks_with_text = 0
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._report: dict[str, Any] = {}

    def take(self, chunk: dict[str, Any]) -> list[Event]:
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = usage
        if isinstance(report := chunk.get("avg_llava"), dict):
            self._report = report
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise BrokenResponse("a chunk of the stream has no list of choices")
        events: list[Event] = self._start() if self._report else []
        for choice in choices:
            if choice.get("index", 0) != 0:
                raise BrokenResponse("the stream holds a second answer that was not requested")
            events += self._take_choice(choice)
        return events

    def _take_choice(self, choice: dict[str, Any]) -> list[Event]:
        reason = choice.get("finish_reason")
        if reason is not None:
            if reason == "abort" or not isinstance(reason, str):
                raise BrokenResponse(f"the answer ended with {str(reason)[:40]!r}")
            self._reason = "length" if reason == "length" else "stop"
        delta = choice.get("delta")
        text = (delta.get("content") if isinstance(delta, dict) else None) or ""
        if not isinstance(text, str):
            raise BrokenResponse("a chunk's content is not a text")
        scores = _scores(choice.get("logprobs"))
        if not text and not scores:
            return []
        self._chunks_with_text += 1
        return [*self._start(), Piece(text, scores)]

    def _start(self) -> list[Event]:
        if self._first is not None:
            return []
        self._first = monotonic()
        return [Started(_count(self._usage, "prompt_tokens"), image_reports(self._report), self._milliseconds(self._first))]

    def end(self) -> Finished:
        if self._reason is None:
            raise BrokenResponse("the stream ended before the answer did")
        now = monotonic()
        milliseconds = self._milliseconds(self._first or now)
        milliseconds |= {"decode": 1000 * (now - (self._first or now)), "total": 1000 * (now - self._begun)}
        # A server that counts no tokens still sends about one per chunk.
        completion = _count(self._usage, "completion_tokens") or self._chunks_with_text
        reports = image_reports(self._report)
        visual = 0 if reports else _visual_tokens(self._usage)
        return Finished(self._reason, _count(self._usage, "prompt_tokens"), completion, reports, milliseconds, visual)

    def _milliseconds(self, first: float) -> dict[str, float]:
        """The backend's own parts where it reports them, and the sums as measured here."""
        reported = self._report.get("milliseconds")
        parts = {str(part): float(value) for part, value in reported.items() if is_number(value)} if isinstance(reported, dict) else {}
        measured = {"queue": 1000 * (self._queued - self._begun), "prefill": 1000 * (first - self._queued)}
        return {**measured, **parts, "ttft": 1000 * (first - self._begun)}


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float holds; JSON's integers have no end."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) and is_count(value) else 0


def _visual_tokens(usage: dict[str, Any]) -> int:
    """Positions of a prompt that its images take, as vLLM reports them with `--enable-prompt-tokens-details`."""
    details = usage.get("prompt_tokens_details")
    by_modality = details.get("multimodal_tokens") if isinstance(details, dict) else None
    return _count(by_modality, "image") if isinstance(by_modality, dict) else 0


def _scores(logprobs: object) -> tuple[TokenScore, ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return ()
    scores = []
    for token in content:
        if (pair := _token_and_score(token)) is None:
            raise BrokenResponse("a token's log probability cannot be read")
        others = [_token_and_score(other) for other in token.get("top_logprobs") or []]
        scores.append(TokenScore(*pair, tuple(other for other in others if other is not None)))
    return tuple(scores)


def _token_and_score(token: object) -> tuple[str, float] | None:
    if not isinstance(token, dict) or not isinstance(token.get("token"), str) or not is_number(token.get("logprob")):
        return None
    return _token_text(token), float(token["logprob"])


def _token_text(token: dict[str, Any]) -> str:
    """A token's text from its bytes, where the backend reports them: a part of a character has no text of its own."""
    data = token.get("bytes")
    if isinstance(data, list) and all(type(value) is int and 0 <= value < 256 for value in data):
        return bytes(data).decode("utf-8", "surrogateescape")
    return str(token["token"])


def image_reports(report: dict[str, Any]) -> tuple[ImageReport, ...]:
    """The cost of each image, as this project's workers report it in `avg_llava`; empty where it is missing."""
    images = report.get("images")
    return tuple(_image_report(image) for image in images if isinstance(image, dict)) if isinstance(images, list) else ()


def _image_report(image: dict[str, Any]) -> ImageReport:
    grid, cached = image.get("grid"), image.get("cached")
    return ImageReport(
        granularity=_count(image, "granularity"),
        visual_tokens=_count(image, "visual_tokens"),
        full_visual_tokens=_count(image, "full_visual_tokens"),
        tokens_per_level=_levels(image.get("tokens_per_level")),
        logits=_numbers(image.get("logits")),
        probabilities=_numbers(image.get("probabilities")),
        cached=cached if isinstance(cached, bool) else None,
        grid=grid if isinstance(grid, dict) else None,
    )


def _levels(table: object) -> dict[int, int]:
    pairs = table.items() if isinstance(table, dict) else ()
    return {int(level): tokens for level, tokens in pairs if level.isascii() and level.isdecimal() and is_count(tokens)}


def _numbers(values: object) -> tuple[float, ...]:
    return tuple(float(value) for value in values if is_number(value)) if isinstance(values, list) else ()
