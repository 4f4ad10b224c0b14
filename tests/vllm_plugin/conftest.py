"""The shipped model as the plug-in and as our own assistant see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig

from llava.convert import main as convert
from llava.inference import Assistant, micro_model_path
from llava.vllm_plugin.served import ServedModel, complete

IMAGES = Path(__file__).parents[2] / "playground" / "eval" / "images"


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="session", params=["llava", "native"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """The shipped model in each layout."""
    output = tmp_path_factory.mktemp("layouts") / request.param
    shipped = micro_model_path()
    path = str(output) if convert([shipped, str(output), "--to", request.param]) == 0 else shipped
    config = AutoConfig.from_pretrained(path)
    complete(config, path)
    return ServedModel(config, path, {})


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Of several shapes."""
    first, second = (Image.open(IMAGES / f"{number:03}.png").convert("RGB") for number in (0, 1))
    return [first, second, first.resize((300, 40)), second.resize((33, 250)), first.resize((1, 1))]
