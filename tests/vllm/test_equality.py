"""A stock vLLM with the plug-in says what `llava.inference.Assistant` says: text, token ids and prompt lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from llava.inference import Assistant
from llava.model.adapter import attach_adapter
from tests.vllm.cases import Case, Outcome, answers_of, differences, outcomes_of
from tests.vllm.conftest import TRUSTED
from tests.vllm.quantised import quantise
from tests.vllm.server import VllmServer
from tests.vllm.text_models import with_text_model

pytestmark = pytest.mark.slow
Serve = Callable[..., VllmServer]


@pytest.mark.parametrize("clients", [16, 1, 64])
def test_all_questions_and_policies(
    clients: int, serve: Serve, llava_folder: Path, cases: list[Case], few: list[Case], expected: dict[str, Outcome]
) -> None:
    asked = cases if clients == 16 else few  # the second and third time the caches are warm
    assert differences(serve(llava_folder, *TRUSTED), asked, expected, clients=clients, seed=clients) == []


def test_the_native_layout(serve: Serve, native_folder: Path, few: list[Case], expected_native: dict[str, Outcome]) -> None:
    assert differences(serve(native_folder, *TRUSTED), few, expected_native) == []


NO_CACHES = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*NO_CACHES, "--max-num-batched-tokens", "128"), id="no caches, prefill in chunks shorter than an image"),
        pytest.param(("--additional-config", '{"avg_llava": {"router_cache_mib": 0}}'), id="no features kept"),
    ],
)
def test_other_flags(flags: tuple[str, ...], serve: Serve, llava_folder: Path, few: list[Case], expected: dict[str, Outcome]) -> None:
    assert differences(serve(llava_folder, *TRUSTED, *flags), few, expected) == []


def test_two_ranks(serve: Serve, llava_folder: Path, few: list[Case], expected: dict[str, Outcome]) -> None:
    """Tensor parallel: vLLM's tower, split, in the place of ours; on a CPU each rank has to be told its cores."""
    server = serve(llava_folder, *TRUSTED, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert differences(server, few, expected) == []


def test_lora_on_the_language_layers(
    serve: Serve, llava_folder: Path, scratch: Path, few: list[Case], expected: dict[str, Outcome]
) -> None:
    folder = scratch / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.\d+\..*_proj", base_model_name_or_path=str(llava_folder))
    assistant = Assistant.load(str(llava_folder), device="cpu")
    torch.manual_seed(0)
    attach_adapter(assistant.model, config)
    generator = torch.Generator().manual_seed(0)
    for name, matrix in assistant.model.named_parameters():
        if ".lora_B." in name:
            matrix.data = 0.5 * torch.randn(matrix.shape, generator=generator)
    assistant.model.save_pretrained(folder)
    adapted = answers_of(assistant, few)
    assert sum(adapted[case.name] != expected[case.name] for case in few) > 10, "the adapter has to change answers"
    server = serve(llava_folder, *TRUSTED, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapted={folder}")
    assert differences(server, few, adapted, model="adapted") == []
    assert differences(server, few, expected) == []


def test_eight_bit_weights_and_activations(
    serve: Serve, llava_folder: Path, scratch: Path, few: list[Case], expected: dict[str, Outcome]
) -> None:
    """The router is not quantised, so every length is as before; rounding turned one answer of 110 when this was written."""
    found = outcomes_of(serve(quantise(llava_folder, scratch / "quantised"), *TRUSTED), few)
    assert [case.name for case in few if found[case.name].prompt_tokens != expected[case.name].prompt_tokens] == []
    assert sum(found[case.name] != expected[case.name] for case in few) <= 0.03 * len(few)


@pytest.mark.parametrize("text_model", ["mistral", "qwen2", "qwen3"])
def test_other_text_models(text_model: str, serve: Serve, native_folder: Path, scratch: Path, few: list[Case]) -> None:
    """The shipped model's tower and router before random layers of another kind, in the native layout.

    What random layers say is no text: vLLM decodes such bytes one by one and we all at once, so that ids and lengths are compared.
    """
    folder = scratch / text_model
    asked = few[-20:]
    with_text_model(native_folder, text_model, folder)
    wanted = answers_of(Assistant.load(str(folder), device="cpu"), asked)
    assert len({outcome.token_ids for outcome in wanted.values()}) > 3, "the answers have to depend on the question"
    found = outcomes_of(serve(folder, *TRUSTED), asked)
    assert {name: replace(each, text="") for name, each in found.items()} == {name: replace(each, text="") for name, each in wanted.items()}
