"""The environment of vLLM, the model in both layouts, and our own answers, which are computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llava.convert import layout_of
from llava.convert import main as convert
from llava.inference import Assistant, micro_model_path
from tests.vllm.cases import Case, Outcome, answers_of, question_cases, read, special_cases, store
from tests.vllm.server import VllmServer

TRUSTED = ("--trust-request-mm-kwargs", "--enable-prompt-tokens-details", "--enforce-eager")
"""Flags of most servers here: requests may say a granularity, usage says what images took, and nothing is compiled."""

EMBEDDING_ONLY = ("--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}', "--enforce-eager")
"""Flags of a server that takes rows for images and loads no tower."""


@pytest.fixture(scope="session")
def environment() -> Path:
    """The folder that scripts/setup_vllm.sh made."""
    folder = Path(os.environ.get("VLLM_ENV", ""))
    if not (folder / "bin" / "vllm").is_file():
        pytest.skip("VLLM_ENV names no environment with vLLM; bash scripts/test_vllm.sh makes one and runs these tests.")
    return folder.absolute()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def llava_folder(scratch: Path) -> Path:
    """The shipped model in LLaVA's layout."""
    return _in_layout("llava", scratch)


@pytest.fixture(scope="session")
def native_folder(scratch: Path) -> Path:
    """The shipped model in the native layout."""
    return _in_layout("native", scratch)


def _in_layout(layout: str, scratch: Path) -> Path:
    shipped, output = Path(micro_model_path()), scratch / layout
    if layout_of(shipped) == layout:
        return shipped
    assert convert([str(shipped), str(output), "--to", layout]) == 0
    return output


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    """All questions of the evaluation split, or about VLLM_TEST_QUESTIONS of them, and the special cases."""
    limit = os.environ.get("VLLM_TEST_QUESTIONS")
    return question_cases(None if limit is None else int(limit)) + special_cases()


@pytest.fixture(scope="session")
def expected(cases: list[Case], scratch: Path) -> dict[str, Outcome]:
    """Our own answers; VLLM_TEST_EXPECTED names a file that keeps them from one run to the next."""
    kept = Path(os.environ.get("VLLM_TEST_EXPECTED", scratch / "expected.json"))
    if not kept.is_file():
        store(answers_of(Assistant.load(device="cpu"), cases), kept)
    return read(kept)


@pytest.fixture(scope="session")
def expected_native(few: list[Case], native_folder: Path) -> dict[str, Outcome]:
    """Our own answers from the native folder, whose router tells earlier answers from the question by the marks in its configuration."""
    return answers_of(Assistant.load(str(native_folder), device="cpu"), few)


@pytest.fixture(scope="session")
def few(cases: list[Case]) -> list[Case]:
    """A part of the cases, for servers that differ in a flag: an eleventh of the questions, and all special ones.

    The step shares no factor with the number of policies, so that the questions have all of them.
    """
    special = [case for case in cases if not case.name.isdigit()]
    return [*[case for case in cases if case.name.isdigit()][::11], *special]


@pytest.fixture(scope="module")
def serve(environment: Path, scratch: Path) -> Iterator[Callable[..., VllmServer]]:
    """`serve(model, *flags)`: a server until the module's tests are done; one at a time, the same one for the same arguments."""
    running: dict[tuple[Any, ...], VllmServer] = {}
    with ExitStack() as stack:

        def start(model: Path, *flags: str, **variables: str) -> VllmServer:
            key = (model, flags, tuple(variables.items()))
            if key not in running:
                stack.close()
                running.clear()
                log = scratch / f"server-{len(list(scratch.glob('server-*.log')))}.log"
                running[key] = stack.enter_context(VllmServer(environment, model, *flags, log=log, variables=variables))
            return running[key]

        yield start
