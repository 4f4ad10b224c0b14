"""The OpenAI chat API as data: what a body may hold, how it becomes generation requests, and how events become bodies.

The set of fields is closed: one we do not know is refused by its name, never ignored. Beyond OpenAI's there are `granularity`,
`max_visual_tokens` and `granularity_bias`, and answers tell in `usage` and `avg_llava` what was chosen and what it saved.
Nothing here opens a connection or decodes a picture.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.messages import Detail, Message, RoutingRequest, normalise_turns, text_of_parts
from llava.serve.api.body_fields import StrictModel
from llava.serve.api.compat_fields import OF_CHAT, OF_IMAGE, OF_IMAGE_URL, OF_MESSAGE, OF_STREAM_OPTIONS, OF_TEXT, with_neutral
from llava.serve.api.parsed_request import Call, FullAnswer, ImageSource
from llava.serve.api.sampling_fields import SamplingFields, longest_answer, read_sampling
from llava.serve.http.errors import FieldError, error_fields, field_path
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import (
    ErrorKind,
    Finished,
    ImageReport,
    Limits,
    ModelCard,
    Sampling,
    ServeError,
    Started,
    TokenScore,
    token_bytes,
)

LOWEST_LOG_PROBABILITY = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same."""


@with_neutral(OF_TEXT)
class TextPart(StrictModel):
    """Text within a message."""

    type: Literal["text"]
    text: str


ImageDetail = Literal["auto", "low", "high", "original"]
DETAILS: dict[ImageDetail | None, Detail | None] = {"low": "low", "high": "high", "original": "high"}
DETAIL_DESCRIPTION = (
    "How many visual tokens this image gets, within what `granularity` and `max_visual_tokens` leave open: `low` the fewest, `high` and "
    "`original` the most; null or `auto` lets the model choose."
)


@with_neutral(OF_IMAGE_URL)
class ImageUrl(StrictModel):
    """Where a picture is: a data URL (`data:image/png;base64,...`), or a web address where the server fetches those."""

    url: str
    detail: ImageDetail | None = Field(None, description=DETAIL_DESCRIPTION)


@with_neutral(OF_IMAGE)
class ImagePart(StrictModel):
    """A picture within a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


@with_neutral(OF_MESSAGE)
class ChatMessage(StrictModel):
    """One turn, empty ones among them. `developer` means `system`. Pictures go into users' turns."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None
    name: str | None = Field(None, max_length=256, description="Not shown to the model.")
    parsed: Any = Field(None, description="Not read: what OpenAI's SDK made of an earlier answer's text.")


@with_neutral(OF_STREAM_OPTIONS)
class StreamOptions(StrictModel):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds `usage` and no choices.")


Granularity = Literal["auto"] | int | Annotated[list[int], Field(min_length=1, max_length=64, fail_fast=True)]


class RoutingFields(StrictModel):
    """How many visual tokens the pictures may cost."""

    granularity: Granularity | None = Field(
        None, description="Tokens per view: null or `auto` lets the model choose, a number fixes it, a list limits the choice."
    )
    max_visual_tokens: int | None = Field(None, ge=1, le=10_000_000, description="Budget for all pictures together.")
    granularity_bias: float | None = Field(
        None, ge=-1000, le=1000, allow_inf_nan=False, description="Added to the router's logits per log2 of tokens; negative is cheaper."
    )


class ClientFields(StrictModel):
    """For the client's own records; nothing of an answer depends on them."""

    user: str | None = Field(None, max_length=256, description="Written to the log beside the request's id.")
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None


class AnswerFields(SamplingFields, RoutingFields, ClientFields):
    """What chat and text completions share."""

    model: str = Field(max_length=512)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # How many of these at most is the server's to say (`Limits`): a limit here as well would be told in place of that one.
    n: int | None = Field(None, ge=1)


@with_neutral(OF_CHAT)
class ChatRequest(AnswerFields):
    """A conversation to continue."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)


class ErrorFields(BaseModel):
    """What went wrong; `request_id` finds the details in the server's log."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str
    least: int | None = Field(None, description="The smallest value of `param` that would do, where there is one.")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


class ImageFields(BaseModel):
    """How one picture's cost came about; see `llava.serve.protocol.ImageReport`."""

    granularity: int
    visual_tokens: int
    full_visual_tokens: int
    tokens_per_level: dict[str, int]
    logits: list[float]
    probabilities: list[float]
    cached: bool | None
    grid: dict[str, Any] | None


class ReportFields(BaseModel):
    """What the answer took."""

    images: list[ImageFields]
    milliseconds: dict[str, float]


class UsageFields(BaseModel):
    """Tokens; the prompt's include the visual ones."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens: int
    full_visual_tokens: int
    granularities: list[int]


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


class ModelFields(BaseModel):
    """A served model."""

    id: str
    object: str
    created: int
    owned_by: str
    context_length: int
    granularities: list[int]
    has_router: bool
    takes_images: bool
    max_images: int


class ModelList(BaseModel):
    """The served models."""

    object: str
    data: list[ModelFields]


M = TypeVar("M", bound=BaseModel)


def validate(schema: type[M], value: Any) -> M:
    """Check plain JSON values against a schema.

    Raises:
        FieldError: one thing that is wrong, by the name of its field; values are not quoted.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(found, key=lambda each: len(each["loc"]))  # of a union's branches, the one that fits furthest
        param = _field_path(first["loc"])
        others = [each for each in found if _field_path(each["loc"]) == param and len(each["loc"]) == len(first["loc"])]
        raise FieldError(f"{param or 'The body'!r}: {_what_is_wrong(first['loc'], others)}.", param or None) from error


def _what_is_wrong(loc: Sequence[int | str], found: Sequence[Mapping[str, Any]]) -> str:
    """A clause for the errors at one place: the field's own, or else that of each kind of error, or else pydantic's."""
    name = _INDEX.sub("[*]", _field_path(loc))
    if found[0]["type"] in ("union_tag_invalid", "union_tag_not_found"):  # pydantic's words quote what was sent
        return f"expected an object whose type is {_PART_TYPES[name]}"
    if name in _FIELD_CLAUSES and found[0]["type"] not in ("extra_forbidden", "missing"):
        return _FIELD_CLAUSES[name]
    return ", or: ".join(dict.fromkeys(_KIND_CLAUSES.get(each["type"], each["msg"]) for each in found))


_GRANULARITY_CLAUSE = "expected 'auto', a whole number, or a list of 1 to 64 whole numbers"
_FORMAT_CLAUSE = "expected 'text', 'json_object' or 'json_schema'"
_SCHEMA_CLAUSE = "expected a JSON schema, as an object or as its text"
_FIELD_CLAUSES = {
    "granularity": _GRANULARITY_CLAUSE,
    "vis_token_granularity": _GRANULARITY_CLAUSE,
    "stop": "expected a text, or a short list of texts",
    "prompt": "expected a text, or a list of texts",
    "input": "expected a text, or a list of messages",
    "input[*].content": "expected a text, or a list of up to 1024 parts",
    "response_format.type": _FORMAT_CLAUSE,
    "text.format.type": _FORMAT_CLAUSE,
    "structured_outputs.json": _SCHEMA_CLAUSE,
    "guided_json": _SCHEMA_CLAUSE,
    "messages[*].content": "expected a text, or a list of up to 1024 parts",
}
"""Where pydantic's words would name the branches of a union one by one."""
_PART_TYPES = {
    "messages[*].content[*]": "'text' or 'image_url'",
    "input[*].content[*]": "'input_text', 'input_image' or 'output_text'",
}
_KIND_CLAUSES = {
    "extra_forbidden": "this field is not known here",
    "missing": "this field is missing",
    "model_type": "expected an object",  # pydantic's words name our classes
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "too_long": "the list is too long",  # the schema's limit is above the server's own, which is told once it is read
}
"""By pydantic's names of errors."""


def _field_path(loc: Sequence[int | str]) -> str:
    """The names and places in pydantic's path, without the branches of unions and the kinds of parts."""
    kinds = {place + 1 for place, part in enumerate(loc) if isinstance(part, int) and "content" in loc[:place]}
    return field_path([part for place, part in enumerate(loc) if place not in kinds and _is_field(part)])[:200]


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or not (part in _BRANCHES or "[" in part)


_INDEX = re.compile(r"\[\d+\]")
_BRANCHES = frozenset(("str", "int", "float", "bool", "none"))


def read_chat(value: Any, card: ModelCard, limits: Limits) -> Call:
    """Read the JSON values of a chat request.

    Args:
        card: the model that is asked. limits: what one request may hold.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(ChatRequest, value)
    check_model(request.model, card)
    turns, sources = read_messages(request.messages, card, limits)
    return Call(
        turns=turns,
        sources=sources,
        sampling=_read_sampling(request, limits),
        routing=read_routing(request, card, sources),
        n=read_count(request.n, limits),
        stream=bool(request.stream),
        include_usage=read_include_usage(request),
        user=request.user,
    )


def read_count(n: int | None, limits: Limits) -> int:
    """How many answers are wanted."""
    if (n or 1) > limits.max_n:
        raise FieldError(f"n is {n}, expected at most {limits.max_n}.", "n")
    return n or 1


def read_include_usage(fields: AnswerFields) -> bool:
    """Whether a stream ends with a chunk about usage."""
    if fields.stream_options is not None and not fields.stream:
        raise FieldError("stream_options is there, but stream is not true; set both or neither.", "stream_options")
    return bool(fields.stream_options and fields.stream_options.include_usage)


def check_model(name: str, card: ModelCard) -> None:
    """Refuse a model that is not the served one."""
    if name != card.name:
        raise FieldError(f"There is no model {name[:100]!r} here, only {card.name!r}.", "model", ErrorKind.MODEL_NOT_FOUND)


@dataclass(frozen=True)
class ChatTurn:
    """One turn as a client sent it. parts: texts and images in its own order. param: the field of its content."""

    role: str
    parts: Sequence[str | ImageSource]
    param: str


def read_messages(
    messages: Sequence[ChatMessage], card: ModelCard, limits: Limits
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The messages of a chat, see `read_turns`."""
    places = [f"messages[{index}].content" for index in range(len(messages))]
    spoken = [ChatTurn(message.role, _parts(message.content, param), param) for message, param in zip(messages, places, strict=True)]
    return read_turns(spoken, card, limits, "messages")


def _parts(content: str | list[ContentPart] | None, param: str) -> list[str | ImageSource]:
    if not isinstance(content, list):
        return [content or ""]
    return [
        ImageSource(part.image_url.url, f"{param}[{place}].image_url.url", DETAILS.get(part.image_url.detail))
        if isinstance(part, ImagePart)
        else part.text
        for place, part in enumerate(content)
    ]


def read_turns(
    spoken: Sequence[ChatTurn], card: ModelCard, limits: Limits, param: str
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """A conversation as the engine has it, with a placeholder for each image, and the images in that order.

    Args:
        param: the field that all of it came in.

    Raises:
        FieldError: what cannot be answered, and in which field.
    """
    if len(spoken) > limits.max_messages:
        raise FieldError(f"There are {len(spoken)} messages, expected at most {limits.max_messages}.", param)
    turns = [Message("system" if turn.role == "developer" else turn.role, _text_of(turn)) for turn in spoken]
    sources = tuple(part for turn in spoken for part in turn.parts if isinstance(part, ImageSource))
    check_images(len(sources), card, limits, param)
    check_prompt_length(sum(len(turn.text) for turn in turns), limits, param)
    try:
        return tuple(normalise_turns(turns, len(sources))), sources
    except ValueError as error:  # nothing to answer; the sentence is this package's own and names places only
        raise FieldError(str(error), param) from error


def _text_of(turn: ChatTurn) -> str:
    """A turn's text, with a placeholder for each image; the images keep their own order."""
    if turn.role != "user" and any(isinstance(part, ImageSource) for part in turn.parts):
        raise FieldError(f"A message of role {turn.role} holds a picture; only users' messages may.", turn.param)
    if any(mark in part for part in turn.parts if isinstance(part, str) for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)):
        raise FieldError(
            f"The text holds {DEFAULT_IMAGE_TOKEN}, which marks a picture's place; send pictures as parts of their own.", turn.param
        )
    return text_of_parts([part if isinstance(part, str) else DEFAULT_IMAGE_TOKEN for part in turn.parts])


def check_images(count: int, card: ModelCard, limits: Limits, param: str) -> None:
    """Refuse more pictures than the model or the server takes."""
    most = min(limits.max_images, card.max_images) if card.takes_images else 0
    if count > most:
        raise FieldError(f"There are {count} pictures, expected at most {most}.", param)


def check_prompt_length(count: int, limits: Limits, param: str) -> None:
    """Refuse a longer text than the server reads."""
    if count > limits.max_prompt_characters:
        raise FieldError(
            f"The text has {count} characters, expected at most {limits.max_prompt_characters}.", param, ErrorKind.CONTEXT_LENGTH
        )


def _read_sampling(request: ChatRequest, limits: Limits) -> Sampling:
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise FieldError("max_tokens and max_completion_tokens differ, but mean the same; give one.", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise FieldError("top_logprobs is there, but logprobs is not true; set both or neither.", "top_logprobs")
    if (request.top_logprobs or 0) > limits.max_logprobs:
        raise FieldError(f"top_logprobs is {request.top_logprobs}, expected at most {limits.max_logprobs}.", "top_logprobs")
    asked = request.max_tokens or request.max_completion_tokens
    longest = longest_answer(asked, limits, "max_tokens" if request.max_tokens else "max_completion_tokens")
    return read_sampling(request, limits, longest, (request.top_logprobs or 0) if request.logprobs else None)


def read_routing(
    fields: RoutingFields, card: ModelCard, sources: Sequence[ImageSource], granularity_field: str = "granularity"
) -> RoutingRequest:
    """What is asked about granularity, of all images and of each, checked against what the model has.

    Args:
        granularity_field: the name that the granularity came under.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    wanted = None if isinstance(fields.granularity, str) else fields.granularity
    if not card.granularities and (wanted is not None or fields.max_visual_tokens is not None):
        param = "max_visual_tokens" if wanted is None else granularity_field
        raise FieldError("This model has no granularities to choose from; leave the field out.", param)
    if fields.granularity_bias and not card.has_router:
        raise FieldError("This model has no router to bias; leave the field out.", "granularity_bias")
    named = [wanted] if isinstance(wanted, int) else list(wanted or ())
    known = [number in card.granularities for number in named]
    finest_or_more = isinstance(wanted, int) and wanted > card.granularities[-1]  # scripts ask every LLaVA for 576
    if not all(known) and not finest_or_more:
        raise FieldError(f"{granularity_field} is not among this model's: {list(card.granularities)}.", granularity_field)
    granularity = tuple(wanted) if isinstance(wanted, list) else wanted
    details = tuple(source.detail for source in sources)
    return RoutingRequest(granularity, fields.max_visual_tokens, fields.granularity_bias or 0.0, details if any(details) else ())


def image_fields(report: ImageReport) -> dict[str, Any]:
    """One picture's report as JSON values."""
    return {
        "granularity": report.granularity,
        "visual_tokens": report.visual_tokens,
        "full_visual_tokens": report.full_visual_tokens,
        "tokens_per_level": {str(level): tokens for level, tokens in report.tokens_per_level.items()},
        "logits": report.logits,
        "probabilities": report.probabilities,
        "cached": report.cached,
        "grid": report.grid,
    }


def report_fields(event: Started | Finished) -> dict[str, Any]:
    """The value of `avg_llava`: pictures and milliseconds."""
    return {
        "images": [image_fields(report) for report in event.images],
        "milliseconds": {part: round(value, 3) for part, value in event.milliseconds.items()},
    }


def usage_fields(endings: Sequence[Finished], n: int = 0) -> dict[str, Any]:
    """The value of `usage`: each prompt counts once, the answers add up.

    Args:
        n: answers to each prompt, in a row; 0 where all of them answer one.
    """
    prompts = endings[:: n or len(endings)]
    images = [image for ending in prompts for image in ending.images]
    read, written = sum(ending.prompt_tokens for ending in prompts), sum(ending.completion_tokens for ending in endings)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "visual_tokens": sum(image.visual_tokens for image in images),
        "full_visual_tokens": sum(image.full_visual_tokens for image in images),
        "granularities": [image.granularity for image in images],
    }


def score_fields(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """The value of a choice's `logprobs`."""
    return {
        "content": [
            {
                **_token_fields(score.text, score.log_probability),
                "top_logprobs": [_token_fields(text, value) for text, value in score.alternatives],
            }
            for score in scores
        ],
        "refusal": None,
    }


def _token_fields(text: str, log_probability: float) -> dict[str, Any]:
    data = token_bytes(text)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(log_probability, LOWEST_LOG_PROBABILITY), "bytes": list(data)}


class ChatWriter:
    """Writes the bodies of one call's answer; `llava.serve.api.openai_completions` has another form of its choices.

    Args:
        request_id: names the completion. model: as served. call: says whether there are log probabilities, and whether a stream ends with a
            chunk that has `usage`; the other chunks then hold it as null.
    """

    media_type = "text/event-stream"
    kind, whole, part, text_field = "chatcmpl", "chat.completion", "chat.completion.chunk", "content"

    def __init__(self, request_id: str, model: str, call: Call) -> None:
        self.call = call
        self.head = {"id": f"{self.kind}-{request_id}", "created": int(time.time()), "model": model}
        self.scored = call.sampling.logprobs is not None
        self._no_usage: dict[str, Any] = {"usage": None} if call.include_usage else {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def completion(self, answers: Sequence[FullAnswer]) -> dict[str, Any]:
        choices = [
            self._choice(index, self.whole_text(text), self.scores(index, text, scores), ending.finish_reason)
            for index, (text, scores, ending) in enumerate(answers)
        ]
        return {**self.head, "object": self.whole, "choices": choices, **self._costs([ending for _, _, ending in answers])}

    def opening(self, index: int, event: Started) -> bytes:
        """The chunk before all text; it already tells what the pictures cost."""
        return self._chunk(index, self.first_text(), None, None, avg_llava=report_fields(event))

    def piece(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes:
        """The chunk with the next text. Without scores only the text differs from one to the next: the rest is written once."""
        if self.scored:
            told = self.scores(index, text, scores)
            return self._chunk(index, self.next_text(text), told if scores else None, None)
        if index not in self._frames:
            before, empty, after = self._chunk(index, self.next_text(""), None, None).partition(f'"{self.text_field}":""'.encode())
            self._frames[index] = before + empty[:-2], after
        before, after = self._frames[index]
        return before + compact_json(text) + after

    def ending(self, index: int, event: Finished) -> bytes:
        return self._chunk(index, self.last_text(), None, event.finish_reason, avg_llava=report_fields(event))

    def closing(self, endings: Mapping[int, Finished]) -> bytes:
        if not self.call.include_usage:
            return STREAM_END
        costs = self._costs([endings[index] for index in sorted(endings)])
        return server_sent({**self.head, "object": self.part, "choices": [], **costs}) + STREAM_END

    def failure(self, error: ServeError, request_id: str) -> bytes:
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
        return {"usage": usage_fields(endings, self.call.n), "avg_llava": report_fields(slowest)}

    def _chunk(self, index: int, text: Mapping[str, Any], logprobs: Any, finish_reason: str | None, **extra: Any) -> bytes:
        choice = self._choice(index, text, logprobs, finish_reason)
        return server_sent({**self.head, "object": self.part, "choices": [choice], **self._no_usage, **extra})

    @staticmethod
    def _choice(index: int, text: Mapping[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": finish_reason}


def server_sent(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + compact_json(value) + b"\n\n"


STREAM_END = b"data: [DONE]\n\n"


def model_fields(card: ModelCard, created: int) -> dict[str, Any]:
    """A model as `/v1/models` tells it."""
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "avg-llava",
        "context_length": card.context_length,
        "granularities": list(card.granularities),
        "has_router": card.has_router,
        "takes_images": card.takes_images,
        "max_images": card.max_images,
        **({} if card.description is None else {"description": card.description}),
    }
