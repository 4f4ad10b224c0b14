"""OpenAI's chat completions as data: the schema of a body, how it is parsed, and how events are written as answers.

The set of fields is closed: an unknown one is refused by name, never ignored. Beyond OpenAI's there are `granularity`,
`max_visual_tokens` and `granularity_bias`; answers report in `usage` and `avg_llava` what was chosen and what it saved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from llava.messages import Message
from llava.serve.api.answer_fields import ReportFields, UsageFields, report_fields, score_fields, usage_fields
from llava.serve.api.body_models import StrictModel
from llava.serve.api.compat_fields import CHAT_FIELDS, IMAGE_FIELDS, IMAGE_URL_FIELDS, MESSAGE_FIELDS, TEXT_FIELDS, with_compat_fields
from llava.serve.api.parsed_request import FullAnswer, ImageSource, ParsedRequest
from llava.serve.api.request_fields import AnswerFields, check_model, read_count, read_include_usage
from llava.serve.api.routing_fields import DETAIL_DESCRIPTION, DETAILS, ImageDetail, read_routing
from llava.serve.api.sampling_fields import check_at_most, longest_answer, read_sampling
from llava.serve.api.turns import ChatTurn, read_turns
from llava.serve.api.validation import validate
from llava.serve.http.errors import FieldError, error_fields
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import (
    Finished,
    Limits,
    ModelCard,
    Sampling,
    ServeError,
    Started,
    TokenScore,
)


@with_compat_fields(TEXT_FIELDS)
class TextPart(StrictModel):
    """Text within a message."""

    type: Literal["text"]
    text: str


@with_compat_fields(IMAGE_URL_FIELDS)
class ImageUrl(StrictModel):
    """Where an image is: a data URL (`data:image/png;base64,...`), or a web address where the server fetches those."""

    url: str
    detail: ImageDetail | None = Field(None, description=DETAIL_DESCRIPTION)


@with_compat_fields(IMAGE_FIELDS)
class ImagePart(StrictModel):
    """An image within a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


@with_compat_fields(MESSAGE_FIELDS)
class ChatMessage(StrictModel):
    """One turn; it may be empty. `developer` means `system`. Only user turns may hold images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None
    name: str | None = Field(None, max_length=256, description="Not shown to the model.")
    parsed: Any = Field(None, description="Not read: what OpenAI's SDK made of an earlier answer's text.")


@with_compat_fields(CHAT_FIELDS)
class ChatRequest(AnswerFields):
    """A conversation to continue."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)


class ChatCompletion(BaseModel):
    """A whole answer, or with `object` `chat.completion.chunk` and `delta` in its choices, a part of a streamed one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: UsageFields | None = None
    avg_llava: ReportFields | None = None


class TextCompletion(ChatCompletion):
    """Continuations of finished prompts, streamed or whole, with `text` in each choice."""


def read_chat(value: Any, card: ModelCard, limits: Limits) -> ParsedRequest:
    """Parse the JSON values of a chat request.

    Args:
        card: of the served model. limits: of one request.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(ChatRequest, value)
    check_model(request.model, card)
    turns, sources = read_messages(request.messages, card, limits)
    return ParsedRequest(
        turns=turns,
        sources=sources,
        sampling=_read_sampling(request, limits),
        routing=read_routing(request, card, sources),
        n=read_count(request.n, limits),
        stream=bool(request.stream),
        include_usage=read_include_usage(request),
        user=request.user,
    )


def read_messages(
    messages: Sequence[ChatMessage], card: ModelCard, limits: Limits
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The messages of a chat, see `read_turns`."""
    params = [f"messages[{index}].content" for index in range(len(messages))]
    turns = [ChatTurn(message.role, _parts(message.content, param), param) for message, param in zip(messages, params, strict=True)]
    return read_turns(turns, card, limits, "messages")


def _parts(content: str | list[ContentPart] | None, param: str) -> list[str | ImageSource]:
    if not isinstance(content, list):
        return [content or ""]
    return [
        ImageSource(part.image_url.url, f"{param}[{index}].image_url.url", DETAILS.get(part.image_url.detail))
        if isinstance(part, ImagePart)
        else part.text
        for index, part in enumerate(content)
    ]


def _read_sampling(request: ChatRequest, limits: Limits) -> Sampling:
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise FieldError("max_tokens and max_completion_tokens differ, but mean the same; give one.", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise FieldError("top_logprobs is set, but logprobs is not true; set both or neither.", "top_logprobs")
    check_at_most(request.top_logprobs, limits.max_logprobs, "top_logprobs")
    asked = request.max_tokens or request.max_completion_tokens
    longest = longest_answer(asked, limits, "max_tokens" if request.max_tokens else "max_completion_tokens")
    return read_sampling(request, limits, longest, (request.top_logprobs or 0) if request.logprobs else None)


class ChatWriter:
    """Writes the answer to one request, streamed or whole; `llava.serve.api.openai_completions` overrides the form of its choices.

    Args:
        request_id: names the completion. model: as served. parsed: says whether log probabilities were requested, and whether a stream ends
            with a chunk that has `usage`; the other chunks then hold it as null.
    """

    media_type = "text/event-stream"
    id_prefix, object_type, chunk_type, text_field = "chatcmpl", "chat.completion", "chat.completion.chunk", "content"

    def __init__(self, request_id: str, model: str, parsed: ParsedRequest) -> None:
        self.parsed = parsed
        self.head = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}
        self.scored = parsed.sampling.logprobs is not None
        self._no_usage: dict[str, Any] = {"usage": None} if parsed.include_usage else {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def completion(self, answers: Sequence[FullAnswer]) -> dict[str, Any]:
        choices = [
            self._choice(index, self.whole_text(text), self.scores(index, text, scores), ending.finish_reason)
            for index, (text, scores, ending) in enumerate(answers)
        ]
        return {**self.head, "object": self.object_type, "choices": choices, **self._costs([ending for _, _, ending in answers])}

    def on_started(self, index: int, event: Started) -> bytes:
        """The chunk before any text; it already reports what the images cost."""
        return self._chunk(index, self.first_text(), None, None, avg_llava=report_fields(event))

    def on_text(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes:
        """The chunk with the next text. Without scores only the text differs from one to the next: the rest is written once."""
        if self.scored:
            logprobs = self.scores(index, text, scores)
            return self._chunk(index, self.next_text(text), logprobs if scores else None, None)
        if index not in self._frames:
            before, empty, after = self._chunk(index, self.next_text(""), None, None).partition(f'"{self.text_field}":""'.encode())
            self._frames[index] = before + empty[:-2], after
        before, after = self._frames[index]
        return before + compact_json(text) + after

    def on_finished(self, index: int, event: Finished) -> bytes:
        return self._chunk(index, self.last_text(), None, event.finish_reason, avg_llava=report_fields(event))

    def on_all_finished(self, endings: Mapping[int, Finished]) -> bytes:
        if not self.parsed.include_usage:
            return STREAM_END
        costs = self._costs([endings[index] for index in sorted(endings)])
        return server_sent({**self.head, "object": self.chunk_type, "choices": [], **costs}) + STREAM_END

    def on_error(self, error: ServeError, request_id: str) -> bytes:
        return server_sent({"error": error_fields(error, request_id)}) + STREAM_END

    # How a choice holds its text and scores.

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def first_text(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def next_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def last_text(self) -> dict[str, Any]:
        return {"delta": {}}

    def scores(self, index: int, text: str, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """The value of a choice's `logprobs`, where they were asked for. text: the answer's next, or all of it."""
        return score_fields(scores) if self.scored else None

    def _costs(self, endings: Sequence[Finished]) -> dict[str, Any]:
        slowest = max(endings, key=lambda ending: ending.milliseconds.get("total", 0.0))
        return {"usage": usage_fields(endings, self.parsed.n), "avg_llava": report_fields(slowest)}

    def _chunk(self, index: int, text: Mapping[str, Any], logprobs: Any, finish_reason: str | None, **extra: Any) -> bytes:
        choice = self._choice(index, text, logprobs, finish_reason)
        return server_sent({**self.head, "object": self.chunk_type, "choices": [choice], **self._no_usage, **extra})

    @staticmethod
    def _choice(index: int, text: Mapping[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": finish_reason}


def server_sent(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + compact_json(value) + b"\n\n"


STREAM_END = b"data: [DONE]\n\n"
