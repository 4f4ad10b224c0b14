"""How many visual tokens the images of a request may cost, as fields of a body: shared by every API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from llava.messages import Detail, RoutingRequest
from llava.serve.api.body_models import StrictModel
from llava.serve.api.parsed_request import ImageSource
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ModelCard

ImageDetail = Literal["auto", "low", "high", "original"]
DETAILS: dict[ImageDetail | None, Detail | None] = {"low": "low", "high": "high", "original": "high"}
DETAIL_DESCRIPTION = (
    "How many visual tokens this image gets, within `granularity` and `max_visual_tokens`: `low` the fewest, `high` and "
    "`original` the most; null or `auto` lets the model choose."
)
Granularity = Literal["auto"] | int | Annotated[list[int], Field(min_length=1, max_length=64, fail_fast=True)]


class RoutingFields(StrictModel):
    """How many visual tokens the images may cost."""

    granularity: Granularity | None = Field(
        None, description="Tokens per view: null or `auto` lets the model choose, a number fixes it, a list limits the choice."
    )
    max_visual_tokens: int | None = Field(None, ge=1, le=10_000_000, description="Budget for all images together.")
    granularity_bias: float | None = Field(
        None, ge=-1000, le=1000, allow_inf_nan=False, description="Added to the router's logits per log2 of tokens; negative is cheaper."
    )


def read_routing(
    fields: RoutingFields, card: ModelCard, sources: Sequence[ImageSource], granularity_field: str = "granularity"
) -> RoutingRequest:
    """The routing options of a request, for all images and for each, checked against what the model has.

    Args:
        granularity_field: the name under which the granularity was sent.

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
