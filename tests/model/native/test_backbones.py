"""Text models and towers of transformers' Auto classes, not a line written for any: batches, granularities, routing, saving, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from tests.model.native.conftest import IMAGE, Batch, make_batch

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 1024}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
PAIRS = [
    ("mistral", "siglip_vision_model"),
    ("qwen2", "dinov2"),
    ("qwen3", "siglip_vision_model"),
    ("gemma3_text", "clip_vision_model"),
    ("phi3", "dinov2_with_registers"),
    ("smollm3", "clip_vision_model"),
]


@pytest.fixture(scope="module", params=PAIRS, ids=" and ".join)
def model(request: pytest.FixtureRequest) -> AvgLlavaForConditionalGeneration:
    text, tower = request.param
    torch.manual_seed(0)
    config = AvgLlavaConfig(
        text_config={"model_type": text, **TEXT},
        vision_config={"model_type": tower, **TOWER},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
        vis_token_granularity=[4, 16, 64],
        router_select=True,
        router_hidden_size=16,
        filtered_text_num=4,
    )
    return AvgLlavaForConditionalGeneration(config).eval()


@pytest.fixture
def batch() -> Batch:
    return make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, [])])


@pytest.mark.parametrize("granularity", [None, 4, 64])
def test_a_batch_answers_as_its_rows(model: AvgLlavaForConditionalGeneration, batch: Batch, granularity: int | None) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
    together = model.generate(**batch.kwargs(), **settings, vis_token_granularity=granularity)
    for index in range(3):
        row = batch.row(index)
        alone = model.generate(**row.kwargs(), **settings, vis_token_granularity=granularity)
        assert torch.equal(together[index, -4:], alone[0, -4:])


def test_it_is_saved_and_loaded(model: AvgLlavaForConditionalGeneration, batch: Batch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch.kwargs()).logits, model(**batch.kwargs()).logits)


def test_a_step_of_training_reaches_tower_and_text_model(model: AvgLlavaForConditionalGeneration, batch: Batch) -> None:
    model.zero_grad()
    model(**batch.kwargs(), labels=batch.input_ids.clone()).loss.backward()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters() if parameter.grad is not None) > 0
