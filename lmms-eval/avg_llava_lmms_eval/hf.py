"""The harness's own `llava_hf`, for a native folder: its class unchanged, its table of transformers' models with one more.

`llava_hf` looks the model's class up by the type in the folder's config.json, in a table that ends at transformers' own LLaVAs.
"""

from __future__ import annotations

from lmms_eval.models.chat.llava_hf import LlavaHf as LlavaHfChat
from lmms_eval.models.simple.llava_hf import LlavaHf, model_map

from llava.model import AvgLlavaConfig, AvgLlavaForConditionalGeneration

__all__ = ["LlavaHf", "LlavaHfChat"]

model_map[AvgLlavaConfig.model_type] = AvgLlavaForConditionalGeneration
