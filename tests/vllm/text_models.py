"""The shipped model with other language layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration


def with_text_model(native: Path, text_model: str, output: Path) -> None:
    """Write a native checkpoint with the parts of another in front of random layers of a text model.

    Args:
        native: the other checkpoint's folder. text_model: a model type.
    """
    whole: Any = AvgLlavaForConditionalGeneration.from_pretrained(native)
    text = whole.config.text
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    taken = {name: getattr(text, name) for name in (*sizes, *tokens)}
    other = CONFIG_MAPPING[text_model](**taken, num_hidden_layers=2, head_dim=32, initializer_range=0.2, tie_word_embeddings=False)
    config = AvgLlavaConfig(**{**whole.config.to_dict(), "text_config": other, "tie_word_embeddings": False})
    config.architectures = [AvgLlavaForConditionalGeneration.__name__]
    torch.manual_seed(0)
    made: Any = AvgLlavaForConditionalGeneration(config).eval()
    missing, _ = made.load_state_dict(
        {name: tensor for name, tensor in whole.state_dict().items() if ".language_model.layers." not in name and "lm_head" not in name},
        strict=False,
    )
    assert all(".language_model.layers." in name or "lm_head" in name for name in missing), missing
    shutil.copytree(native, output)
    made.save_pretrained(output)
