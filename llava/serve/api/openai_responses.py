"""OpenAI's Responses API as data, stateless: no response is stored, so each request brings its whole conversation as items."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llava.serve.api.answer_fields import report_fields, score_fields, usage_fields
from llava.serve.api.body_models import StrictModel
from llava.serve.api.compat_fields import (
    INPUT_IMAGE_FIELDS,
    MESSAGE_FIELDS,
    RESPONSE_FIELDS,
    STREAM_OPTIONS_FIELDS,
    TEXT_FIELDS,
    with_compat_fields,
)
from llava.serve.api.guide_fields import FormatType, JsonSchema, guide_of_format
from llava.serve.api.parsed_request import FullAnswer, ImageSource, ParsedRequest
from llava.serve.api.request_fields import ClientFields, check_model
from llava.serve.api.routing_fields import DETAIL_DESCRIPTION, DETAILS, ImageDetail, RoutingFields, read_routing
from llava.serve.api.sampling_fields import SamplingFields, check_at_most, longest_answer, read_sampling
from llava.serve.api.turns import ChatTurn, read_turns
from llava.serve.api.validation import validate
from llava.serve.http.errors import error_fields
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import Finished, Guide, Limits, ModelCard, ServeError, Started, TokenScore


@with_compat_fields(TEXT_FIELDS)
class InputText(StrictModel):
    """Text within a message."""

    type: Literal["input_text"]
    text: str


@with_compat_fields(TEXT_FIELDS)
class OutputText(StrictModel):
    """Text of an earlier answer, as it came."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="Not read.")
    parsed: Any = Field(None, description="Not read: what OpenAI's SDK made of an earlier answer's text.")


@with_compat_fields(INPUT_IMAGE_FIELDS)
class InputImage(StrictModel):
    """An image within a user's message."""

    type: Literal["input_image"]
    image_url: str = Field(description="A data URL, or a web address where the server fetches those.")
    detail: ImageDetail | None = Field(None, description=DETAIL_DESCRIPTION)


InputPart = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


@with_compat_fields(MESSAGE_FIELDS)
class InputMessage(StrictModel):
    """One turn: a user's, or an earlier answer as it came. `developer` means `system`. Only user turns may hold images."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)]
    id: str | None = Field(None, max_length=256, description="Not read.")
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class TextFormat(StrictModel):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: FormatType
    name: str | None = Field(None, max_length=256)
    schema_: JsonSchema | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFields(StrictModel):
    """The format of the text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


@with_compat_fields(STREAM_OPTIONS_FIELDS)
class ResponseStreamOptions(StrictModel):
    """Options of a stream: there are none to choose."""


@with_compat_fields(RESPONSE_FIELDS)
class ResponseRequest(SamplingFields, RoutingFields, ClientFields):
    """A conversation to answer."""

    model: str = Field(max_length=512)
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: str | None = Field(None, description="A system message before the others.")
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextFields | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, description="Log probabilities of the answer's tokens; there is no reasoning to include."
    )
    top_logprobs: int | None = Field(None, ge=0)


def read_response(value: Any, card: ModelCard, limits: Limits) -> ParsedRequest:
    """Parse the JSON values of a request to the Responses API.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(ResponseRequest, value)
    check_model(request.model, card)
    turns, sources = read_turns(_spoken(request), card, limits, "input")
    longest = longest_answer(request.max_output_tokens, limits, "max_output_tokens")
    return ParsedRequest(
        turns=turns,
        sources=sources,
        sampling=read_sampling(request, limits, longest, _read_logprobs(request, limits), _read_format(request.text, limits)),
        routing=read_routing(request, card, sources),
        stream=bool(request.stream),
        user=request.user,
        field_names={"messages": "input"},
        repeated={
            "instructions": request.instructions,
            "metadata": request.metadata or {},
            "max_output_tokens": request.max_output_tokens,
            "text": _repeated_text(request.text),
        },
    )


def _spoken(request: ResponseRequest) -> list[ChatTurn]:
    system = [] if request.instructions is None else [ChatTurn("system", [request.instructions], "instructions")]
    if isinstance(request.input, str):
        return [*system, ChatTurn("user", [request.input], "input")]
    return [*system, *(_turn(message, f"input[{index}].content") for index, message in enumerate(request.input))]


def _turn(message: InputMessage, param: str) -> ChatTurn:
    if isinstance(message.content, str):
        return ChatTurn(message.role, [message.content], param)
    parts = [
        ImageSource(part.image_url, f"{param}[{index}].image_url", DETAILS.get(part.detail)) if isinstance(part, InputImage) else part.text
        for index, part in enumerate(message.content)
    ]
    return ChatTurn(message.role, parts, param)


def _read_format(text: TextFields | None, limits: Limits) -> Guide | None:
    wanted = text.format if text else None
    return None if wanted is None else guide_of_format(wanted.type, wanted.schema_, ("text.format", "schema"), limits)


def _repeated_text(text: TextFields | None) -> dict[str, Any]:
    """`text` as an answer repeats it, defaults filled in."""
    wanted = text.format if text else None
    repeated = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_unset=True)
    return {"format": repeated, "verbosity": "medium"}


def _read_logprobs(request: ResponseRequest, limits: Limits) -> int | None:
    """How many alternatives to report per token; `None` where no log probabilities are requested."""
    check_at_most(request.top_logprobs, limits.max_logprobs, "top_logprobs")
    wanted = "message.output_text.logprobs" in (request.include or ()) or bool(request.top_logprobs)
    return (request.top_logprobs or 0) if wanted else None


class ResponseWriter:
    """Writes the body or the events of one response.

    Args:
        request_id: names the response and its one item. model: as served. parsed: asks for one answer.
    """

    media_type = "text/event-stream"

    def __init__(self, request_id: str, model: str, parsed: ParsedRequest) -> None:
        self.parsed = parsed
        self.location = {"item_id": f"msg_{request_id}", "output_index": 0, "content_index": 0}
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time()), "model": model}
        self._count = 0  # events so far
        self._texts: list[str] = []
        self._scores: list[TokenScore] = []

    def completion(self, answers: Sequence[FullAnswer]) -> dict[str, Any]:
        [(text, scores, ending)] = answers
        return self._response(_status(ending), [self._item(_status(ending), text, scores)], ending)

    def on_started(self, index: int, event: Started) -> bytes:
        """The events before any text; the response in them already reports what the images cost."""
        begun = {**self._response("in_progress", []), "avg_llava": report_fields(event)}
        empty = {**self._item("in_progress", "", ()), "content": []}
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=empty)
            + self._event("response.content_part.added", **self.location, part=self._part("", ()))
        )

    def on_text(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes:
        self._texts.append(text)
        self._scores.extend(scores)
        return self._event("response.output_text.delta", **self.location, delta=text, logprobs=self._logprobs(scores))

    def on_finished(self, index: int, event: Finished) -> bytes:
        status, text = _status(event), "".join(self._texts)
        item = self._item(status, text, self._scores)
        return (
            self._event("response.output_text.done", **self.location, text=text, logprobs=self._logprobs(self._scores))
            + self._event("response.content_part.done", **self.location, part=self._part(text, self._scores))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=self._response(status, [item], event))
        )

    def on_all_finished(self, endings: Any) -> bytes:
        return b""

    def on_error(self, error: ServeError, request_id: str) -> bytes:
        return error_event(error, request_id, self._count)

    def _event(self, event_type: str, **fields: Any) -> bytes:
        self._count += 1
        return _typed_event(event_type, self._count - 1, **fields)

    def _response(self, status: str, output: list[dict[str, Any]], ending: Finished | None = None) -> dict[str, Any]:
        sampling = self.parsed.sampling
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self.parsed.repeated,
            "output": output,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": sampling.logprobs or 0,
            "truncation": "disabled",
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "user": self.parsed.user,
            "usage": None if ending is None else _usage(ending),
            **({} if ending is None else {"completed_at": int(time.time()), "avg_llava": report_fields(ending)}),
        }

    def _item(self, status: str, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        content = [self._part(text, scores)]
        return {"id": self.location["item_id"], "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(scores)}

    def _logprobs(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return list(score_fields(scores)["content"])


def error_event(error: ServeError, request_id: str, sequence_number: int = 0) -> bytes:
    """OpenAI's `error` event; some of its clients read the fields beside `type`, others those in `error`."""
    fields = error_fields(error, request_id)
    return _typed_event("error", sequence_number, **{name: fields[name] for name in ("code", "message", "param")}, error=fields)


def _typed_event(event_type: str, sequence_number: int, **fields: Any) -> bytes:
    data = compact_json({"type": event_type, "sequence_number": sequence_number, **fields})
    return b"event: " + event_type.encode() + b"\ndata: " + data + b"\n\n"


def _status(ending: Finished) -> str:
    return "incomplete" if ending.finish_reason == "length" else "completed"


def _usage(ending: Finished) -> dict[str, Any]:
    usage = usage_fields([ending])
    return {
        "input_tokens": usage.pop("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.pop("completion_tokens"),
        "output_tokens_details": {"reasoning_tokens": 0},
        **usage,
    }
