"""Checkpoint folders that other people's code wrote: a small random `LlavaNextForConditionalGeneration`, and LLaVA's without a router."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from llava.model.builder import load_pretrained_model
from llava.tokenizer import load_tokenizer

PINPOINTS = [[48, 96], [96, 96], [144, 48]]
"""(height, width). None but the square has its mirror image here, so a forgotten swap chooses other canvases."""


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokenizer_of_hub(oracle: Path) -> Any:
    """As on the hub: the language model's tokens, then `<image>` and `<pad>`."""
    tokenizer = load_tokenizer(oracle / "checkpoint")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True, normalized=False)])
    tokenizer.pad_token = "<pad>"
    return tokenizer


def save_llava_next(folder: Path, oracle: Path, text_class: Any = LlamaConfig, **changes: Any) -> Any:
    """A random transformers model with weights wide enough that logits differ by much more than the tolerance."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=4, projection_dim=16
    )
    text = text_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=430,
        max_position_embeddings=2048,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
    )
    fields = {"vision_config": vision, "text_config": text, "image_token_index": 420, "image_grid_pinpoints": PINPOINTS, **changes}
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(image_processor, tokenizer_of_hub(oracle), 4, "default", num_additional_image_tokens=1).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return model


def save_without_router(oracle: Path, folder: Path) -> Path:
    """The recorded checkpoint as a plain LLaVA-NeXT one, saved by ourselves; a tower in the folder beside is not needed any more."""
    _, model, _, _ = load_pretrained_model(str(oracle / "checkpoint"), device="cpu")
    model.model.router = None
    model.config.router_select, model.config.vis_token_granularity = False, None
    model.save_pretrained(folder)
    load_tokenizer(oracle / "checkpoint").save_pretrained(folder)
    return folder


def save_open_llava_next(oracle: Path, folder: Path) -> Path:
    """As LLaVA-NeXT and Open-LLaVA-NeXT are published: a config.json of the old code, the tower named by its hub id or path alone."""
    folder.mkdir()
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(oracle / "checkpoint" / name, folder / name)
    config = json.loads((oracle / "checkpoint" / "config.json").read_text())
    of_ours = ("router_select", "vis_token_granularity", "filtered_text_num")
    published = {name: value for name, value in config.items() if name not in of_ours}
    (folder / "config.json").write_text(json.dumps({**published, "mm_vision_tower": str(oracle / "tiny-clip")}))
    shards = [load_file(file) for file in sorted((oracle / "checkpoint").glob("*.safetensors"))]
    weights = {name: tensor for shard in shards for name, tensor in shard.items() if not name.startswith("model.router.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
