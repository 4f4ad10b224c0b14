"""Every field once; what an old checkpoint lacks is filled in on reading; what cannot work is refused whole."""

from __future__ import annotations

import pytest

from llava.model import LlavaConfig, LlavaMistralConfig
from llava.model.config import RELEASED_VALUES

VISION = {"image_size": 336, "patch_size": 14}


@pytest.mark.parametrize("config_class", [LlavaConfig, LlavaMistralConfig])
def test_an_old_checkpoint_gets_the_published_behaviour_and_a_new_model_the_right_one(config_class):
    old = config_class.from_dict({"model_type": config_class.model_type})
    assert {name: getattr(old, name) for name in RELEASED_VALUES} == RELEASED_VALUES
    assert config_class().unpad_rule == "picture" and config_class().mm_patch_merge_type == "spatial_unpad"


def test_a_plain_language_model_is_not_an_old_llava_checkpoint():
    assert LlavaConfig.from_dict({"model_type": "llama"}).unpad_rule == "picture"


def test_what_was_stored_survives_reading(tmp_path):
    stored = LlavaConfig(
        unpad_rule="pooled_grid", router_hidden_size=16, filtered_text_num=5, vision_config=VISION, image_grid_pinpoints="[(336, 672)]"
    )
    stored.save_pretrained(tmp_path)
    config = LlavaConfig.from_pretrained(tmp_path)
    assert (config.unpad_rule, config.router_hidden_size, config.filtered_text_num) == ("pooled_grid", 16, 5)
    assert config.image_grid_pinpoints == [[336, 672]] and config.vision_config == VISION


def test_levels_and_context_are_derived():
    levels = [36, 72, 144, 288, 576]
    config = LlavaConfig(
        vision_config=VISION, image_grid_pinpoints=[[336, 672]], vis_token_granularity=levels, max_position_embeddings=4096
    )
    assert [level.grid for level in config.levels] == [(6, 6), (12, 6), (12, 12), (24, 12), (24, 24)]
    assert config.context_length == 4096


def test_all_wrong_fields_are_named_in_one_error():
    with pytest.raises(ValueError, match="(?s)unpad_rule is 'maybe'.*router_attention_axis is 'rows'.*vis_token_granularity is empty"):
        LlavaConfig(unpad_rule="maybe", router_attention_axis="rows", router_select=True)
    with pytest.raises(ValueError, match="image_grid_pinpoints is empty"):
        LlavaConfig(vision_config=VISION)
    with pytest.raises(ValueError, match="router_hidden_size is 20, expected a multiple of its 8"):
        LlavaConfig(router_hidden_size=20)
    with pytest.raises(ValueError, match="no patch grid"):
        _ = LlavaConfig().patch_grid
