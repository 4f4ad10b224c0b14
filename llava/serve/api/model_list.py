"""A served model as `/v1/models` describes it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from llava.serve.protocol import ModelCard


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


def model_fields(card: ModelCard, created: int) -> dict[str, Any]:
    """The values of `ModelFields`."""
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
