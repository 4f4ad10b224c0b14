"""Fields that several of OpenAI's APIs share, and how they are read."""

from __future__ import annotations

from pydantic import Field

from llava.serve.api.body_models import StrictModel
from llava.serve.api.compat_fields import STREAM_OPTIONS_FIELDS, with_compat_fields
from llava.serve.api.routing_fields import RoutingFields
from llava.serve.api.sampling_fields import SamplingFields, check_at_most
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, Limits, ModelCard


@with_compat_fields(STREAM_OPTIONS_FIELDS)
class StreamOptions(StrictModel):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds `usage` and no choices.")


class ClientFields(StrictModel):
    """For the client's own records; they do not affect the answer."""

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
    # The upper bound is in `Limits`: one in the schema would be reported instead of it.
    n: int | None = Field(None, ge=1)


def read_count(n: int | None, limits: Limits) -> int:
    """The number of answers to each prompt."""
    check_at_most(n, limits.max_n, "n")
    return n or 1


def read_include_usage(fields: AnswerFields) -> bool:
    """Whether a stream ends with a chunk about usage."""
    if fields.stream_options is not None and not fields.stream:
        raise FieldError("stream_options is set, but stream is not true; set both or neither.", "stream_options")
    return bool(fields.stream_options and fields.stream_options.include_usage)


def check_model(name: str, card: ModelCard) -> None:
    """Refuse a model that is not the served one."""
    if name != card.name:
        raise FieldError(f"There is no model {name[:100]!r} here, only {card.name!r}.", "model", ErrorKind.MODEL_NOT_FOUND)
