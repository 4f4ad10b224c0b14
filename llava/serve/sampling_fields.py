"""How an answer's tokens are drawn, as fields of a body: shared by every schema that asks for text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from llava.serve.body_fields import Closed
from llava.serve.errors import FieldError
from llava.serve.protocol import Limits, Sampling


class SamplingFields(Closed):
    """How the answer's tokens are drawn, and where it ends; `max_tokens` has another name in each API and is not among them."""

    min_tokens: int | None = Field(None, ge=0, description="The model's own end is not taken before so many.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0, the default, is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0 leaves the likeliest token alone.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=1024, fail_fast=True)] | None = None


def read_sampling(fields: SamplingFields, limits: Limits, max_new_tokens: int, logprobs: int | None = None) -> Sampling:
    """What is asked about the drawing of tokens, checked against the limits.

    Args:
        max_new_tokens: the longest answer, see `longest_answer`. logprobs: alternatives per token to report, `None` for no scores at all.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    if (fields.min_tokens or 0) > max_new_tokens:
        raise FieldError(f"min_tokens is {fields.min_tokens}, expected at most the longest answer, {max_new_tokens}.", "min_tokens")
    return Sampling(
        temperature=0.0 if fields.top_p == 0 else fields.temperature or 0.0,
        top_p=fields.top_p or 1.0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=fields.min_tokens or 0,
        seed=fields.seed,
        stop=read_stop(fields.stop, limits),
        logprobs=logprobs,
    )


def longest_answer(count: int | None, limits: Limits, param: str, default: int = Sampling.max_new_tokens) -> int:
    """Tokens that an answer may have at most.

    Args:
        count: as asked for. param: the field that it came in. default: where it is `None`; less on a server that writes less.

    Raises:
        FieldError: more than the server writes.
    """
    if count is None:
        return min(default, limits.max_new_tokens)
    if count > limits.max_new_tokens:
        raise FieldError(f"{param} is {count}, expected at most {limits.max_new_tokens}.", param)
    return count


def read_stop(stop: str | Sequence[str] | None, limits: Limits) -> tuple[str, ...]:
    """The texts that end an answer."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > limits.max_stop:
        raise FieldError(f"stop has {len(texts)} texts, expected at most {limits.max_stop}.", "stop")
    if any(not 0 < len(text) <= limits.max_stop_characters for text in texts):
        raise FieldError(f"A text of stop is empty or longer than {limits.max_stop_characters} characters.", "stop")
    return texts
