"""The front of a model encodes and routes as the whole does, and holds nothing of the language model's layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.convert import main as convert
from llava.inference import Assistant, Question, micro_model_path
from llava.messages import Options, RoutingRequest
from llava.model.builder import load_pretrained_model
from llava.timing import StageTimer


@pytest.fixture(scope="module")
def whole() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module", params=["llava", "native"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The front of the shipped model, read from either layout."""
    folder = tmp_path_factory.mktemp("layouts") / request.param
    has_it = convert([micro_model_path(), str(folder), "--to", request.param]) != 0
    return Assistant.load(micro_model_path() if has_it else str(folder), device="cpu", front_only=True)


def of_language(model: Any) -> int:
    """Parameters of a model's layers, their last norm and the head."""
    named = model.named_parameters()
    return sum(each.numel() for name, each in named if re.match(r"(model\.(language_model\.)?(layers|norm)|lm_head)\.", name))


def test_no_language_layer_is_in_memory(whole: Assistant, front: Assistant) -> None:
    layers, all_of_it = of_language(whole.model), whole.model.num_parameters()
    assert layers > all_of_it / 2 and of_language(front.model) == 0
    spare_row = front.model.get_input_embeddings().weight.numel() - whole.model.get_input_embeddings().weight.numel()
    assert front.model.num_parameters() == all_of_it - layers + spare_row


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
