"""How an answer's tokens are sampled, as fields of a body: shared by every API that generates but LLaVA's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from llava.serve.api.body_models import as_float32
from llava.serve.api.guide_fields import GuideFields, read_guide
from llava.serve.http.errors import FieldError
from llava.serve.protocol import Guide, Limits, Sampling
from llava.serve.protocol.error_templates import AT_MOST

TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class SamplingFields(GuideFields):
    """How tokens are sampled, what constrains them and where the answer ends; except `max_tokens`, which each API names differently."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0, the default, is greedy.")
    top_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Probability mass to sample from; 0 keeps only the likeliest token."
    )
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="Sample from this many of the likeliest tokens; 0 and -1 mean all.")
    min_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Sample from tokens at least this fraction as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="Above 1 penalises tokens of the prompt's text and of the answer."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, allow_inf_nan=False, description="Subtracted from the logits of tokens that the answer already has."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, allow_inf_nan=False, description="Subtracted from the logits of tokens, once per occurrence in the answer."
    )
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = Field(
        None, description="Token id to a number from -100 to 100, which is added to its logit."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=1024, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=1024)] | None = Field(
        None, description="Token ids that end the answer and are part of it."
    )
    ignore_eos: bool | None = Field(None, description="Do not end the answer at the model's end token.")
    min_tokens: int | None = Field(None, ge=0, description="No end token and none of `stop_token_ids` before this many tokens.")


def read_sampling(
    fields: SamplingFields, limits: Limits, max_new_tokens: int, logprobs: int | None = None, guide: Guide | None = None
) -> Sampling:
    """The sampling options of a request, checked against the limits; the engine checks that ids are in the vocabulary.

    Args:
        max_new_tokens: the longest answer, see `longest_answer`. logprobs: alternatives per token to report, `None` for no scores at all.
        guide: a constraint from a field of the API's own.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    if (fields.min_tokens or 0) > max_new_tokens:
        raise FieldError(f"min_tokens is {fields.min_tokens}, expected at most the longest answer, {max_new_tokens}.", "min_tokens")
    biases = {int(token): as_float32(bias) for token, bias in (fields.logit_bias or {}).items()}
    return Sampling(
        temperature=0.0 if fields.top_p == 0 else fields.temperature or 0.0,
        top_p=fields.top_p or 1.0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=fields.min_tokens or 0,
        seed=fields.seed,
        stop=read_stop(fields.stop, limits),
        logprobs=logprobs,
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((token, bias) for token, bias in biases.items() if bias)),
        stop_token_ids=tuple(dict.fromkeys(fields.stop_token_ids or ())),
        ignore_eos=bool(fields.ignore_eos),
        guide=read_guide(fields, limits, guide),
    )


def longest_answer(count: int | None, limits: Limits, param: str, default: int = Sampling.max_new_tokens) -> int:
    """The maximum number of tokens of an answer.

    Args:
        count: as requested. param: its field. default: where it is `None`; capped by the server's limit.

    Raises:
        FieldError: more than the server's limit.
    """
    if count is None:
        return min(default, limits.max_new_tokens)
    check_at_most(count, limits.max_new_tokens, param)
    return count


def check_at_most(count: int | None, most: int, param: str) -> None:
    """Refuse a number above the server's limit."""
    if count is not None and count > most:
        raise FieldError(AT_MOST.format(param=param, number=count, most=most), param)


def read_stop(stop: str | Sequence[str] | None, limits: Limits) -> tuple[str, ...]:
    """The texts that end an answer."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > limits.max_stop:
        raise FieldError(f"stop has {len(texts)} texts, expected at most {limits.max_stop}.", "stop")
    if any(not 0 < len(text) <= limits.max_stop_characters for text in texts):
        raise FieldError(f"A text of stop is empty or longer than {limits.max_stop_characters} characters.", "stop")
    return texts
