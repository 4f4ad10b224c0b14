"""The native configuration: sub-configurations of any kind, round trips, and values that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, Qwen3Config, SiglipVisionConfig

from llava.model.native import AvgLlavaConfig

TINY: dict[str, Any] = {
    "text_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64},
    "vision_config": {"image_size": 32, "patch_size": 4, "num_hidden_layers": 2},
    "image_token_id": 63,
}


def test_parts_are_configurations_of_their_own_kind() -> None:
    config = AvgLlavaConfig(**TINY)
    assert isinstance(config.text_config, LlamaConfig) and isinstance(config.vision_config, CLIPVisionConfig)
    assert config.get_text_config() is config.text_config
    other = AvgLlavaConfig(
        text_config={"model_type": "qwen3", "vocab_size": 64},
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        image_token_id=63,
        vis_token_granularity=[9, 81, 729],
        vis_token_grids=[[3, 3], [9, 9], [27, 27]],
    )
    assert isinstance(other.text_config, Qwen3Config) and isinstance(other.vision_config, SiglipVisionConfig)
    assert [level.kernel for level in other.levels] == [(9, 9), (3, 3), (1, 1)]


def test_it_is_saved_and_read_again_whole(tmp_path: Path) -> None:
    router = {"vis_token_granularity": [16, 64], "router_select": True, "router_hidden_size": 8}
    config = AvgLlavaConfig(**TINY, image_grid_pinpoints=[[32, 64]], **router)
    config.save_pretrained(tmp_path)
    again = AvgLlavaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.canvases == [(64, 32)] and again.view_side == 32 and again.patch_grid == (8, 8)
    assert again.context_length == LlamaConfig().max_position_embeddings


def test_the_head_is_tied_as_the_text_model_says() -> None:
    assert AvgLlavaConfig(**TINY).tie_word_embeddings is False
    tied = {**TINY, "text_config": {**TINY["text_config"], "tie_word_embeddings": True}}
    assert AvgLlavaConfig(**tied).tie_word_embeddings is True
    assert AvgLlavaConfig(**tied, tie_word_embeddings=False).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_token_id": 64}, "image_token_id is 64, expected 0 to 63, a token of the vocabulary"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer is -4, but the tower has 2 layers; use -3 to 2"),
        ({"image_grid_pinpoints": [[32, 40]]}, r"image_grid_pinpoints has \[32, 40\], expected multiples of 32"),
        ({"vis_token_granularity": [7]}, r"vis_token_granularity has \[7\]"),
        ({"router_select": True}, "router_select is on but vis_token_granularity is empty"),
        ({"router_hidden_size": 12}, "router_hidden_size is 12, expected a multiple of its 8 attention heads"),
        ({"unpad_rule": "guess"}, "unpad_rule is 'guess'"),
        ({"text_config": {"model_type": "no_such"}}, "text_config.model_type is 'no_such'"),
        ({"text_config": {"model_type": "gemma2", "vocab_size": 64}}, "text_config.final_logit_softcapping is 30.0, but this model's head"),
        ({"vision_config": 7}, "vision_config is 7, expected the values of a configuration"),
        ({"vision_config": {"image_size": 4, "patch_size": 8}}, "vision_config.patch_size is 8, expected at most image_size, 4"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AvgLlavaConfig(**{**TINY, **values})
