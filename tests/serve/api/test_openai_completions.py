"""Text completions: finished prompts, LLaVA's images in them, OpenAI's older form of scores; and the SDK against it."""

from __future__ import annotations

import json

import openai
import pytest

from llava.messages import RoutingRequest
from llava.serve.api.openai_completions import CompletionWriter, read_completion
from llava.serve.api.parsed_request import ImageSource, ParsedRequest
from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.errors import FieldError
from llava.serve.protocol import Finished, Limits, Sampling, TokenScore
from tests.serve.bodies import picture
from tests.serve.fake_engine import CARD, FakeEngine
from tests.serve.running import RunningApp

LIMITS = Limits(max_prompt_characters=60, max_new_tokens=600, max_n=4)


def read(**fields):
    return read_completion({"model": "fake", "prompt": "a b", **fields}, CARD, LIMITS)


def test_a_prompt_is_continued_as_it_stands():
    call = read()
    assert (call.prompts, call.turns, call.sources, call.n, call.stream) == (("a b",), (), (), 1, False)
    assert call.sampling == Sampling(max_new_tokens=16) and call.routing == RoutingRequest()
    [request] = call.requests("id", ())
    assert (request.prompt, request.messages, request.request_id) == ("a b", (), "id")


def test_each_of_several_prompts_gets_its_answers_in_a_row():
    requests = read(prompt=["a", "b"], n=2, seed=5).requests("id", ())
    assert [(request.prompt, request.sampling.seed) for request in requests] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert [request.request_id for request in requests] == ["id.0", "id.1", "id.2", "id.3"]


def test_images_stand_at_their_places():
    call = read(prompt="USER: <image>\nwhat? ASSISTANT:", images=["AAAA"], granularity=[36, 144], max_visual_tokens=99)
    assert call.sources == (ImageSource("AAAA", "images[0]", plain_base64=True),)
    assert call.routing == RoutingRequest((36, 144), 99)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"suffix": "x"}, "suffix", "not supported here"),
        ({"echo": True}, "echo", "not supported here"),
        ({"best_of": 2}, "best_of", "not supported here"),
        ({"messages": []}, "messages", "is unknown"),
        ({"prompt": [1, 2]}, "prompt[0]", "valid string"),
        ({"prompt": 5}, "prompt", "expected a text, or a list of texts"),
        ({"prompt": []}, "prompt", "expected a text, or a list of texts"),
        ({"prompt": "x" * 61}, "prompt", "61 characters"),
        ({"prompt": ["x" * 40] * 2}, "prompt", "80 characters"),
        ({"prompt": ["a"] * 3, "n": 2}, "prompt", "3 prompts with 2 answers each, expected at most 4"),
        ({"n": 5}, "n", "expected at most 4"),
        ({"prompt": ["<image>", "b"], "images": ["AAAA"]}, "images", "by itself"),
        ({"prompt": "<image>"}, "images", "make them agree"),
        ({"images": ["AAAA"]}, "images", "make them agree"),
        ({"prompt": "<image>" * 9, "images": ["A"] * 9}, "images", "9 images"),
        ({"logprobs": 21}, "logprobs", "expected at most 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"max_tokens": 601}, "max_tokens", "expected at most 600"),
        ({"stream_options": {}}, "stream_options", "set both or neither"),
        ({"granularity": 37}, "granularity", "not among"),
        ({"top_k": -2}, "top_k", "greater than or equal"),
    ],
)
def test_refused_by_the_name_of_the_field(fields, param, told):
    with pytest.raises(FieldError, match=told) as refused:
        read(**fields)
    assert refused.value.param == param


def test_scores_tell_where_each_tokens_text_begins_also_across_chunks():
    writer = CompletionWriter("id", "m", ParsedRequest(prompts=("p",), sampling=Sampling(logprobs=1), n=2))
    one, other = TokenScore(" a", -0.5, (("b", float("-inf")),)), TokenScore("é", -1.0)
    first = json.loads(writer.on_text(1, " aé", (one, other))[6:])["choices"][0]["logprobs"]
    assert first == {
        "tokens": [" a", "é"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{"b": -9999.0}, {}], "text_offset": [0, 2],
    }  # fmt: skip
    assert json.loads(writer.on_text(1, "é", (other,))[6:])["choices"][0]["logprobs"]["text_offset"] == [3]
    assert json.loads(writer.on_text(0, "é", (other,))[6:])["choices"][0]["logprobs"]["text_offset"] == [0]


def test_offsets_are_those_of_the_text_that_is_told():
    """The engine's text begins with its first word, and has half characters only as whole ones."""
    text, scores = "Yés", [TokenScore(part, -1.0) for part in ("\n", " Y", "\udcc3", "\udca9", "s")]
    call = ParsedRequest(prompts=("p",), sampling=Sampling(logprobs=0))
    whole = CompletionWriter("id", "m", call).completion([(text, scores, Finished("stop", 1, 5, (), {}))])
    offsets = [0, 0, 1, 1, 2]
    assert whole["choices"][0]["logprobs"]["text_offset"] == offsets and text[offsets[-1] :] == "s"
    writer, told = CompletionWriter("id", "m", call), []
    for piece, own in (("Y", []), ("", scores[:2]), ("é", scores[2:4]), ("s", scores[4:])):
        logprobs = json.loads(writer.on_text(0, piece, own)[6:])["choices"][0]["logprobs"]
        told += logprobs["text_offset"] if own else []
        assert (logprobs is None) == (not own)
    assert told == offsets


def test_usage_counts_each_prompt_once():
    call = ParsedRequest(prompts=("p", "q"), n=2, stream=True, include_usage=True)
    endings = {index: Finished("stop", 10 * (1 + index // 2), 3, (), {"total": 1.0}) for index in (3, 1, 0, 2)}
    [usage, done] = CompletionWriter("id", "m", call).on_all_finished(endings).decode().split("\n\n")[:2]
    assert json.loads(usage[6:])["usage"]["prompt_tokens"] == 30 and json.loads(usage[6:])["usage"]["completion_tokens"] == 12
    assert done == "data: [DONE]"


@pytest.fixture(scope="module")
def running():
    engine = FakeEngine()
    with RunningApp(create_worker_app(engine)) as served:
        served.engine = engine
        yield served


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_sdk_gets_and_streams_a_completion(client):
    asked = {"model": "fake", "prompt": "USER: <image>\nwhat is it? ASSISTANT:", "extra_body": {"images": [picture()], "granularity": 36}}
    answer = client.completions.create(**asked, logprobs=1)
    text = "USER: <image> what is it? ASSISTANT: [30x20]"
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == ("text_completion", text, "stop")
    assert answer.choices[0].logprobs.tokens[0] == "USER: " and answer.choices[0].logprobs.text_offset[:2] == [0, 6]
    assert answer.usage.granularities == [36] and answer.id.startswith("cmpl-")
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_the_sdk_gets_several_answers_to_several_prompts(client):
    answer = client.completions.create(model="fake", prompt=["one", "two"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one "), (1, "one "), (2, "two "), (3, "two ")]
    assert answer.usage.prompt_tokens == 20
    chunks = list(client.completions.create(model="fake", prompt=["one", "two"], stream=True))
    assert {chunk.choices[0].index for chunk in chunks if chunk.choices[0].text == "two "} == {1}


def test_an_image_that_cannot_be_used_is_named(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="<image><image>", extra_body={"images": [picture(), "AAAA"]})
    assert (refused.value.code, refused.value.param) == ("invalid_image", "images[1]")
