"""A native model of which a part, or all, lies in host memory or on the disk: the same bits."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava.model import LlavaLlamaForCausalLM
from llava.model.native import AvgLlavaForConditionalGeneration
from tests.model.native.conftest import Batch

PARTS = ["model.vision_tower", "model.multi_modal_projector", "model.image_newline", "model.router", "model.language_model", "lm_head"]
GENERATE = {"max_new_tokens": 3, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, native: AvgLlavaForConditionalGeneration) -> Path:
    saved = tmp_path_factory.mktemp("native") / "model"
    native.save_pretrained(saved)
    return saved


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_a_part_on_the_disk(folder: Path, native: AvgLlavaForConditionalGeneration, mixed: Batch, part: str, tmp_path: Path) -> None:
    places = {name: "disk" if part in ("all", name) else "cpu" for name in PARTS}
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map=places, offload_folder=tmp_path).eval()
    away = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert away == {name for name, _ in native.named_parameters() if part == "all" or name.startswith(part)}
    assert_equal(model, native, mixed)


def test_all_of_it_in_host_memory(folder: Path, native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert_equal(model, native, mixed)


def test_transformers_finds_a_map_by_itself(folder: Path, native: AvgLlavaForConditionalGeneration, mixed: Batch, tmp_path: Path) -> None:
    room = native.get_memory_footprint() // 2
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path).eval()
    assert "disk" in model.hf_device_map.values()
    assert_equal(model, native, mixed)


def test_llavas_face_lies_on_the_disk_too(
    pair: tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration], mixed: Batch, tmp_path: Path
) -> None:
    expected = pair[0](**mixed.llava()).logits  # type: ignore[arg-type]
    pair[0].save_pretrained(tmp_path / "model")
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    accelerate.disk_offload(model, str(tmp_path / "away"), execution_device="cpu")
    assert torch.equal(model(**mixed.llava()).logits, expected)  # type: ignore[arg-type]


@torch.no_grad()
def assert_equal(model: AvgLlavaForConditionalGeneration, whole: AvgLlavaForConditionalGeneration, batch: Batch) -> None:
    assert torch.equal(model(**batch.kwargs()).logits, whole(**batch.kwargs()).logits)
    assert torch.equal(model.generate(**batch.kwargs(), **GENERATE), whole.generate(**batch.kwargs(), **GENERATE))
