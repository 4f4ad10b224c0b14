"""Quantised weights: what is never quantised, and an answer without a warning per layer."""

from __future__ import annotations

import logging

import pytest
import torch

from llava.images import load_image
from llava.inference import Assistant, Options
from llava.model.quantization import WHOLE_PARTS, quantization_config
from llava.utils import pick_device

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_config_has_one_width_and_leaves_the_small_parts_whole(bits: int) -> None:
    config = quantization_config(bits, torch.float32)
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert config.llm_int8_skip_modules == WHOLE_PARTS and config.bnb_4bit_quant_type == "nf4"


@pytest.mark.skipif(pick_device() != "cpu", reason="the warnings are of products on a CPU")
def test_an_answer_of_eight_bits_warns_of_nothing(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    assistant = Assistant.load(device="cpu", load_8bit=True)
    image = load_image("playground/images/scene_pink.png")
    assert assistant.answer([image], "What is the background colour?", Options(max_new_tokens=4)).text == "pink"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
