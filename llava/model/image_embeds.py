"""An image's visual tokens on their way to a vLLM: the content part `image_embeds` of a chat completion.

vLLM's own form, which it reads before any model sees it: base64 of what `torch.save` writes of one tensor (T, D). What is sent are the rows
that take the image's place in the prompt: pooled at its granularity, merged, newline vectors included.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import torch
from torch import Tensor


def check_rows(rows: Tensor, num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Refuse rows that are not the visual tokens of an image; vLLM takes any, and answers a prompt with broken ones with nothing.

    Args:
        num_tokens: T, what the image costs at its granularity. width: D, of the language model. dtype: of its weights.

    Raises:
        ValueError: another shape or dtype. FloatingPointError: numbers that are not finite.
    """
    if tuple(rows.shape) != (num_tokens, width) or rows.dtype != dtype:
        raise ValueError(
            f"The rows of an image have the shape {tuple(rows.shape)} and dtype {rows.dtype}, expected {(num_tokens, width)} and {dtype}; "
            "encode it with the model that reads them."
        )
    if not rows.isfinite().all():
        raise FloatingPointError("The rows of an image hold numbers that are not finite; check the weights of its encoder.")


def image_embeds_part(rows: Tensor) -> dict[str, Any]:
    """An image's rows (T, D) as a content part of a message."""
    buffer = BytesIO()
    torch.save(rows.detach().cpu().clone(), buffer)  # a slice would be saved with all that it was cut from
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}
