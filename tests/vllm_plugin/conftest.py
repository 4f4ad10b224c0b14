"""The shipped model as the plug-in and as our own assistant see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig

from llava.convert import layout_of
from llava.convert import main as convert
from llava.inference import Assistant, micro_model_path
from llava.vllm_plugin.served import ServedModel, complete

IMAGES = Path(__file__).parents[2] / "playground" / "eval" / "images"


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shipped model in each layout."""
    output, shipped = tmp_path_factory.mktemp("layouts"), micro_model_path()
    own = layout_of(Path(shipped))
    other = {"llava": "native", "native": "llava"}[own]
    assert convert([shipped, str(output / other), "--to", other]) == 0
    return {own: shipped, other: str(output / other)}


@pytest.fixture(scope="session", params=["llava", "native"])
def served(request: pytest.FixtureRequest, folders: dict[str, str]) -> ServedModel:
    path = folders[request.param]
    config = AutoConfig.from_pretrained(path)
    complete(config, path)
    return ServedModel(config, path, {})


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Of several shapes."""
    first, second = (Image.open(IMAGES / f"{number:03}.png").convert("RGB") for number in (0, 1))
    return [first, second, first.resize((300, 40)), second.resize((33, 250)), first.resize((1, 1))]
