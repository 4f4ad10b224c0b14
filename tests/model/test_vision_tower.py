"""Tower and projector against the recorded features, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llava.model.projector import build_projector
from llava.model.vision_tower import CLIPVisionTower

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_features_equal_the_recorded_ones(oracle, released, images, name):
    recorded = load_file(oracle / "vision_and_pooling.safetensors")
    views = images.pixels[f"anyres/{name}"]
    with torch.no_grad():
        torch.testing.assert_close(released.get_vision_tower()(views), recorded[f"tower/{name}"], atol=3e-5, rtol=0)
        torch.testing.assert_close(released.encode_images(views), recorded[f"projected/{name}"], atol=3e-5, rtol=0)


@pytest.mark.parametrize(("layer", "used"), [(-1, 3), (-2, 2), (1, 1), (-4, 0)])
def test_only_the_layers_before_the_selected_one_run(layer, used):
    tower = CLIPVisionTower(VISION, select_layer=layer)
    ran = []
    for block in tower.vision_tower.vision_model.encoder.layers:
        block.register_forward_hook(lambda *_: ran.append(1))
    hidden = tower.vision_tower.vision_model(torch.ones(1, 3, 32, 32), output_hidden_states=True).hidden_states[layer]
    ran.clear()
    torch.testing.assert_close(tower(torch.ones(1, 3, 32, 32)), hidden[:, 1:])
    assert len(ran) == used


def test_the_class_token_is_kept_on_request():
    assert CLIPVisionTower(VISION, select_feature="cls_patch")(torch.ones(1, 3, 32, 32)).shape == (1, 17, 16)


def test_refusals():
    with pytest.raises(ValueError, match="the tower has 3 layers"):
        CLIPVisionTower(VISION, select_layer=-5)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\), expected \(3, 32, 32\)"):
        CLIPVisionTower(VISION)(torch.ones(1, 3, 16, 16))


def test_projector_types():
    assert [type(layer).__name__ for layer in build_projector("mlp3x_gelu", 4, 8)] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert build_projector("linear", 4, 8).weight.shape == (8, 4)
    assert torch.equal(build_projector("identity", 4, 4)(torch.ones(2, 4)), torch.ones(2, 4))
    with pytest.raises(ValueError, match="width 4 and the language model 8"):
        build_projector("identity", 4, 8)
    with pytest.raises(ValueError, match="'mlp2x_relu', expected linear"):
        build_projector("mlp2x_relu", 4, 8)
