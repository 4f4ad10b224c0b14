"""A file of questions, answered by a server at an address and by vLLM in the process: what the embedded engine answers, in its order."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval.model_vqa import main
from tests.vllm.cases import QUESTIONS
from tests.vllm.conftest import TRUSTED
from tests.vllm.server import ROOT, VllmServer

pytestmark = pytest.mark.slow


def flags(answers: Path, *more: object) -> list[str]:
    given = ["--question-file", QUESTIONS, "--answers-file", answers, "--max-new-tokens", 16, "--num-chunks", 40, *more]
    return [str(word) for word in given]


def read(file: Path) -> list[tuple[Any, ...]]:
    """What must be the same whoever answers."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    names = ("visual_tokens", "prompt_tokens", "new_tokens", "finish_reason")
    return [(line["question_id"], line["text"], *(line["metadata"][name] for name in names)) for line in lines]


@pytest.fixture(scope="module")
def embedded(scratch: Path) -> list[tuple[Any, ...]]:
    assert main(flags(scratch / "embedded.jsonl", "--device", "cpu", "--batch-size", 8)) == 0
    return read(scratch / "embedded.jsonl")


def test_a_server(serve: Callable[..., VllmServer], llava_folder: Path, embedded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    server = serve(llava_folder, *TRUSTED)
    assert main(flags(tmp_path / "served.jsonl", "--engine", "vllm", "--vllm", server.url)) == 0
    assert read(tmp_path / "served.jsonl") == embedded


def test_this_process(environment: Path, llava_folder: Path, embedded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    command = [str(environment / "bin" / "python"), "-m", "llava.eval.model_vqa"]
    command += flags(tmp_path / "offline.jsonl", "--engine", "vllm", "--batch-size", 32, "--model-path", llava_folder)
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read(tmp_path / "offline.jsonl") == embedded
