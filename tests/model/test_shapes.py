"""The shapes that a configuration declares are those of the model that is built from it, for every kind of model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llava.checkpoint_files import StoredTensor, read_headers, weight_files
from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.router import name_in_checkpoint
from llava.model.shapes import check_shapes, declared_shapes
from tests.micro import llava_micro_folder

LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
}  # fmt: skip
MULTIMODAL = {**LANGUAGE, "vision_config": VISION, "image_grid_pinpoints": [[64, 32]], "vis_token_granularity": [16, 64]}
UNPROJECTED = {"mm_projector_type": "identity", "mm_patch_merge_type": "flat"}


def built(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name_in_checkpoint(name): tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**LANGUAGE, attention_bias=True, mlp_bias=True)),
        (LlamaForCausalLM, LlamaConfig(**LANGUAGE, num_key_value_heads=2, tie_word_embeddings=True)),
        (MistralForCausalLM, MistralConfig(**LANGUAGE, num_key_value_heads=2, head_dim=6)),
        (LlavaLlamaForCausalLM, LlavaConfig(**MULTIMODAL)),
        (LlavaLlamaForCausalLM, LlavaConfig(**LANGUAGE)),
        (LlavaLlamaForCausalLM, LlavaConfig(**MULTIMODAL, router_select=True, filtered_text_num=5)),
        (LlavaLlamaForCausalLM, LlavaConfig(**MULTIMODAL, router_select=True, router_hidden_size=16, mm_projector_type="mlp3x_gelu")),
        (LlavaMistralForCausalLM, LlavaMistralConfig(**MULTIMODAL, num_key_value_heads=2, mm_projector_type="linear")),
        (LlavaLlamaForCausalLM, LlavaConfig(**{**MULTIMODAL, "vision_config": {**VISION, "hidden_size": 32}}, **UNPROJECTED)),
    ],
)
def test_declared_shapes_are_those_of_the_built_model(model_class: Any, config: Any) -> None:
    assert declared_shapes(config) == built(model_class, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but the weights of here hold 4 layers"),
        ({"vision_config": {"num_hidden_layers": 4}}, "vision_config.num_hidden_layers is 4, but the weights of here hold 5 layers"),
        ({"hidden_size": 180}, r"lm_head.weight has shape \[640, 192\], but the configuration makes it \[640, 180\], and \d+ more differ"),
        ({"vocab_size": 641}, r"lm_head.weight has shape \[640, 192\], but the configuration makes it \[641, 192\], and 1 more"),
        ({"filtered_text_num": 31}, r"model.router.voter has shape \[156, 1\], but the configuration makes it \[155, 1\];"),
        ({"mm_projector_type": "linear"}, None),  # other names: found as missing and unexpected
    ],
)
def test_every_size_is_held_against_the_headers(changes: dict[str, Any], message: str | None) -> None:
    stored = json.loads((llava_micro_folder() / "config.json").read_text())
    changed = {name: {**stored[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}
    config, headers = LlavaConfig.from_dict({**stored, **changed}), read_headers(weight_files(llava_micro_folder()))
    if message is None:
        check_shapes(config, headers, "here")
        return
    with pytest.raises(ValueError, match=message):
        check_shapes(config, headers, "here")


def test_packed_weights_have_shapes_of_their_own() -> None:
    config = LlamaConfig(**LANGUAGE)
    name = "model.layers.1.mlp.up_proj.weight"
    check_shapes(config, {name: StoredTensor((768, 1), "U8")}, "here")
    check_shapes(config, {name: StoredTensor((384, 1), "BF16"), f"{name}.absmax": StoredTensor((24,), "F32")}, "here")
    with pytest.raises(ValueError, match="has shape"):
        check_shapes(config, {name: StoredTensor((768, 1), "F16")}, "here")
