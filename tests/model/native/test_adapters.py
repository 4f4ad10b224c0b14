"""Stock PEFT on a native model: every linear layer, router included, counts before and after merging, and adapter folders come back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import PeftAdapterMixin

from llava.model.builder import load_pretrained_model
from llava.model.native import AvgLlavaForConditionalGeneration
from tests.model.native.conftest import Batch, make_batch

peft = pytest.importorskip("peft")

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "every linear layer": {"target_modules": "all-linear"},
    "attention": ATTENTION,
    "the text model by a pattern": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "the router alone": {"target_modules": r".*router\..*\.(in_proj|out_proj|linear1|linear2|0|2)"},
    "with a whole projector": {**ATTENTION, "modules_to_save": ["multi_modal_projector"]},
    "with a whole newline vector": {**ATTENTION, "modules_to_save": ["image_newline"]},
    "with a whole router": {**ATTENTION, "modules_to_save": ["model.router"]},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "decomposed": {"target_modules": "all-linear", "use_dora": True},
}
LOADS_WHOLE_PARTS = "adapter_state_dict_load_map" in inspect.getsource(PeftAdapterMixin.load_adapter)
"""Whether this transformers finds `modules_to_save` in an adapter's file by itself; 5.17 does not, whatever the model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, native: AvgLlavaForConditionalGeneration) -> Path:
    saved = tmp_path_factory.mktemp("native") / "model"
    native.save_pretrained(saved)
    return saved


@pytest.fixture
def batch() -> Batch:
    return make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, [])])


def adapted(folder: Path, variant: dict[str, Any]) -> Any:
    """A model with an adapter in which every matrix and every whole part counts."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **variant)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
            elif ".modules_to_save." in name or ".lora_magnitude_vector." in name:
                parameter.mul_(1.1)
    return model


@torch.no_grad()
def outputs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at a fixed level, and the router's."""
    logits = model(**batch.kwargs(), vis_token_granularity=16).logits[batch.attention_mask.bool()]
    return logits, torch.stack([report.logits for report in model(**batch.kwargs()).routing])


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_equals_unmerged_and_a_folder_comes_back(
    folder: Path, native: AvgLlavaForConditionalGeneration, batch: Batch, name: str, tmp_path: Path
) -> None:
    model = adapted(folder, VARIANTS[name])
    expected, before = outputs(model, batch), outputs(native, batch)
    changed = [(one - other).abs().max() > 1e-3 for one, other in zip(expected, before, strict=True)]
    assert changed == [name != "the router alone", name != "the text model by a pattern"]
    model.save_pretrained(tmp_path)
    loaded = [peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path)]
    # Magnitudes are left behind by transformers' own loading, whatever the model.
    if name != "decomposed" and (LOADS_WHOLE_PARTS or "modules_to_save" not in VARIANTS[name]):
        loaded.append(AutoModelForImageTextToText.from_pretrained(tmp_path))
    for again in loaded:
        assert all(torch.equal(*both) for both in zip(outputs(again.eval(), batch), expected, strict=True))
    merged = model.merge_and_unload()
    assert isinstance(merged, AvgLlavaForConditionalGeneration)
    for found, wanted in zip(outputs(merged, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)  # W x + s B A x against (W + s B A) x, in float32


def test_an_adapter_on_every_linear_layer_learns_and_leaves_the_routers_choice_alone(folder: Path, batch: Batch) -> None:
    """The choice of a level has no gradient, so that what only it hangs on has none either."""
    model = adapted(folder, {"target_modules": "all-linear"}).train()
    model(**batch.kwargs(), labels=batch.input_ids.clone()).loss.backward()
    learning = {name.split(".")[3] for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learning == {"vision_tower", "multi_modal_projector", "language_model"}


@pytest.mark.parametrize("name", ["every linear layer", "with a whole router", "with a whole newline vector", "decomposed"])
def test_llavas_door_merges_a_folder_of_peft_alone(native_micro: Path, name: str, tmp_path: Path) -> None:
    model = adapted(native_micro, VARIANTS[name])
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    before = AutoModelForImageTextToText.from_pretrained(native_micro).state_dict()
    assert any(not torch.equal(merged[key], before[key]) for key in merged)
    for base in (str(native_micro), None):  # the folder names its base too
        tokenizer, found, image_processor, _ = load_pretrained_model(str(tmp_path), base, "any-name", device="cpu")
        assert image_processor is not None and len(tokenizer)
        weights = found.state_dict()
        assert weights.keys() == merged.keys() and all(torch.equal(weights[key], merged[key]) for key in merged)


def test_a_folder_of_peft_alone_that_does_not_fit_is_refused_in_a_sentence(folder: Path, native_micro: Path, tmp_path: Path) -> None:
    adapted(folder, ATTENTION).save_pretrained(tmp_path)
    base = str(native_micro)
    with pytest.raises(ValueError, match="LoRA does not fit the model: .* check the base"):
        load_pretrained_model(str(tmp_path), base, "any-name", device="cpu")
    with pytest.raises(ValueError, match="was written by PEFT alone, so it can only be merged"):
        load_pretrained_model(str(tmp_path), base, "any-name", device="cpu", load_8bit=True)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": 3}))
    with pytest.raises(ValueError, match="modules_to_save"):
        load_pretrained_model(str(tmp_path), base, "any-name", device="cpu")
