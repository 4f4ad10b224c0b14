"""Requests that nobody should send: each gets a clear 400 in time, and the server answers the next one as before."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from llava.openai_chat import data_url
from tests.vllm.cases import QUESTIONS, Case, Outcome, ask
from tests.vllm.conftest import EMBEDDING_ONLY, TRUSTED
from tests.vllm.server import NAME, VllmServer

pytestmark = pytest.mark.slow
PICTURE = data_url(Image.open(QUESTIONS.parent / "images" / "000.png").convert("RGB"))
WIDTH = 192
"""Of the model's embeddings."""


@pytest.fixture
def server(serve: Callable[..., VllmServer], llava_folder: Path) -> VllmServer:
    return serve(llava_folder, *TRUSTED)


@pytest.fixture(autouse=True)
def _the_server_lives_on(request: pytest.FixtureRequest, cases: list[Case], expected: dict[str, Outcome]) -> Iterator[None]:
    server = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if server is not None:
        assert ask(server, cases[0]) == expected[cases[0].name]


def user(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    """A user's message; texts are parts too."""
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}]


def image(url: str | None = PICTURE, **fields: Any) -> dict[str, Any]:
    """A part with an image."""
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **fields}


def refused(response: httpx.Response, *words: str) -> None:
    """A 400 whose message has these words, and no traceback."""
    assert response.status_code == 400, f"{response.status_code}: {response.text[:300]}"
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert "Traceback" not in message and "/site-packages/" not in message and len(message) < 2000, message


# ---- wishes ------------------------------------------------------------------------------------------------------------------

LEVEL, BUDGET, BIAS = "vis_token_granularity", "max_visual_tokens", "granularity_bias"


@pytest.mark.parametrize(
    ("wishes", "word"),
    [
        ({"granularity": 16}, LEVEL),
        ({LEVEL: 16, "images_kwargs": {"size": 4}}, LEVEL),
        ({"x" * 1000: 1}, LEVEL),
        ({f"x{number}": number for number in range(10_000)}, LEVEL),
        ({LEVEL: 5}, LEVEL),
        ({LEVEL: [4, 5]}, LEVEL),
        ({LEVEL: []}, LEVEL),
        ({LEVEL: list(range(1, 10_000))}, LEVEL),
        ({LEVEL: "finest"}, LEVEL),
        ({LEVEL: "x" * 10**6}, LEVEL),
        ({LEVEL: True}, LEVEL),
        ({LEVEL: 16.0}, LEVEL),
        ({LEVEL: -16}, LEVEL),
        ({LEVEL: {"a": 1}}, LEVEL),
        ({LEVEL: 10**30}, LEVEL),
        ({LEVEL: 4, BUDGET: 0}, BUDGET),
        ({BUDGET: -1}, BUDGET),
        ({BUDGET: 1}, BUDGET),
        ({BUDGET: "100"}, BUDGET),
        ({BUDGET: True}, BUDGET),
        ({BUDGET: 10**30}, BUDGET),
        ({BIAS: "much"}, BIAS),
        ({BIAS: [1]}, BIAS),
        ({BIAS: 1e300}, BIAS),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wishes_that_no_model_grants(server: VllmServer, wishes: dict[str, Any], word: str) -> None:
    refused(server.chat(user(image(), "Which shape?"), mm_processor_kwargs=wishes), word)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_bias_that_is_no_number(server: VllmServer, value: str) -> None:
    body = {"model": NAME, "messages": user(image(), "Which shape?"), "mm_processor_kwargs": {BIAS: "VALUE"}}
    text = json.dumps(body).replace('"VALUE"', value)
    response = httpx.post(f"{server.url}/v1/chat/completions", content=text, headers={"content-type": "application/json"}, timeout=60)
    assert response.status_code in (400, 422), response.text[:300]


def test_wishes_are_judged_without_an_image_too(server: VllmServer) -> None:
    refused(server.chat(user("Hello"), mm_processor_kwargs={"x": 1}), LEVEL)


# ---- prompts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<image>", "a <image> b <image>", "<image-placeholder>", "<image>\n" * 5000], ids=lambda text: text[:30])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_text_that_spells_a_placeholder(server: VllmServer, text: str, images: int) -> None:
    refused(server.chat(user(*[image()] * images, text)), "<image>")


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_an_image_of_another_role(server: VllmServer, role: str) -> None:
    refused(server.chat([*user("Hello"), {**user(image())[0], "role": role}, *user("And?")]), "image")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"chat_template": "{{ messages }}"}, "emplate"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "emplate"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tool"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "continue_final_message"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_prompts_of_another_kind(server: VllmServer, fields: dict[str, Any], word: str) -> None:
    refused(server.chat(user(image(), "Hi"), **fields), word)


def test_nothing_to_answer(server: VllmServer) -> None:
    refused(server.chat([{"role": "assistant", "content": "Hi"}]), "user")
    refused(server.chat([{"role": "tool", "content": "Hi", "tool_call_id": "1"}]), "tool")


@pytest.mark.parametrize("prompt", ["USER: <image>\nHi ASSISTANT:", [1, 640, 5], [[1, 640, 640]], [1, 10**6], [1, -200, 5]], ids=str)
def test_completions_with_image_tokens_but_no_image(server: VllmServer, prompt: Any) -> None:
    refused(server.post("/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 4}))


def test_logprobs_of_a_prompt_with_an_image(server: VllmServer) -> None:
    """vLLM looks the prompt's ids up in the logits, where every id, the image's included, has to have a place."""
    response = server.chat(user(image(), "Which shape?"), prompt_logprobs=2, logprobs=True, top_logprobs=2)
    assert response.status_code == 200, response.text[:500]


def test_penalties_over_a_prompt_with_an_image(server: VllmServer) -> None:
    fields = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    assert server.chat(user(image(), "Which shape?"), **fields).status_code == 200


def test_the_image_token_is_no_answer(server: VllmServer) -> None:
    fields = {"logit_bias": {"640": 100}, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    answer = server.chat(user(image(), "Which shape?"), **fields).json()
    assert 640 not in answer["choices"][0]["token_ids"]


# ---- images ------------------------------------------------------------------------------------------------------------------


def test_an_image_by_its_uuid_alone(server: VllmServer) -> None:
    assert server.chat(user(image(uuid="mine"), "Which shape?")).status_code == 200
    refused(server.chat(user(image(None, uuid="mine"), "Which shape?")), "uuid")
    refused(server.chat(user(image(), image(None, uuid="mine"), "Which shape?")), "pixels")


def test_a_uuid_does_not_hide_the_granularity(server: VllmServer) -> None:
    """Levels are told apart whatever a client calls the image."""
    lengths = []
    for level in (4, 64, 4):
        answer = server.chat(user(image(uuid="same"), "Which shape?"), mm_processor_kwargs={LEVEL: level}).json()
        lengths.append(answer["usage"]["prompt_tokens"])
    assert lengths[0] == lengths[2] < lengths[1]


def test_a_uuid_does_not_hide_the_image(server: VllmServer) -> None:
    """An image is told from others by its pixels, whatever a client calls it, so that nobody gets answers about another's image."""
    wide = data_url(Image.new("RGB", (300, 40), "red"))

    def asked(url: str, **fields: Any) -> tuple[list[int], int]:
        body = server.chat(user(image(url, **fields), "What is the background colour?")).json()
        return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens"]

    unnamed = [asked(url) for url in (PICTURE, wide)]
    assert unnamed[0] != unnamed[1] and [asked(url, uuid="one name") for url in (PICTURE, wide)] == unnamed


def _bomb(side: int) -> bytes:
    """A small PNG file that says it has side x side pixels, all of them there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" * (side // 8 + 1)) for _ in range(side)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _file(name: str) -> bytes:
    picture = Image.new("RGB", (200, 200), "red")
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    thin = BytesIO()
    Image.new("RGB", (1, 60_000)).save(thin, "PNG")
    return {
        "bomb": lambda: _bomb(40_000),
        "truncated": lambda: buffer.getvalue()[:200],
        "nothing": lambda: b"",
        "text": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "too thin": thin.getvalue,
    }[name]()


@pytest.mark.parametrize("name", ["bomb", "truncated", "nothing", "text", "too thin"])
def test_files_that_are_no_images(server: VllmServer, name: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(_file(name)).decode()
    refused(server.chat(user(image(url), "Which shape?")))


@pytest.mark.parametrize("url", ["data:image/png;base64,!!!", "data:,", "file:///etc/passwd", "nowhere", "http://127.0.0.1:9/x.png"])
def test_addresses_that_lead_nowhere(server: VllmServer, url: str) -> None:
    response = server.chat(user(image(url), "Which shape?"))
    assert 400 <= response.status_code < 600 and "root:" not in response.text
    assert server.is_well()


# ---- embeddings --------------------------------------------------------------------------------------------------------------


def _rows(kind: str) -> Any:
    rows = torch.zeros(24, WIDTH)
    not_finite = {"NaN": float("nan"), "infinite": float("inf")}
    if kind in not_finite:
        rows[3, 5] = not_finite[kind]
    return {
        "wider": torch.zeros(24, WIDTH + 1),
        "a vector": torch.zeros(WIDTH),
        "four axes": torch.zeros(1, 1, 24, WIDTH),
        "whole numbers": torch.zeros(24, WIDTH, dtype=torch.int64),
        "no rows": torch.zeros(0, WIDTH),
        "longer than the context": torch.zeros(5000, WIDTH),
        "no tensor": {"rows": [1, 2]},
    }.get(kind, rows)


def _embeds(value: Any) -> dict[str, Any]:
    buffer = BytesIO()
    torch.save(value, buffer)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}


KINDS = ["NaN", "infinite", "wider", "a vector", "four axes", "whole numbers", "no rows", "longer than the context", "no tensor"]


def test_a_server_with_a_tower_takes_no_embeddings(server: VllmServer) -> None:
    refused(server.chat(user(_embeds(torch.zeros(24, WIDTH)), "Which shape?")), "enable-mm-embeds")


def test_embeddings(serve: Callable[..., VllmServer], llava_folder: Path) -> None:
    """All in one: the server that takes them is another one."""
    only = serve(llava_folder, *EMBEDDING_ONLY, "--trust-request-mm-kwargs")
    good = user(_embeds(torch.zeros(24, WIDTH)), "Which shape?")
    before = only.chat(good).json()
    assert before["usage"]["prompt_tokens"] > 24
    statuses = {kind: only.chat(user(_embeds(_rows(kind)), "Which shape?")).status_code for kind in KINDS}
    statuses["cut"] = only.chat(user({"type": "image_embeds", "image_embeds": "AAAA"}, "Hi")).status_code
    statuses["pixels"] = only.chat(user(image(), "Hi")).status_code
    statuses["wishes"] = only.chat(good, mm_processor_kwargs={LEVEL: 4}).status_code
    assert statuses == dict.fromkeys(statuses, 400)
    assert only.chat(good).json()["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]


def test_a_server_that_trusts_nobody_takes_no_wishes(serve: Callable[..., VllmServer], llava_folder: Path) -> None:
    refused(serve(llava_folder, "--enforce-eager").chat(user(image(), "Hi"), mm_processor_kwargs={LEVEL: 4}), "--trust-request-mm-kwargs")
