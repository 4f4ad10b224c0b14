"""What a prompt is once its images are encoded and have as many tokens as they take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.model.routing import RoutingReport


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """`pooler_output`: N tensors (T, D), by transformers' name for them; `routing`: N reports."""

    routing: list[RoutingReport] | None = None


@dataclass(frozen=True)
class ExpandedPrompt:
    """Prompts as LlavaNext knows them.

    input_ids, inputs_embeds: (B, L') or (B, L', D), whichever was given. attention_mask: (B, L').
    last: (B, L) where each given position went; `None` where nothing was expanded.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    image: ImageFeatures
    last: Tensor | None
