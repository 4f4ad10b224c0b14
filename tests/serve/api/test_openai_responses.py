"""The Responses API: what of it is taken, what is refused by name, and OpenAI's own client against it."""

from __future__ import annotations

import json

import openai
import pytest

from llava.messages import Message, RoutingRequest
from llava.serve.api.openai_responses import ResponseWriter, read_response
from llava.serve.api.parsed_request import ImageSource, ParsedRequest
from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, Limits, Sampling, ServeError
from tests.serve.bodies import data_url, picture
from tests.serve.fake_engine import CARD, FakeEngine
from tests.serve.running import RunningApp

LIMITS = Limits(max_messages=6, max_prompt_characters=200, max_new_tokens=600)


def read(**fields):
    return read_response({"model": "fake", "input": "what?", **fields}, CARD, LIMITS)


def turn(*parts, role="user"):
    return {"role": role, "content": [{"type": "input_text", "text": part} if isinstance(part, str) else part for part in parts]}


def image(url="data:a", **fields):
    return {"type": "input_image", "image_url": url, **fields}


def test_a_text_is_a_users_turn():
    call = read()
    assert call.turns == (Message("user", "what?"),) and call.sampling == Sampling() and (call.n, call.stream) == (1, False)
    call = read(instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9, stream=True, user="me", metadata={"a": "b"})
    assert call.turns == (Message("system", "Be brief."), Message("user", "what?"))
    assert (call.sampling.max_new_tokens, call.sampling.temperature, call.sampling.top_p) == (9, 0.5, 0.9)
    assert call.stream and call.user == "me" and call.repeated["metadata"] == {"a": "b"}


def test_items_are_turns_and_answers_come_back_as_they_came():
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "no", "annotations": [], "logprobs": [], "parsed": {"a": 1}}],
    }  # fmt: skip
    call = read(input=[turn("first?", image(detail="low")), answer, {"type": "message", **turn(image("data:b", detail="auto"), "why")}])
    assert [(each.role, each.text) for each in call.turns] == [("user", "<image>\nfirst?"), ("assistant", "no"), ("user", "<image>\nwhy")]
    assert call.sources == (
        ImageSource("data:a", "input[0].content[1].image_url", "low"), ImageSource("data:b", "input[2].content[0].image_url"),
    )  # fmt: skip
    assert call.routing == RoutingRequest(details=("low", None))


def test_what_clients_send_by_default_is_accepted():
    neutral = {
        "store": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "previous_response_id": None, "background": False,
        "truncation": "disabled", "text": {"format": {"type": "text"}, "verbosity": "medium"}, "include": [], "service_tier": "auto",
        "reasoning": {}, "conversation": None, "prompt_cache_key": "x", "safety_identifier": "y", "stream_options": None, "top_logprobs": 0,
    }  # fmt: skip
    assert read(**neutral).sampling == Sampling()
    written = ResponseWriter("id", "m", ParsedRequest())._response("completed", [])
    for reasoning in ({"effort": None}, {"effort": "none"}, written["reasoning"]):
        assert read(reasoning=reasoning) == read()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 601}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": []}, "input"),
        ({"input": " "}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].type"),
        ({"input": [turn({"type": "input_file"})]}, "input[0].content[0]"),
        ({"input": [turn("a", {"type": "input_image", "file_id": "f", "image_url": "data:a"})]}, "input[0].content[1].file_id"),
        ({"input": [turn("a", image(detail="fine"))]}, "input[0].content[1].detail"),
        ({"input": [turn({"type": "input_text", "text": 5})]}, "input[0].content[0].text"),
        ({"input": [turn(image(), role="assistant")]}, "input[0].content"),
        ({"input": [turn("look: <image>")]}, "input[0].content"),
        ({"instructions": "<image>"}, "instructions"),
        ({"input": [turn("x")] * 7}, "input"),
        ({"input": "x" * 201}, "input"),
    ],
)
def test_refused_by_the_name_of_the_field(fields, param):
    with pytest.raises(FieldError) as refused:
        read(**fields)
    assert refused.value.param == param
    assert "ChatMessage" not in refused.value.detail and "Input" not in refused.value.detail.replace("Input should", "")


def test_an_error_event_is_read_by_clients_of_either_form():
    event, data, *_ = ResponseWriter("id", "m", ParsedRequest()).on_error(ServeError(ErrorKind.NOT_FINITE), "id").decode().split("\n")
    fields = json.loads(data.removeprefix("data: "))
    assert event == "event: error" and fields["type"] == "error" and fields["sequence_number"] == 0
    assert fields["code"] == fields["error"]["code"] == "non_finite_logits" and fields["message"] == fields["error"]["message"]


@pytest.fixture(scope="module")
def running():
    engine = FakeEngine()
    with RunningApp(create_worker_app(engine)) as served:
        served.engine = engine
        yield served


@pytest.fixture
def client(running):
    running.engine.failure = running.engine.fail_after = None
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_sdk_gets_a_response(client):
    asked = [turn("what is this", image(data_url(picture()), detail="auto"))]
    answer = client.responses.create(model="fake", input=asked, instructions="Be brief.", extra_body={"granularity": 36})
    assert answer.output_text == "<image> what is this [30x20]" and answer.status == "completed" and answer.id.startswith("resp_")
    assert answer.usage.input_tokens == 58 and answer.usage.output_tokens == 5 and answer.usage.visual_tokens == 48
    assert answer.instructions == "Be brief." and answer.error is None and answer.avg_llava["images"][0]["granularity"] == 36
    assert answer.output[0].content[0].type == "output_text" and answer.output[0].role == "assistant"


def test_the_sdk_goes_on_with_a_conversation(client):
    first = client.responses.create(model="fake", input="what is this")
    asked = [turn("what is this"), *(item.to_dict() for item in first.output), turn("and that")]
    assert client.responses.create(model="fake", input=asked).output_text == "and that "


def test_a_response_that_is_cut_off_is_incomplete(client):
    answer = client.responses.create(model="fake", input="one two three", max_output_tokens=2, top_logprobs=1)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    scores = answer.output[0].content[0].logprobs
    assert [score.token for score in scores] == ["one ", "two "] and len(scores[0].top_logprobs) == 1


def test_the_sdk_streams_typed_events(client):
    events = list(client.responses.create(model="fake", input="one two", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    ends = ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert kinds[-4:] == ends
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == events[-1].response.output_text == "one two "
    assert events[0].response.status == "in_progress" and events[-1].response.usage.output_tokens == 2
    with client.responses.stream(model="fake", input="one two") as stream:
        assert stream.get_final_response().output_text == "one two "


def test_the_sdk_reads_errors_before_and_within_a_stream(client, running):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="fake", input=[turn("what?", image("data:image/png;base64,AAAA"))], stream=True)
    assert (refused.value.code, refused.value.param) == ("invalid_image", "input[0].content[1].image_url")
    running.engine.failure, running.engine.fail_after = ServeError(ErrorKind.NOT_FINITE), 1
    with pytest.raises(openai.APIError) as failed:
        list(client.responses.create(model="fake", input="one two", stream=True))
    assert failed.value.code == "non_finite_logits"
