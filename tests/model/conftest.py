"""The recorded reference model and its inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.model import LlavaConfig, LlavaLlamaForCausalLM

STAND_IN = "zeros"
"""The reference's image for a text-only row; ours needs none."""


@dataclass
class RecordedImages:
    """The oracle's preprocessed pictures, in the containers that its cases name."""

    pixels: dict[str, Tensor]
    sizes: dict[str, list[int]]

    def views(self, names: Sequence[str], container: str = "list") -> list[Tensor] | Tensor:
        real = [name for name in names if name != STAND_IN]
        if container in ("list3d", "stack4d"):
            singles = [self.pixels[f"none/{name}"] for name in real]
            return torch.stack(singles) if container == "stack4d" else singles
        tiled = [self.pixels[f"anyres/{name}"] for name in real]
        return torch.stack(tiled) if container == "stack5d" else tiled

    def sizes_of(self, names: Sequence[str]) -> list[list[int]]:
        return [self.sizes[name] for name in names if name != STAND_IN]


@pytest.fixture(scope="session")
def images(oracle: Path) -> RecordedImages:
    recorded = json.loads((oracle / "preprocess.json").read_text())["images"]
    return RecordedImages(load_file(oracle / "preprocess.safetensors"), {name: entry["size_wh"] for name, entry in recorded.items()})


@pytest.fixture(scope="session")
def released(oracle: Path) -> LlavaLlamaForCausalLM:
    """The tiny model in the released layout. Shared: a test that changes it changes it back."""
    return LlavaLlamaForCausalLM.from_pretrained(oracle / "checkpoint", attn_implementation="eager").eval()


def tiny_config() -> LlavaConfig:
    """A new model that fits in a few hundred kilobytes: 8 x 8 patches, five levels, a narrow router."""
    return LlavaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=1024,
        pad_token_id=0,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
        vis_token_granularity=[4, 8, 16, 32, 64],
        router_select=True,
        router_hidden_size=16,
        filtered_text_num=4,
    )


@pytest.fixture
def new_config() -> LlavaConfig:
    """See `tiny_config`."""
    return tiny_config()


@pytest.fixture
def new_model(new_config: LlavaConfig) -> LlavaLlamaForCausalLM:
    torch.manual_seed(0)
    return LlavaLlamaForCausalLM(new_config).eval()
