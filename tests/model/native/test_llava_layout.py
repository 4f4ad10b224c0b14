"""LLaVA's layout and the native one: every name and every field goes over and comes back."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.config import GranularityFields
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.model.native.llava_layout import TO_LLAVA, TO_NATIVE, llava_config, native_config, rename

Pair = tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration]


def test_every_name_has_its_counterpart(pair: Pair) -> None:
    llava, native = pair
    assert {rename(name, TO_NATIVE) for name in llava.state_dict()} == set(native.state_dict())
    assert {rename(name, TO_LLAVA) for name in native.state_dict()} == set(llava.state_dict())


def test_a_configuration_comes_back_as_it_went(pair: Pair) -> None:
    before: LlavaConfig = pair[0].config
    native = native_config(before, 60, before.vocab_size)
    after = llava_config(native, {"crop_size": 32})
    for name in [each.name for each in fields(GranularityFields)] + ["hidden_size", "rope_parameters", "pad_token_id", "vocab_size"]:
        assert getattr(after, name) == getattr(before, name), name
    assert after.image_grid_pinpoints == before.image_grid_pinpoints
    assert after.patch_grid == before.patch_grid and after.image_aspect_ratio == "anyres"
    assert native.text_config.max_position_embeddings == native.context_length == 1024  # type: ignore[union-attr]


def test_a_released_checkpoint_keeps_its_rules(released: LlavaLlamaForCausalLM) -> None:
    native = native_config(released.config, released.config.vocab_size, released.config.vocab_size + 1)
    assert (native.unpad_rule, native.router_attention_axis, native.router_text_fill) == ("pooled_grid", "views", "answer")
    assert native.text_config.vocab_size == released.config.vocab_size + 1  # type: ignore[union-attr]


def test_what_the_other_layout_cannot_hold_is_refused(new_config: LlavaConfig) -> None:
    new_config.mm_vision_select_feature = "cls_patch"
    with pytest.raises(ValueError, match="mm_vision_select_feature is 'cls_patch', expected 'patch'"):
        native_config(new_config, 60, 64)
    foreign = AvgLlavaConfig(text_config={"model_type": "qwen3", "vocab_size": 64}, image_token_id=63)
    with pytest.raises(ValueError, match="The text model is 'qwen3' and the tower 'clip_vision_model', expected llama or mistral"):
        llava_config(foreign, {})


def test_the_dtype_goes_along(new_config: LlavaConfig) -> None:
    new_config.dtype = torch.bfloat16
    assert llava_config(native_config(new_config, 60, 64), {"crop_size": 32}).dtype == torch.bfloat16
