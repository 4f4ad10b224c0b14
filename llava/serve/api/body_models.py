"""The base classes of the schemas of all bodies: strict ones for our API, lenient ones for what LLaVA's programs send."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

SMALLEST_NUMBER = 2.0**-126
"""The smallest number above 0 that float32 holds in full, which is what probabilities and logits are computed in."""


class StrictModel(BaseModel):
    """A body with no other fields than those declared, and no conversions between types.

    In any field, a number so close to 0 that float32 would lose it is read as 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _as_float32(cls, value: Any) -> Any:
        return as_float32(value) if isinstance(value, float) else value


class LenientModel(BaseModel):
    """A body whose undeclared fields are ignored: LLaVA's workers and clients send some that mean nothing here."""

    model_config = ConfigDict(extra="ignore", strict=True, hide_input_in_errors=True)


def as_float32(number: float) -> float:
    """The number, or 0 where float32 would lose some or all of its digits."""
    return number if abs(number) >= SMALLEST_NUMBER else 0.0
