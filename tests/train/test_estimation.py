"""What an estimate says of a model, against stored weights and published shapes, and the flags that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llava.model.native import AvgLlavaConfig
from llava.train.build import model_outline, read_model_config
from llava.train.costs import Step, _tower_memory, precision_of
from llava.train.estimation import estimate, preset_config, trained_parameters
from llava.train.flags import EstimateArguments
from llava.train.presets import PRESETS
from llava.train.stages import PARTS, STAGES, PartSummary, apply_stage, part_of

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "oracle"
MICRO = ROOT / "playground" / "avg-llava-micro"


# --- models


@pytest.mark.parametrize(("preset", "parameters"), [("vicuna-13b", 13_015_864_320), ("mistral-7b", 7_241_732_096)])
def test_other_presets_have_the_published_parameters(preset: str, parameters: int) -> None:
    model = model_outline(preset_config(preset))
    assert apply_stage(model, STAGES["instruct"])[0] == PartSummary("llm", parameters, parameters)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_weights_are_made(preset: str) -> None:
    model = model_outline(preset_config(preset))
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("folder", [ORACLE / "checkpoint", MICRO], ids=["recorded", "micro"])
def test_parameters_equal_the_stored_ones(folder: Path) -> None:
    counts = dict.fromkeys(PARTS, 0)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not name.endswith("position_ids"):  # a buffer
                    counts[part_of(name)] += torch.Size(tensors.get_slice(name).get_shape()).numel()
    found = estimate(EstimateArguments(model_name_or_path=str(folder)))
    assert found.parameters == {part: count for part, count in counts.items() if count}


def test_trained_parts_are_the_trainers(tiny_model: Any) -> None:
    """Counted on the loaded model after the trainer's own choice of what trains."""
    found = estimate(EstimateArguments(model_name_or_path=str(ORACLE / "checkpoint")))
    assert set(found.trained_parameters) == set(STAGES)
    for name, stage in STAGES.items():
        apply_stage(tiny_model, stage)
        trained = sum(parameter.numel() for parameter in tiny_model.parameters() if parameter.requires_grad)
        assert found.trained_parameters[name] == trained > 0


def test_the_shipped_model_is_estimated_from_its_folder() -> None:
    """The folder's configuration is all that is read, and names the model that its documentation presents."""
    found = estimate(EstimateArguments(model_name_or_path=str(MICRO)))
    model = model_outline(read_model_config(str(MICRO)))
    assert found.parameters == {part.part: part.parameters for part in apply_stage(model, STAGES["align"])}
    assert found.settings["image_size"] == [128, 128] and found.settings["views"] == 5
    assert [line["visual_tokens"] for line in found.granularities] == [24, 48, 88, 176, 336]


def test_a_native_folder_of_other_parts_is_estimated(tmp_path: Path) -> None:
    """Qwen2 names no head_dim, and DINOv2 no intermediate_size; what that would be in a CLIP is not assumed."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    AvgLlavaConfig(
        text_config={"model_type": "qwen2", **text, "num_key_value_heads": 2},
        vision_config={"model_type": "dinov2", **tower, "mlp_ratio": 3},
        image_token_id=3,
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}')
    found = estimate(EstimateArguments(model_name_or_path=str(tmp_path), stage="instruct", text_tokens=10))
    assert found.granularities[0]["kv_cache_bytes"] == 2 * 2 * 8 * 2 * 2 * found.granularities[0]["positions"]
    model = model_outline(read_model_config(str(tmp_path)))
    step, precision = Step(rows=1, text_tokens=10, answer_tokens=10, image_size=(16, 16)), precision_of("bf16", "0")
    working = precision.compute * (2 * 96 + 2 * 32) + 4 * 32  # of a feed-forward three times as wide as the tower
    assert _tower_memory(model, STAGES["rglf"], step, precision) == working < _tower_memory(model, STAGES["instruct"], step, precision)


def test_the_stages_of_a_model_with_one_granularity() -> None:
    config = preset_config("vicuna-7b")
    config.vis_token_granularity, config.router_select, config.num_hidden_layers = None, False, 1
    model = model_outline(config)
    assert set(trained_parameters(model)) == {"align", "instruct"}
    assert [level.tokens for level in model.levels] == [576] and model.model.router is None


# --- operations


def test_a_step_runs_the_granularities_of_its_stage_for_every_row() -> None:
    """The finest, or all where the stage compares them; with scores made before, none."""
    found = {}
    for stage in STAGES:
        found[stage] = estimate(EstimateArguments(model_name_or_path=str(MICRO), stage=stage, per_device_train_batch_size=2))
    one = [line["forward_operations"] for line in found["align"].granularities]
    language = {stage: result.operations[stage]["language"] for stage, result in found.items()}
    assert language == {"align": 2 * one[-1], "instruct": 2 * one[-1], "multi_granularity": 2 * sum(one), "rglf": 2 * sum(one)}
    assert {stage: list(result.operations) for stage, result in found.items() if stage != "rglf"} == {
        stage: [stage] for stage in STAGES if stage != "rglf"
    }
    scored = found["rglf"].operations["rglf, scored before"]
    assert scored == {**found["rglf"].operations["rglf"], "language": 0, "total": scored["total"]}
    assert scored["total"] == sum(scored[part] for part in ("vision", "router", "backward", "recomputed"))


# --- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stage": "rank"}, "--stage is 'rank'"),
        ({"dtype": "int8"}, "--dtype is 'int8'"),
        ({"zero": "1"}, "--zero is '1'"),
        ({"bits": 4}, "--bits 4: quantised weights cannot be trained in stage multi_granularity; give --lora_r"),
        ({"bits": 4, "lora_r": 8, "zero": "3"}, "quantised weights are not divided"),
        ({"lora_r": 8, "stage": "rglf"}, "stage rglf does not train the language model"),
        ({"answer_tokens": 300}, "--answer_tokens is 300"),
        ({"num_gpus": 0}, "--num_gpus is 0"),
        ({"image_size": "672"}, "--image_size is '672'"),
        ({"preset": "vicuna-7b"}, "either --model_name_or_path or --preset"),
    ],
)
def test_flags_that_cannot_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(EstimateArguments(**{"model_name_or_path": str(MICRO), **flags}))


def test_quantised_runs_list_only_what_can_be() -> None:
    result = estimate(EstimateArguments(model_name_or_path=str(MICRO), lora_r=8, bits=4))
    assert list(result.memory) == ["0", "2"] and result.parameters["lora"] == 8 * 4 * (4 * 2 * 192 + 3 * (192 + 512))
