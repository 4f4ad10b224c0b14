"""A checkpoint whose language layers hold 8-bit integers, as the compressed-tensors library stores them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = re.compile(r"^model\.(language_model\.)?layers\..*_proj\.weight$")
_EIGHT_BITS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": [r"re:.*layers\.\d+\.(self_attn|mlp)\..*_proj"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", "re:.*vision_tower.*"],
}
"""W8A8: a scale for each row of a weight, and for each token of what it is multiplied with."""


def quantise(source: Path, output: Path) -> Path:
    """Write a checkpoint's folder with quantised language layers."""
    shutil.copytree(source, output)
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if LAYER.match(name):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            weights[name] = (weight.float() / scale).round().clamp(-128, 127).to(torch.int8)
            weights[f"{name}_scale"] = scale
        else:
            weights[name] = weight
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    file = output / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": SETTINGS}))
    return output
