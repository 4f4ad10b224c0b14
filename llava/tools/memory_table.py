"""Memory of weights and KV cache at every granularity, from a configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.model.loading import read_stored_config
from llava.model.memory import has_known_cache, kv_cache_bytes, weight_bytes
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.model.native.llava_layout import native_config
from llava.model.native.model_card import largest_image, level_costs, markdown_table
from llava.train.build import read_model_config
from llava.train.estimation import preset_config
from llava.train.presets import PRESETS

UNITS = {"GiB": 2**30, "MiB": 2**20}
BITS = {"bf16": 16, "8 bits": 8, "4 bits": 4}
"""Column -> bits of the text layers' matrices; all else stays in bf16, as `--load-8bit` and `--load-4bit` leave it."""


def table(config: AvgLlavaConfig, size: tuple[int, int] | None = None) -> str:
    """The table in Markdown, and a line above it.

    Args:
        size: (width, height) of the image in pixels, by default the largest canvas.

    Raises:
        ValueError: the text model keeps something else than keys and values.
    """
    if not has_known_cache(config.text):
        raise ValueError(f"The text model is {config.text.model_type!r}, not all of whose layers keep keys and values.")
    with torch.device("meta"):
        model = AvgLlavaForConditionalGeneration(config)
    width, height = size or largest_image(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = [parameter for name, parameter in model.model.language_model.named_parameters() if name.startswith("layers.")]
    matrices = sum(parameter.numel() for parameter in layers if parameter.ndim == 2)
    weights = [weight_bytes(parameters, matrices, bits) for bits in BITS.values()]
    name, unit = next((each for each in UNITS.items() if weights[0] > each[1]), ("MiB", 2**20))
    rows = [["", "visual tokens", "KV cache", *BITS], ["weights alone", "", "", *(f"{held / unit:.2f}" for held in weights)]]
    for level, tokens in level_costs(model, (width, height)):
        cache = kv_cache_bytes(config.text, tokens)
        totals = [f"{(held + cache) / unit:.2f}" for held in weights]
        rows.append([f"{level.tokens} tokens per view", f"{tokens:,}", f"{cache / unit:.2f}", *totals])
    title = f"{name} for {parameters / 1e6:,.1f} million parameters and an image of {width} x {height} pixels:"
    return f"{title}\n\n{markdown_table(rows)}"


def read_config(name: str) -> AvgLlavaConfig:
    """The native configuration of a published shape, or of a checkpoint folder in the native layout or LLaVA's.

    Raises:
        ValueError: neither.
    """
    if name not in PRESETS and not Path(name).is_dir():
        raise ValueError(
            f"{name} is neither a checkpoint folder nor a published shape; the shapes are {', '.join(PRESETS)}, "
            "and a checkpoint of the hub is downloaded first (hf download NAME --local-dir FOLDER)."
        )
    if name not in PRESETS and read_stored_config(name).get("model_type") == AvgLlavaConfig.model_type:
        return AvgLlavaConfig.from_pretrained(name)
    config = preset_config(name) if name in PRESETS else read_model_config(name)
    return native_config(config, 0, config.vocab_size)
