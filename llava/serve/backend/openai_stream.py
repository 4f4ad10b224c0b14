"""An answer of an OpenAI-compatible server, read as events: the wire of `llava.serve.backend.openai_engine`.

What is read here was written by somebody else's server. Whatever is not what it should be raises `BrokenResponse`; what it says of an error
is logged, and clients get the constant texts of `llava.serve.protocol`.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from io import BytesIO
from time import monotonic
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.messages import Detail, Message, RoutingRequest, normalise_turns
from llava.serve.api.guide_fields import ANY_OBJECT
from llava.serve.api.read_prompt import read_prompt
from llava.serve.http.client import BrokenResponse, Reply, parse_json_object
from llava.serve.protocol import (
    EngineImage,
    ErrorKind,
    Event,
    Finished,
    GenerationRequest,
    Guide,
    GuideKind,
    ImageReport,
    Piece,
    Sampling,
    ServeError,
    Started,
    TokenScore,
)
from llava.serve.protocol.error_templates import BACKEND_LACKS_FIELD, UNKNOWN_TEMPLATE

logger = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 64_000

# What a backend of our own may say of a request in OpenAI's `code`, with the same meaning here.
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
_BY_STATUS = {
    400: ErrorKind.INVALID_REQUEST,
    413: ErrorKind.TOO_LARGE,
    422: ErrorKind.INVALID_REQUEST,
    429: ErrorKind.OVERLOADED,
    503: ErrorKind.OVERLOADED,
}
_OUR_FAULT = (401, 403, 404, 405)
"""Statuses that say that the bridge is set up wrongly, not that the client asked for something wrong."""


_OF_OPENAI = {"seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}
_BEYOND_OPENAI = {
    "min_new_tokens": "min_tokens",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""Fields of `Sampling` that are told where they ask for something: their names in OpenAI's API, and in vLLM's and SGLang's beyond it."""
_KNOW_BEYOND = frozenset(("vllm", "sglang", "avg-llava"))
"""Whose servers know the latter, by `owned_by` of their models; other servers may ignore what they do not know."""


def check_sampling(sampling: Sampling, owner: str) -> None:
    """Refuse what the backend might ignore.

    Args:
        owner: of the model, as the backend tells it.

    Raises:
        ServeError: with the field.
    """
    unknown = [] if owner in _KNOW_BEYOND else [name for own, name in _BEYOND_OPENAI.items() if _asks(sampling, own)]
    if sampling.guide is not None and owner not in _KNOW_BEYOND and sampling.guide.kind is not GuideKind.JSON:
        unknown.append(sampling.guide.param)
    if unknown:
        raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_LACKS_FIELD.format(param=unknown[0]), unknown[0])


def guide_body(guide: Guide, owner: str) -> dict[str, Any]:
    """What the answer has to be, in words that the backend knows: OpenAI's for JSON, for anything else its own."""
    if guide.kind is GuideKind.JSON:
        schema = json.loads(guide.text)
        if schema == ANY_OBJECT:
            return {"response_format": {"type": "json_object"}}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}
    value = json.loads(guide.text) if guide.kind is GuideKind.CHOICE else guide.text
    if owner != "sglang":
        return {"structured_outputs": {guide.kind.value: value}}
    if guide.kind is GuideKind.GRAMMAR:
        return {"ebnf": value}
    return {"regex": value if guide.kind is GuideKind.REGEX else "|".join(re.escape(choice) for choice in value)}


def _asks(sampling: Sampling, name: str) -> bool:
    return bool(getattr(sampling, name) != getattr(Sampling, name))


def chat_body(request: GenerationRequest, model: str, owner: str = "") -> dict[str, Any]:
    """A request as the body of a chat completion; pictures become PNG data URLs.

    Raises:
        ServeError: the turns or their placeholders do not fit the pictures, or a finished prompt is of no known template.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": chat_messages(request_turns(request), request.images, request.routing),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }
    for own, name in (_OF_OPENAI | _BEYOND_OPENAI).items():
        if _asks(sampling, own):
            value = getattr(sampling, own)
            body[name] = list(value) if isinstance(value, tuple) else value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.guide is not None:
        body |= guide_body(sampling.guide, owner)
    if sampling.logprobs is not None:
        body["logprobs"], body["top_logprobs"] = True, sampling.logprobs
    return body | routing_fields(request.routing)


def routing_fields(routing: RoutingRequest) -> dict[str, Any]:
    """What is asked about granularity, as fields of a body; each image's detail stands in the image's own part."""
    fields: dict[str, Any] = {}
    if routing.granularity is not None:
        fields["granularity"] = routing.granularity if isinstance(routing.granularity, int) else list(routing.granularity)
    if routing.max_visual_tokens is not None:
        fields["max_visual_tokens"] = routing.max_visual_tokens
    if routing.bias:
        fields["granularity_bias"] = routing.bias
    return fields


def request_turns(request: GenerationRequest) -> Sequence[Message]:
    """The turns to send: a request's own as every template can write them, or those of its finished prompt as they stand there."""
    if request.prompt is None:
        try:
            return normalise_turns(request.messages, len(request.images))
        except ValueError as error:  # the sentence is this package's own and holds counts and roles only
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
    turns = read_prompt(request.prompt)
    if turns is None:
        raise ServeError(ErrorKind.INVALID_REQUEST, UNKNOWN_TEMPLATE, "prompt")
    return turns


def chat_messages(turns: Sequence[Message], images: Sequence[EngineImage], routing: RoutingRequest) -> list[dict[str, Any]]:
    """Turns as OpenAI's messages, each image where its placeholder stands.

    Raises:
        ServeError: as many placeholders as images were expected.
    """
    marked = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marked != len(images):
        raise ServeError(
            ErrorKind.INVALID_REQUEST, f"The text holds {marked} <image> placeholders, but {len(images)} pictures came; make them agree."
        )
    waiting = iter([_image_part(image, routing.detail_of(place)) for place, image in enumerate(images)])
    return [{"role": turn.role, "content": _content(turn.text, waiting)} for turn in turns]


def _content(text: str, images: Iterator[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A turn's text, cut at its placeholders; the line break that a template puts after a picture goes with it."""
    head, *rest = text.split(DEFAULT_IMAGE_TOKEN)
    if not rest:
        return head
    parts: list[dict[str, Any]] = [{"type": "text", "text": head}] if head else []
    for piece in rest:
        parts.append(next(images))
        if shown := piece.removeprefix("\n"):
            parts.append({"type": "text", "text": shown})
    return parts


def _image_part(image: EngineImage, detail: Detail | None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image.content, **({"detail": detail} if detail else {})}}


def data_url(image: Image.Image) -> str:
    """An image as a backend gets it."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def check_head(reply: Reply, media_type: str = "text/event-stream") -> None:
    """Let an answer of the type that is expected through.

    Raises:
        ServeError: the backend answered with an error. BrokenResponse: it answered with something else.
    """
    if reply.status != 200:
        raise await _refusal(reply)
    if reply.content_type != media_type:
        raise BrokenResponse(f"it answered with {reply.content_type or 'no type'}, not with {media_type}")


async def _refusal(reply: Reply) -> ServeError:
    body = await _short_body(reply)
    logger.warning("the backend answered with status %d: %r", reply.status, body[:500])
    if reply.status in _OUR_FAULT:
        return ServeError(ErrorKind.BACKEND_FAILED)
    passed_on = _PASSED_ON.get(_error_code(parse_json_object(body)))
    if passed_on is not None and passed_on.fault.status == reply.status:
        return ServeError(passed_on)
    if reply.status in _BY_STATUS:
        return ServeError(_BY_STATUS[reply.status])
    return ServeError(ErrorKind.INVALID_REQUEST if 400 <= reply.status < 500 else ErrorKind.BACKEND_FAILED)


async def _short_body(reply: Reply) -> bytes:
    body = b""
    try:
        async for chunk in reply.chunks():
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    except BrokenResponse:
        pass  # the status has been read, and the text is for the log alone
    return body[:_MAX_ERROR_BYTES]


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
    async for event in reply.events():
        if event.data.strip() == "[DONE]":
            break
        chunk = parse_json_object(event.data)
        if chunk is None:
            raise BrokenResponse("the stream holds something else than JSON objects")
        if "error" in chunk:
            raise _reported(chunk)
        for answered in parser.take(chunk):
            yield answered
    yield parser.end()


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
                raise BrokenResponse("the stream holds a second answer that was not asked for")
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
        return Finished(self._reason, _count(self._usage, "prompt_tokens"), completion, image_reports(self._report), milliseconds)

    def _milliseconds(self, first: float) -> dict[str, float]:
        """The backend's own parts where it tells them, and the sums as they are seen from here."""
        told = self._report.get("milliseconds")
        parts = {str(part): float(value) for part, value in told.items() if is_number(value)} if isinstance(told, dict) else {}
        seen = {"queue": 1000 * (self._queued - self._begun), "prefill": 1000 * (first - self._queued)}
        return {**seen, **parts, "ttft": 1000 * (first - self._begun)}


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) and is_count(value) else 0


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
    """A token's text by its bytes, where the backend tells them: a part of a character has no text of its own."""
    told = token.get("bytes")
    if isinstance(told, list) and all(type(value) is int and 0 <= value < 256 for value in told):
        return bytes(told).decode("utf-8", "surrogateescape")
    return str(token["token"])


def image_reports(report: dict[str, Any]) -> tuple[ImageReport, ...]:
    """What a backend of our own says in `avg_llava` of each picture's cost; empty where it does not."""
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
