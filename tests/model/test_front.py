"""The front of a model encodes and routes as the whole does, and holds nothing of the language model's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.inference import Assistant, Question
from llava.messages import Options, RoutingRequest
from llava.model.builder import load_pretrained_model
from llava.timing import StageTimer


@pytest.fixture(scope="module")
def whole() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def front() -> Assistant:
    return Assistant.load(device="cpu", front_only=True)


def parts(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of each part of a model."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def test_no_language_layer_is_in_memory(whole: Assistant, front: Assistant) -> None:
    expected = parts(whole.model)
    for part in ("layers", "norm", "weight"):  # `lm_head.weight`
        assert expected.pop(part) > 0
    assert parts(front.model) == expected
    assert front.model.num_parameters() < whole.model.num_parameters() / 2


@pytest.mark.parametrize(
    "routing", [RoutingRequest(), RoutingRequest(16), RoutingRequest(bias=-0.5), RoutingRequest(max_visual_tokens=100)]
)
def test_images_are_encoded_and_routed_as_by_the_whole(whole: Assistant, front: Assistant, routing: RoutingRequest) -> None:
    image = Image.open("playground/images/scene_pink.png").convert("RGB")
    rows = []
    for assistant in (whole, front):
        with torch.inference_mode():
            [row] = assistant.compose(
                [Question([image], "Which number does the sign show?")], Options(routing=routing), StageTimer(torch.device("cpu"))
            )
        rows.append(row)
    assert torch.equal(rows[0].row.inputs_embeds, rows[1].row.inputs_embeds)
    assert rows[0].reports[0].granularity == rows[1].reports[0].granularity


def test_what_has_no_front_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no whole model, of which a front could be read"):
        load_pretrained_model(str(tmp_path), device="cpu", front_only=True)
