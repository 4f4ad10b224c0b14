"""Whatever stands in a native folder's config.json, both faces load it or end in one sentence, before a weight is read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from llava.checkpoint_files import read_headers, weight_files
from llava.model.builder import load_pretrained_model
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.model.native.outline import check_outline
from tests.model.test_stored_values import WRONG, ends_well, places, replaced

FEW = [None, True, -1, 7, 10**9, 0.5, float("nan"), "a", [], [[1, 1]], {"a": 1}]
"""A value of every type, for the set that always runs."""


@pytest.fixture(scope="module")
def stored(native_micro: Path) -> dict[str, Any]:
    return json.loads((native_micro / "config.json").read_text())


@pytest.fixture(scope="module")
def folder(native_micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro model, its config.json to be written by each test."""
    made = tmp_path_factory.mktemp("hostile")
    for file in native_micro.iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file)
    return made


def judge(stored: dict[str, Any], headers: dict[str, Any]) -> AvgLlavaConfig:
    config = AvgLlavaConfig.from_dict(stored)
    check_outline(AvgLlavaForConditionalGeneration, config, headers, "the micro model")
    return config


def test_every_field_with_a_value_of_every_type(stored: dict[str, Any]) -> None:
    """Configurations alone: building an outline of each would take minutes, see the slow test."""
    for path in places(stored):
        for value in FEW:
            ends_well(partial(AvgLlavaConfig.from_dict, replaced(stored, path, value)))
    for name in ("__class__", "to_dict", "levels", "sub_configs", "text", "num_labels", "unknown"):
        for value in FEW:
            ends_well(partial(AvgLlavaConfig.from_dict, {**stored, name: value}))
    for name in stored:
        ends_well(partial(AvgLlavaConfig.from_dict, {key: value for key, value in stored.items() if key != name}))


@pytest.mark.slow
def test_every_field_with_every_wrong_value_as_far_as_an_outline_of_the_model(
    stored: dict[str, Any], native_micro: Path, folder: Path
) -> None:
    """And with the first value of each field that is taken, both faces load it, or say in one sentence why not."""
    headers = read_headers(weight_files(native_micro))
    for path in places(stored):
        changed = [replaced(stored, path, value) for value in WRONG if value != 10**400]
        taken = [each for each in changed if ends_well(partial(judge, each, headers)) is not None]
        if taken:
            (folder / "config.json").write_text(json.dumps(taken[0]))
            for door in (load_pretrained_model, AutoModelForImageTextToText.from_pretrained):
                ends_well(partial(door, str(folder)))


HOSTILE: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "ten million layers": (("text_config", "num_hidden_layers"), 10**7, r"text_config.num_hidden_layers is 10000000, expected .* to 2048"),
    "more layers than weights": (("text_config", "num_hidden_layers"), 2048, "but the weights of .* hold 4 layers"),
    "more layers of the tower": (("vision_config", "num_hidden_layers"), 900, "but the weights of .* hold 5 layers"),
    "another width": (("text_config", "hidden_size"), 384, "has shape .*, but the configuration makes it"),
    "heads that do not divide": (
        ("text_config", "num_attention_heads"),
        5,
        r"has shape|multiple of the number of attention heads \(5\)|the 5 attention",
    ),
    "heads of no number": (("text_config", "num_attention_heads"), 0, "num_attention_heads is 0, expected a whole number"),
    "key heads that do not divide": (("text_config", "num_key_value_heads"), 4, "expected a divisor of the 6 attention heads"),
    "a head of odd width": (("text_config", "head_dim"), 33, "shape|does not run|head_dim|rotary"),
    "heads of the tower": (
        ("vision_config", "num_attention_heads"),
        7,
        r"multiple of the number of attention heads \(7\)|the 7 attention heads|has shape",
    ),
    "a patch larger than the view": (("vision_config", "patch_size"), 65, "patch_size is 65, expected at most image_size, 64"),
    "a patch of no size": (("vision_config", "patch_size"), 0, "patch_size is 0, expected a whole number from 1"),
    "a view of another size": (("vision_config", "image_size"), 96, "vis_token_granularity|levels|grid|multiples"),
    "an image token outside": (("image_token_id",), 641, "image_token_id is 641, expected 0 to 640"),
    "an unknown text model": (("text_config", "model_type"), "gpt-9", "model_type is 'gpt-9', expected one that this transformers knows"),
    "a tower for a text model": (("text_config", "model_type"), "clip_vision_model", "does not run|expected"),
    "a text model for a tower": (("vision_config", "model_type"), "bert", "does not|makes no model|expected"),
    "itself as a text model": (("text_config", "model_type"), "avg_llava", "cannot work|does not run|has shape"),
    "a list of parts": (("text_config",), [], r"text_config is \[\], expected the values of a configuration"),
    "a text for a part": (("vision_config",), "clip", "vision_config is 'clip', expected the values of a configuration"),
    "an activation": (("text_config", "hidden_act"), "os.system", "hidden_act is 'os.system', expected one of"),
    "no positions": (("text_config", "rope_parameters"), {"rope_type": "yarn"}, "cannot work|makes no model"),
    "a layer of the tower": (("vision_feature_layer",), 6, "vision_feature_layer is 6, but the tower has 5 layers"),
    "levels unlike the patches": (("vis_token_granularity",), [3, 64], "granularit|grid"),
    "canvases that are no multiples": (("image_grid_pinpoints",), [[65, 64]], "expected multiples of 64"),
    "a head of experts": (("text_config", "vocab_size"), 2**23, "has shape .*, but the configuration makes it"),
    "a method": (("to_dict",), 1, "'to_dict' is no field of a configuration"),
    "kept fields": (("llava_fields",), {"mm_use_im_start_end": "yes"}, "mm_use_im_start_end is 'yes', expected true or false"),
    "many slots": (("filtered_text_num",), 10**9, "filtered_text_num is 1000000000, expected"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_by_both_faces(case: str, stored: dict[str, Any], folder: Path) -> None:
    path, value, sentence = HOSTILE[case]
    changed = {**stored, path[0]: value} if len(path) == 1 else replaced(stored, path, value)
    (folder / "config.json").write_text(json.dumps(changed))
    doors = [partial(load_pretrained_model, str(folder), device="cpu"), partial(AutoModelForImageTextToText.from_pretrained, folder)]
    for door in doors[: 1 if case == "kept fields" else 2]:  # which only LLaVA's face reads
        assert ends_well(door) is None
        with pytest.raises((ValueError, OSError), match=sentence):
            door()


def test_a_file_that_is_nested_without_end_is_refused(folder: Path, native_micro: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "avg_llava", "a": ' + "[" * 60 + "]" * 60 + "}")
    for door in (load_pretrained_model, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match="nested"):
            door(str(folder))
    (folder / "config.json").write_text('{"model_type": "avg_llava", "a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply|not valid JSON"):
        load_pretrained_model(str(folder))


TEXTS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "smollm3", "mixtral", "qwen3_moe", "olmo2", "glm"]
TOWERS = ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit"]


@pytest.mark.parametrize("kind", [*TEXTS, *TOWERS])
def test_what_transformers_own_configurations_hold_is_taken(kind: str) -> None:
    part = "text_config" if kind in TEXTS else "vision_config"
    config = AvgLlavaConfig.from_dict({part: CONFIG_MAPPING[kind]().to_dict(), "image_token_id": 5})
    assert getattr(config, part).model_type == kind
    assert AvgLlavaConfig(**{part: {"model_type": kind, "dtype": torch.float32}}, image_token_id=5).text.vocab_size > 5
