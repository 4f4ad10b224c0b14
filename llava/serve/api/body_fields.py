"""What the schemas of all bodies share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

SMALLEST_NUMBER = 2.0**-126
"""The smallest number above 0 that float32 holds in full, which is what probabilities and logits are computed in."""


class StrictModel(BaseModel):
    """A body without other fields than those declared, and without conversions between types.

    A number so close to 0 that float32 would lose it is read as 0, whichever field it stands in.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _as_float32(cls, value: Any) -> Any:
        return as_float32(value) if isinstance(value, float) else value


def as_float32(number: float) -> float:
    """The number, or 0 where float32 would hold less than all its digits, or nothing, of it."""
    return number if abs(number) >= SMALLEST_NUMBER else 0.0
