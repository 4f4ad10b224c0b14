"""LLaVA's names for tower, projector and the steps that make a language model multimodal mean what they mean there."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import unpad_image
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.tokenizer import load_tokenizer
from tests.hub_cache import put_into_cache
from tests.stage_runs import make_language_model


def tower_arguments(oracle: Path, **changes: Any) -> SimpleNamespace:
    given = {"vision_tower": str(oracle / "tiny-clip"), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    return SimpleNamespace(**{**given, **changes})


@pytest.fixture
def plain(tmp_path: Path) -> LlavaLlamaForCausalLM:
    """A language model without multimodal parts, read as ours."""
    return LlavaLlamaForCausalLM.from_pretrained(make_language_model(tmp_path / "llama"))


@pytest.mark.parametrize(
    ("grid", "size", "kept"),
    [
        ((4, 8), (100, 100), (slice(None), slice(2, 6))),  # a square image in a wide canvas
        ((8, 4), (100, 100), (slice(2, 6), slice(None))),
        ((24, 24), (640, 480), (slice(3, 21), slice(None))),
        ((24, 24), (333, 500), (slice(None), slice(4, 20))),  # 15.98 columns are covered; (24 - 15) // 2 go on each side
        ((5, 5), (50, 50), (slice(None), slice(None))),
    ],
)
def test_unpad_image_keeps_what_the_image_covers(grid: tuple[int, int], size: tuple[int, int], kept: tuple[slice, slice]) -> None:
    tensor = torch.arange(2 * grid[0] * grid[1]).reshape(2, *grid)
    assert torch.equal(unpad_image(tensor, size), tensor[:, kept[0], kept[1]])


def test_the_towers_attributes(released: LlavaLlamaForCausalLM) -> None:
    tower = released.get_model().get_vision_tower()
    assert tower is released.get_vision_tower() and isinstance(tower, CLIPVisionTower)
    assert (tower.num_patches_per_side, tower.num_patches, tower.hidden_size, tower.image_size) == (12, 144, 24, 48)
    assert tower.select_layer == -2 and tower.select_feature == "patch" and tower.vision_tower_name == "tiny-clip"
    assert tower.dummy_feature.shape == (1, 24) and not tower.dummy_feature.any()
    before = tower.state_dict()
    tower.load_model()
    assert tower.is_loaded and all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_the_builders_tower_gives_the_features_of_transformers_own(oracle: Path, feature: str, layer: int) -> None:
    arguments = tower_arguments(oracle, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    tower = build_vision_tower(arguments, delay_load=True)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    views = torch.randn(2, 3, 48, 48)
    outputs = CLIPVisionModel.from_pretrained(oracle / "tiny-clip")(views, output_hidden_states=True)
    wanted = outputs.hidden_states[layer][:, 1 if feature == "patch" else 0 :]
    assert torch.equal(tower.feature_select(outputs), wanted)
    torch.testing.assert_close(tower(views), wanted)
    single = tower(list(views))
    assert [part.shape for part in single] == [(1, *wanted.shape[1:])] * 2
    torch.testing.assert_close(torch.cat(single), wanted)


def test_a_builder_takes_a_models_configuration_and_refuses_what_it_cannot_make(oracle: Path) -> None:
    config = SimpleNamespace(mm_vision_tower=str(oracle / "tiny-clip"), mm_vision_select_layer=-2)
    assert build_vision_tower(config).select_feature == "patch"
    with pytest.raises(ValueError, match="names a tower"):
        build_vision_tower(SimpleNamespace(mm_vision_select_layer=-2))
    with pytest.raises(ValueError, match="s2 asks for features at several scales"):
        build_vision_tower(tower_arguments(oracle, s2=True))


def test_the_builders_projectors() -> None:
    widths = {"mm_hidden_size": 6, "hidden_size": 8}
    assert build_vision_projector(SimpleNamespace(**widths)).weight.shape == (8, 6)
    deep = build_vision_projector(SimpleNamespace(mm_projector_type="mlp2x_gelu", **widths), delay_load=True)
    assert [name for name, _ in deep.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_language_model_becomes_multimodal_as_in_llavas_train(plain: LlavaLlamaForCausalLM, oracle: Path, tmp_path: Path) -> None:
    assert plain.get_model().get_vision_tower() is None
    arguments = tower_arguments(
        oracle, mm_projector_type="mlp2x_gelu", mm_patch_merge_type="flat", pretrain_mm_mlp_adapter=None, mm_use_im_patch_token=False,
        mm_use_im_start_end=True,
    )  # fmt: skip
    tokenizer = load_tokenizer(oracle / "checkpoint")
    plain.get_model().initialize_vision_modules(model_args=arguments, fsdp=[])
    tower = plain.get_vision_tower()
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(parameter.requires_grad for parameter in plain.get_model().mm_projector.parameters())
    assert plain.config.mm_hidden_size == tower.hidden_size == 24 and plain.config.image_aspect_ratio == "square"
    want = build_vision_tower(arguments).state_dict()
    assert all(torch.equal(want[name], value) for name, value in tower.state_dict().items())

    old = plain.get_input_embeddings().weight.detach().clone()
    plain.initialize_vision_tokenizer(arguments, tokenizer=tokenizer)
    new = plain.get_input_embeddings().weight
    assert len(tokenizer) == 422 == len(new) and torch.equal(new[:420], old)
    torch.testing.assert_close(new[420:], old.mean(dim=0).expand(2, -1))

    ids = torch.tensor([[1, 5, -200, 7]])
    image = torch.randn(1, 3, 48, 48)
    assert plain(input_ids=ids, images=image).logits.shape == (1, 3 + 144, 422)
    plain.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_pretrained_model(str(tmp_path / "saved"), None, "llava", device="cpu")[1]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids, images=image).logits, plain.eval()(input_ids=ids, images=image).logits)


def test_a_model_that_has_its_parts_keeps_them(released: LlavaLlamaForCausalLM, oracle: Path) -> None:
    parts = [released.model.vision_tower, released.model.mm_projector]
    before = {name: value.clone() for name, value in released.model.mm_projector.state_dict().items()}
    released.model.mm_projector.requires_grad_(False)
    released.get_model().initialize_vision_modules(tower_arguments(oracle))
    assert parts == [released.model.vision_tower, released.model.mm_projector]
    assert all(torch.equal(before[name], value) for name, value in released.model.mm_projector.state_dict().items())
    assert all(parameter.requires_grad for parameter in released.model.mm_projector.parameters())


def test_a_projector_to_start_from_is_read(plain: LlavaLlamaForCausalLM, oracle: Path, tmp_path: Path) -> None:
    arguments = tower_arguments(oracle, mm_projector_type="linear", mm_patch_merge_type="flat")
    weights = {"model.mm_projector.weight": torch.randn(plain.config.hidden_size, 24), "model.mm_projector.bias": torch.zeros(32)}
    save_file(weights, tmp_path / "mm_projector.safetensors")
    arguments.pretrain_mm_mlp_adapter = str(tmp_path / "mm_projector.safetensors")
    plain.get_model().initialize_vision_modules(arguments)
    assert torch.equal(plain.get_model().mm_projector.weight, load_file(tmp_path / "mm_projector.safetensors")["model.mm_projector.weight"])


def test_a_tower_must_be_named(plain: LlavaLlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="vision_tower is empty"):
        plain.get_model().initialize_vision_modules(SimpleNamespace(vision_tower=None))


def test_a_cache_dir_reaches_model_tokenizer_and_tower(oracle: Path, tmp_path: Path) -> None:
    """The configuration names the tower alone, so its settings and its image processor are read from the cache too."""
    cache = tmp_path / "cache"
    put_into_cache(cache, "someone/tower", oracle / "tiny-clip")
    stored = tmp_path / "checkpoint"
    shutil.copytree(oracle / "checkpoint", stored)
    config = stored / "config.json"
    config.write_text(config.read_text().replace('"tiny-clip"', '"someone/tower"'))
    put_into_cache(cache, "someone/model", stored)
    hub = {"cache_dir": str(cache), "local_files_only": True}
    tokenizer, model, processor, _ = load_pretrained_model("someone/model", None, "model", device="cpu", **hub)
    assert len(tokenizer) == 420 and model.config.mm_vision_tower == "someone/tower" and processor.crop_size["height"] == 48
    with pytest.raises(ValueError, match="someone/model has no config.json"):
        load_pretrained_model("someone/model", None, "model", device="cpu", local_files_only=True)
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower="someone/tower", mm_vision_select_layer=-2), **hub)
    assert tower.vision_tower_name == "someone/tower"


def test_a_cache_dir_reaches_a_base_model_and_a_plain_one(plain: LlavaLlamaForCausalLM, oracle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    put_into_cache(cache, "someone/llama", tmp_path / "llama")
    put_into_cache(cache, "someone/tower", oracle / "tiny-clip")
    hub = {"cache_dir": str(cache), "local_files_only": True, "device": "cpu"}
    assert load_pretrained_model("someone/llama", None, "llama", **hub)[1].config.model_type == "llama"

    plain.get_model().initialize_vision_modules(tower_arguments(oracle, mm_projector_type="linear", mm_patch_merge_type="flat"))
    weights = {f"model.mm_projector.{name}": value for name, value in plain.get_model().mm_projector.state_dict().items()}
    folder = tmp_path / "projector"
    plain.config.mm_vision_tower = "someone/tower"
    plain.config.save_pretrained(folder)
    save_file(weights, folder / "mm_projector.safetensors", metadata={"format": "pt"})
    model = load_pretrained_model(str(folder), "someone/llama", "llava", **hub)[1]
    wanted = plain.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in model.state_dict().items())
