"""Bytes of caches and weights against what PyTorch holds, and published figures."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from llava.model.memory import has_known_cache, kv_cache_bytes, weight_bytes


def test_vicuna_keeps_half_a_mebibyte_per_position() -> None:
    assert kv_cache_bytes(LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32), 1) == 2**19


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
        Qwen2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=4),
        MistralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=None),
        Gemma3TextConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=8, sliding_window=16),
    ],
)
def test_a_cache_holds_what_is_computed(config: object) -> None:
    positions = 12
    cache = DynamicCache(config=config)  # type: ignore[arg-type]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
    keys = torch.zeros(1, config.num_key_value_heads, positions, width, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    for layer in range(config.num_hidden_layers):  # type: ignore[attr-defined]
        cache.update(keys, keys, layer)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert has_known_cache(config) and kv_cache_bytes(config, positions) == held


def test_layers_of_other_kinds_are_not_known() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    assert not has_known_cache(config)


def test_quantised_matrices_shrink_alone() -> None:
    assert weight_bytes(100, 60, 16) == 200
    assert weight_bytes(100, 60, 8) == 60 + 80
    assert weight_bytes(100, 60, 4) == pytest.approx(60 * 4.127 / 8 + 80)
