"""Checkpoints of other projects in the native layout: weights to the bit and the same logits, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
)

from llava.checkpoint_files import weight_files
from llava.convert import main
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.llava_next_folders import noise_image, save_llava_next, save_open_llava_next

SIZES = [(40, 90), (130, 41), (70, 70)]
"""(width, height). Of these, transformers keeps the same cells as LLaVA; see the test of rounding beside the converter's."""
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("text_class", [LlamaConfig, MistralConfig])
def test_llava_next_of_transformers(text_class: Any, oracle: Path, tmp_path: Path) -> None:
    """The native model takes what transformers' processor makes of image and prompt, and gives its logits; its own has LLaVA's ids."""
    theirs = save_llava_next(tmp_path / "next", oracle, text_class)
    assert main([str(tmp_path / "next"), str(tmp_path / "native"), "--to", "native", "--conv-version", "v1"]) == 0
    model, processor = load(tmp_path / "native")
    their_processor = LlavaNextProcessor.from_pretrained(tmp_path / "next", use_fast=False)
    for size in SIZES:
        image = noise_image(size)
        expected = their_processor(images=image, text=PROMPT, return_tensors="pt")
        found = processor(images=image, text=PROMPT, return_tensors="pt", vis_token_granularity=144)
        assert (found["input_ids"] == 420).sum() == (expected["input_ids"] == 420).sum()
        assert found["image_sizes"].tolist() == expected["image_sizes"].tolist()
        with torch.no_grad():
            torch.testing.assert_close(model(**expected).logits, theirs(**expected).logits, atol=1e-4, rtol=0)
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    again, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    held = again.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in theirs.state_dict().items())


def test_llava_next_of_llava(oracle: Path, tmp_path: Path) -> None:
    """Without a router and with the tower elsewhere; the logits are those of LLaVA's face, and any level can be asked for."""
    source = save_open_llava_next(oracle, tmp_path / "open")
    assert main([str(source), str(tmp_path / "native"), "--to", "native"]) == 0
    tokenizer, face, image_processor, _ = load_pretrained_model(str(source), None, "llava", device="cpu")
    levels = [36, 144]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", vis_token_granularity=levels).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "native", granularity_tokens=levels)
    assert not model.config.router_select
    for size in SIZES:
        image = noise_image(size)
        views = process_images([image], image_processor, face.config)
        ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
        inputs = processor(images=image, text=PROMPT, return_tensors="pt")
        with torch.no_grad():
            expected = face(ids, images=views, image_sizes=[size]).logits[0, -1]
            assert torch.equal(model(**inputs).logits[0, -1, :420], expected)
            assert not torch.equal(model(**inputs, vis_token_granularity=36).logits[0, -1, :420], expected)
        coarse, fine = (processor(images=image, text=PROMPT, vis_token_granularity=level)["input_ids"][0] for level in levels)
        assert len(coarse) < len(fine)
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "llava"]) == 0
    back, tower = weights(tmp_path / "back"), "model.vision_tower.vision_tower.vision_model."
    assert all(torch.equal(back[name], tensor) for name, tensor in weights(source).items())
    assert all(name.startswith(tower) for name in set(back) - set(weights(source)))


def test_the_released_layout(oracle: Path, tmp_path: Path) -> None:
    """The published router and its rules: the same choice and logits under both faces, and every weight comes back."""
    assert main([str(oracle / "checkpoint"), str(tmp_path / "native"), "--to", "native"]) == 0
    tokenizer, face, image_processor, _ = load_pretrained_model(str(oracle / "checkpoint"), None, "llava", device="cpu")
    model, processor = load(tmp_path / "native")
    for size in SIZES:
        image = noise_image(size)
        ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
        inputs = processor(images=image, text=PROMPT, return_tensors="pt")
        with torch.no_grad():
            encoded = face.encode_prompt(ids, process_images([image], image_processor, face.config), [size])
            found = model(**inputs)
            expected = face(inputs_embeds=encoded.inputs.inputs_embeds, attention_mask=encoded.inputs.attention_mask).logits[0, -1]
        assert [report.granularity for report in found.routing] == [report.granularity for report in encoded.reports]
        assert torch.equal(found.logits[0, -1, :420], expected)
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "llava"]) == 0
    assert same_weights(tmp_path / "back", oracle / "checkpoint")
