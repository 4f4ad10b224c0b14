"""The shipped model twice: whole, for what the answers have to be, and its front, for what answers them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from PIL import Image

from llava.inference import MICRO_MODEL, Assistant
from tests.serve.fake_backend import FakeBackend
from tests.serve.split.fake_vllm import FakeVllm, serving

EVAL = MICRO_MODEL.parent / "eval"


@pytest.fixture(scope="session")
def whole() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="session")
def front() -> Assistant:
    return Assistant.load(device="cpu", front_only=True)


@pytest.fixture(scope="session")
def asked() -> list[tuple[Image.Image, str]]:
    """Questions of every family about several pictures."""
    rows = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()[:36:4]]
    return [(Image.open(EVAL / row["image"]).convert("RGB"), row["text"]) for row in rows]


@pytest.fixture
def vllm(whole: Assistant) -> FakeVllm:
    return FakeVllm(whole)


@pytest.fixture
def backend(vllm: FakeVllm) -> Iterator[FakeBackend]:
    with serving(vllm) as fake:
        yield fake
