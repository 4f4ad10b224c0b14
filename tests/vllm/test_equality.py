"""A stock vLLM with the plug-in says what `llava.inference.Assistant` says: text, token ids and prompt lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm.cases import Case, Outcome, differences
from tests.vllm.conftest import TRUSTED
from tests.vllm.server import VllmServer

pytestmark = pytest.mark.slow
Serve = Callable[..., VllmServer]


@pytest.mark.parametrize("clients", [16, 1, 64])
def test_all_questions_and_policies(
    clients: int, serve: Serve, llava_folder: Path, cases: list[Case], few: list[Case], expected: dict[str, Outcome]
) -> None:
    asked = cases if clients == 16 else few  # the second and third time the caches are warm
    assert differences(serve(llava_folder, *TRUSTED), asked, expected, clients, seed=clients) == []


def test_the_native_layout(serve: Serve, native_folder: Path, few: list[Case], expected_native: dict[str, Outcome]) -> None:
    assert differences(serve(native_folder, *TRUSTED), few, expected_native) == []


NO_CACHES = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*NO_CACHES, "--max-num-batched-tokens", "128"), id="no caches, prefill in chunks shorter than an image"),
        pytest.param(("--additional-config", '{"avg_llava": {"router_cache_mib": 0}}'), id="no features kept"),
        pytest.param(("--tensor-parallel-size", "2"), id="tensor parallel"),
    ],
)
def test_other_flags(flags: tuple[str, ...], serve: Serve, llava_folder: Path, few: list[Case], expected: dict[str, Outcome]) -> None:
    assert differences(serve(llava_folder, *TRUSTED, *flags), few, expected) == []
