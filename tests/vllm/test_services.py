"""Controller, worker and bridge as programs over a real vLLM, asked through the controller's address as clients and the page do."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava.messages import RoutingRequest, write_prompt
from tests.vllm.cases import LEVELS, POLICIES, Case, Outcome
from tests.vllm.conftest import EMBEDDING_ONLY, TRUSTED
from tests.vllm.programs import ask, body_of, program
from tests.vllm.server import NAME, VllmServer

pytestmark = pytest.mark.slow
Serve = Callable[..., VllmServer]


@contextlib.contextmanager
def through_a_controller(scratch: Path, module: str, *flags: str) -> Iterator[str]:
    """The address of a controller with which a worker or bridge has registered."""
    with program("controller", scratch / "controller.log", until="/health") as (url, _):
        flags = (*flags, "--model-name", NAME, "--controller", url)
        with program(module, scratch / f"{module}.log", *flags):
            models = httpx.get(url + "/v1/models", timeout=60).json()["data"]
            assert [(model["id"], model["granularities"]) for model in models] == [(NAME, list(LEVELS))]
            yield url


@pytest.fixture(scope="module")
def asked(few: list[Case]) -> list[Case]:
    """One question for each form of a wish, and what questions do not have."""
    special = [case for case in few if not case.name.isdigit()]
    questions = {case.routing: case for case in few if case.name.isdigit()}
    assert set(questions) == set(POLICIES)
    return [*questions.values(), *special[::3]]


def check_answers(url: str, cases: Sequence[Case], expected: dict[str, Outcome]) -> None:
    wrong = []
    for case in cases:
        answer = ask(url, case)
        assert answer.status_code == 200, f"{case.name}: {answer.text}"
        text, usage = answer.json()["choices"][0]["message"]["content"].strip(), answer.json()["usage"]
        wanted = expected[case.name]
        if (text, usage["prompt_tokens"], usage["completion_tokens"]) != (wanted.text, wanted.prompt_tokens, len(wanted.token_ids)):
            wrong.append((case.name, text, usage, wanted))
    assert wrong == []


def check_stream(url: str, case: Case, wanted: Outcome) -> None:
    with httpx.stream("POST", url + "/v1/chat/completions", json=body_of(case, stream=True), timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]).strip() == wanted.text


def check_llavas_protocol(url: str, case: Case, wanted: Outcome) -> None:
    """A finished prompt, which is answered with the router's choice."""
    assert case.routing == RoutingRequest()
    prompt, [image], buffer = write_prompt(list(case.turns), 1, "vicuna_v1"), case.images, BytesIO()
    image.save(buffer, "PNG")
    asked: dict[str, Any] = {"prompt": prompt, "images": [base64.b64encode(buffer.getvalue()).decode()], "stop": "</s>"}
    body = {"model": NAME, "temperature": 0, "max_new_tokens": 24, **asked}
    parts = httpx.post(url + "/worker_generate_stream", json=body, timeout=120).content.split(b"\0")
    last = json.loads(parts[-2])
    assert last["error_code"] == 0 and last["text"].removeprefix(prompt).strip() == wanted.text


def check_services(url: str, asked: Sequence[Case], expected: dict[str, Outcome]) -> None:
    check_answers(url, asked, expected)
    routed = next(case for case in asked if case.routing == RoutingRequest() and case.name.isdigit())
    check_stream(url, routed, expected[routed.name])
    check_llavas_protocol(url, routed, expected[routed.name])
    refused = ask(url, routed, granularity=5)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_request"


def test_a_bridge_to_a_vllm_with_the_plug_in(
    serve: Serve, scratch: Path, llava_folder: Path, asked: list[Case], expected: dict[str, Outcome]
) -> None:
    server = serve(llava_folder, *TRUSTED)
    levels = ",".join(map(str, LEVELS))
    with through_a_controller(scratch, "sglang_worker", "--backend", server.url, "--granularities", levels) as url:
        check_services(url, asked, expected)
        image = next(case for case in asked if case.routing == RoutingRequest() and case.name.isdigit())
        messages = body_of(image)["messages"]
        spent = {}
        for detail in ("low", "high"):
            messages[-1]["content"][0]["image_url"]["detail"] = detail
            spent[detail] = ask(url, image, messages=messages).json()["usage"]["visual_tokens"]
        fixed = {level: ask(url, image, granularity=level).json()["usage"]["visual_tokens"] for level in (LEVELS[0], LEVELS[-1])}
        assert list(spent.values()) == list(fixed.values()) and 0 < spent["low"] < spent["high"]


def test_a_worker_with_a_vllm_at_an_address(
    serve: Serve, scratch: Path, llava_folder: Path, asked: list[Case], expected: dict[str, Outcome]
) -> None:
    server = serve(llava_folder, *EMBEDDING_ONLY)
    flags = ("--engine", "vllm", "--vllm", server.url, "--model-path", str(llava_folder), "--device", "cpu")
    with through_a_controller(scratch, "model_worker", *flags) as url:
        check_services(url, asked, expected)
