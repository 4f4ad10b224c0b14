"""Warnings of other libraries that nobody can act upon are left out, and no others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llava.hints import LOGGED, WARNED, _is_no_hint, keep_back_hints
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

LOADING = "transformers.modeling_utils"


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """The messages that a logger lets through."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    yield messages
    logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s."),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from %s to float16 during quantization"),
        (LOADING, "\x1b[1mLlavaLlamaForCausalLM LOAD REPORT\x1b[0m from: %s\nKey | Status\nlm_head | MISSING"),
    ],
)
def test_only_the_hint_is_kept_back(name: str, hint: str) -> None:
    with heard(name) as messages:
        logging.getLogger(name).warning(hint, "this")
        logging.getLogger(name).warning("something else: %s", "this")
    assert messages == ["something else: this"]


@pytest.mark.parametrize("report", ["LlamaForCausalLM LOAD REPORT from: x\nMISSING", "LlavaLlamaForCausalLM LOAD REPORT from\n| MISMATCH"])
def test_reports_that_say_something_stay(report: str) -> None:
    """Of a model that is not ours, and of sizes that do not fit, which the error behind the report does not name."""
    with heard(LOADING) as messages:
        logging.getLogger(LOADING).warning(report)
    assert messages == [report]


def test_warnings_are_kept_back_by_their_beginning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep_back_hints()
        for beginning, category in WARNED.items():
            warnings.warn(f"{beginning} and will be removed", category, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_a_language_model_becomes_multimodal_without_a_screen_of_keys(oracle: Path, tmp_path: Path) -> None:
    config = LlavaLlamaForCausalLM._read_config(str(oracle / "checkpoint"))
    LlavaLlamaForCausalLM._complete_tower(config, str(oracle / "checkpoint"))
    fields = [name for name in vars(LlamaConfig()) if hasattr(config, name) and name != "architectures"]
    plain = LlamaConfig(**{name: getattr(config, name) for name in fields})
    LlamaForCausalLM(plain).save_pretrained(tmp_path)
    said = {}
    for silent in (True, False):
        if not silent:
            logging.getLogger(LOADING).removeFilter(_is_no_hint)
        with heard(LOADING) as messages:
            LlavaLlamaForCausalLM.from_base(str(tmp_path), config, None)
        said[silent] = sum("LOAD REPORT" in message for message in messages)
    keep_back_hints()
    assert said == {True: 0, False: 1} and LOADING in LOGGED
