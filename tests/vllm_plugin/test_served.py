"""A checkpoint of either layout, as the plug-in sees it: costs, views and defaults against our own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from llava.inference import Assistant
from llava.model.native import AvgLlavaConfig
from llava.vllm_plugin.served import ServedModel, complete


def test_views_are_our_own_to_the_bit(served: ServedModel, assistant: Assistant, images: list[Image.Image]) -> None:
    for image in images:
        assert torch.equal(served.views(image), assistant.image_input(image).tensor)


def test_costs_need_no_pixels(served: ServedModel, assistant: Assistant, images: list[Image.Image]) -> None:
    for image in images:
        unseen, seen = served.unseen(image.size), assistant.image_input(image)
        assert unseen.tensor.shape == seen.tensor.shape and unseen.tensor.is_meta
        layouts = served.planner.layouts(len(unseen.views), unseen.size, unseen.is_flat)
        assert layouts == assistant.model.layouts(len(seen.views), image.size, seen.is_flat)


def test_no_image_costs_more_than_the_largest(served: ServedModel) -> None:
    most = served.most_tokens(served.largest_size())
    sizes = [(width, height) for width in range(1, 400, 37) for height in range(1, 400, 29)]
    assert max(served.most_tokens(size) for size in sizes) <= most
    assert most == served.most_tokens((10 * served.largest_size()[0], 10 * served.largest_size()[1]))


def test_the_image_has_a_token_of_the_vocabulary(served: ServedModel, assistant: Assistant) -> None:
    config = served.config
    assert isinstance(config, AvgLlavaConfig)
    assert served.image_token_id == config.image_token_id < config.text.vocab_size
    assert served.image_token_id not in assistant.tokenizer("every word <unk> </s>").input_ids


def test_completing_twice_changes_nothing(served: ServedModel) -> None:
    before = served.stored.to_dict()
    complete(served.stored, served.path)
    assert served.stored.to_dict() == before


def test_a_checkpoint_of_single_views_is_laid_out_as_llava_does(folders: dict[str, str], images: list[Image.Image]) -> None:
    stored = AutoConfig.from_pretrained(folders["llava"])
    stored.image_aspect_ratio = "pad"
    complete(stored, folders["llava"])
    served = ServedModel(stored, folders["llava"], {})
    assert served.views(images[0]).shape == (3, 64, 64)
    unseen = served.unseen(images[0].size)
    assert unseen.is_flat and served.most_tokens(images[0].size) == 64


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({}, {}),
        ({"vis_token_granularity": [4, 16], "max_visual_tokens": None}, {"vis_token_granularity": [4, 16]}),
        ({"granularity_bias": -0.5, "eos_token_id": 2}, {"granularity_bias": -0.5}),
    ],
)
def test_defaults_stand_in_the_generation_config(
    served: ServedModel, tmp_path: Path, settings: dict[str, Any], defaults: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert replace(served, path=str(tmp_path)).defaults == defaults


def test_defaults_that_cannot_work_are_refused_with_their_file(served: ServedModel, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"max_visual_tokens": "many"}')
    with pytest.raises(ValueError, match=r"generation_config\.json cannot work: .*max_visual_tokens, expected a whole number"):
        _ = replace(served, path=str(tmp_path)).defaults
