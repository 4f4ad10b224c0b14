"""What weights and a cache take of memory, from a configuration alone."""

from __future__ import annotations

from typing import Any

NF4_BITS = 4.127
"""Of a weight in nf4 with double quantisation, its scales included (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""


def has_known_cache(config: Any) -> bool:
    """Whether every layer of a text model keeps keys and values, of all positions or of a window."""
    return hasattr(config, "num_attention_heads") and set(_layer_kinds(config)) <= {"full_attention", "sliding_attention"}


def head_width(config: Any) -> int:
    """Numbers in a key of one attention head of a text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(config: Any, positions: int, bytes_each: int = 2) -> int:
    """Keys and values of some positions in all layers of a text model; Vicuna-7B: 0.5 MiB per position in bf16.

    Args:
        config: of a text model of which `has_known_cache` is true.
    """
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = head_width(config)
    window = min(positions, getattr(config, "sliding_window", None) or positions)
    kept = sum(positions if kind == "full_attention" else window for kind in _layer_kinds(config))
    return 2 * groups * width * kept * bytes_each


def _layer_kinds(config: Any) -> list[str]:
    uniform = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return getattr(config, "layer_types", None) or [uniform] * config.num_hidden_layers


def weight_bytes(parameters: int, matrices: int, bits: int, bytes_each: int = 2) -> float:
    """Weights of a model whose text layers are quantised with bitsandbytes.

    Args:
        parameters: of the whole model. matrices: those among them that are quantised.
        bits: 4 (nf4 with double quantisation), 8 (one byte; its scale per output row is left out), or 16: nothing is quantised.
        bytes_each: of a weight that is not.
    """
    quantised = {4: NF4_BITS / 8, 8: 1.0, 16: float(bytes_each)}[bits]
    return matrices * quantised + (parameters - matrices) * bytes_each
