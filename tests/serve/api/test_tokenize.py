"""`/tokenize`, `/detokenize` and what routers ask of a server, over the made-up engine and over the micro model."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from llava.inference import Assistant
from llava.messages import Message, RoutingRequest
from llava.serve.api.worker_app import create_worker_app
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.engine.prepare import Preparer
from llava.serve.protocol import GenerationRequest, Limits, ServeError
from tests.serve.api.test_worker_app import call
from tests.serve.bodies import chat_body, data_url, picture
from tests.serve.fake_engine import FakeEngine

LIMITS = Limits(max_prompt_characters=100)


def post(path, **body):
    return call(create_worker_app(FakeEngine(), LIMITS), "POST", path, json=body)


def test_a_prompt_becomes_tokens_and_text_again():
    told = post("/tokenize", prompt="ab").json()
    assert told == {"count": 3, "max_model_len": 4096, "tokens": [1, 97, 98], "token_strs": None}
    told = post("/tokenize", model="fake", prompt="ab", add_special_tokens=False, return_token_strs=True).json()
    assert (told["tokens"], told["token_strs"]) == ([97, 98], ["a", "b"])
    assert post("/detokenize", tokens=[97, 98]).json() == {"prompt": "ab"}
    assert post("/detokenize", model="fake", tokens=[]).json() == {"prompt": ""}


def test_messages_count_with_their_images():
    body = chat_body("ab", (data_url(picture()),))
    told = post("/tokenize", messages=body["messages"], add_generation_prompt=True).json()
    assert told["tokens"] == [1, -200, 10, 97, 98] and told["visual_tokens"] == [{"least": 48, "most": 600}]
    assert told["count"] == 4 + 600
    told = post("/tokenize", prompt="<image>\nab", images=[picture()], granularity=36).json()
    assert told["tokens"] == [1, -200, 10, 97, 98] and told["visual_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": chat_body()["messages"]}, "prompt"),
        ("/tokenize", {"prompt": "a" * 101}, "prompt"),
        ("/tokenize", {"prompt": "<image>"}, "images"),
        ("/tokenize", {"messages": chat_body()["messages"], "images": ["AAAA"]}, "images"),
        ("/tokenize", {"messages": chat_body()["messages"], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "<image>", "images": ["AAAA"]}, "images[0]"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 101}, "tokens"),
    ],
)
def test_refused_by_the_name_of_the_field(path, body, param):
    response = post(path, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_another_model_is_not_found():
    assert post("/tokenize", model="other", prompt="a").status_code == post("/detokenize", model="other", tokens=[]).status_code == 404


def test_routers_are_told_the_models_name_and_no_path():
    app = create_worker_app(FakeEngine(), concurrency=5)
    server, model = call(app, "GET", "/server_info").json(), call(app, "GET", "/model_info").json()
    assert (server["served_model_name"], server["dp_size"], server["max_running_requests"]) == ("fake", 1, 5)
    assert (model["model_path"], model["is_generation"], model["has_image_understanding"]) == ("fake", True, True)
    assert "/" not in str(server) + str(model)
    assert call(app, "GET", "/get_server_info").json() == server and call(app, "GET", "/get_model_info").json() == model


# ---- the micro model ---------------------------------------------------------------------------------------------------------

RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture
def preparer(micro):
    return Preparer(micro, TensorCache(10**6), "micro", longest_row=40)


def test_tokens_are_those_that_the_model_reads(micro, preparer):
    turns = (Message("user", "What is it?"),)
    image = preparer.prepare_image(RED)
    asked = GenerationRequest("r", turns, images=(image,))
    found = preparer.tokens(asked, special=True)
    assert list(found.ids) == micro.prompt_ids(turns, 1).tolist() and found.ids.count(-200) == 1
    assert found.texts[found.ids.index(-200)] == "<image>" and len(found.texts) == len(found.ids)
    [(least, most)] = found.visual_tokens
    costs = micro.answer([RED], "What is it?").reports[0].tokens_per_level
    assert (least, most) == (min(costs.values()), max(costs.values()))
    for wish, level in ((RoutingRequest(8), 8), (RoutingRequest(details=("low",)), 4), (RoutingRequest([8, 16], details=("high",)), 16)):
        known = preparer.tokens(GenerationRequest("r", turns, images=(image,), routing=wish), special=True)
        assert known.visual_tokens == ((costs[level], costs[level]),)
        assert known.most_positions == len(found.ids) - 1 + costs[level]


def test_a_prompt_of_any_length_is_counted(micro, preparer):
    words = GenerationRequest("r", prompt="word " * 600)
    assert preparer.tokens(words, special=True).most_positions > 600
    with pytest.raises(ServeError):
        preparer.prepare(words)


def test_text_comes_back_with_its_special_tokens_and_images(micro, preparer):
    prompt = "USER: <image>\nWhat? ASSISTANT: red</s>"
    found = preparer.tokens(GenerationRequest("r", prompt=prompt, images=(preparer.prepare_image(RED),)), special=False)
    assert found.ids[0] != micro.tokenizer.bos_token_id
    assert preparer.text_of(found.ids) == prompt
    for bad in (-1, len(micro.tokenizer), 2**70):
        with pytest.raises(ServeError) as caught:
            preparer.text_of([1, bad])
        assert caught.value.param == "tokens[1]"


def test_the_engine_tells_tokens_while_it_answers_nothing(micro):
    async def ask():
        engine = EmbeddedEngine(micro, "micro")
        try:
            found = await engine.tokenize(GenerationRequest("r", prompt="What?"))
            return found, await engine.detokenize(found.ids[1:])
        finally:
            await engine.close()

    found, text = asyncio.run(ask())
    assert found.ids[0] == micro.tokenizer.bos_token_id and text == "What?"
