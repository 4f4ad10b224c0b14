"""What every API's answers hold beside their text: errors, usage, the report on images, log probabilities. Schemas and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from llava.serve.protocol import Finished, ImageReport, Started, TokenScore, token_bytes

LOWEST_LOG_PROBABILITY = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same."""


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
    """What one image costs, and why; see `llava.serve.protocol.ImageReport`."""

    granularity: int
    visual_tokens: int
    full_visual_tokens: int
    tokens_per_level: dict[str, int]
    logits: list[float]
    probabilities: list[float]
    cached: bool | None
    grid: dict[str, Any] | None


class ReportFields(BaseModel):
    """What the answer cost."""

    images: list[ImageFields]
    milliseconds: dict[str, float]


class UsageFields(BaseModel):
    """Token counts; the prompt's include the visual ones."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens: int
    full_visual_tokens: int
    granularities: list[int]


def image_fields(report: ImageReport) -> dict[str, Any]:
    """The values of `ImageFields`."""
    return {**vars(report), "tokens_per_level": {str(level): tokens for level, tokens in report.tokens_per_level.items()}}


def report_fields(event: Started | Finished) -> dict[str, Any]:
    """The value of `avg_llava`: images and milliseconds."""
    return {
        "images": [image_fields(report) for report in event.images],
        "milliseconds": {part: round(value, 3) for part, value in event.milliseconds.items()},
    }


def usage_fields(endings: Sequence[Finished], n: int = 0) -> dict[str, Any]:
    """The value of `usage`: each prompt counts once, answers are summed.

    Args:
        n: consecutive answers to each prompt; 0 where all of them answer one.
    """
    prompts = endings[:: n or len(endings)]
    images = [image for ending in prompts for image in ending.images]
    read, written = sum(ending.prompt_tokens for ending in prompts), sum(ending.completion_tokens for ending in endings)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "visual_tokens": sum(image.visual_tokens for image in images) + sum(ending.visual_tokens for ending in prompts),
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
