"""What the chat API takes, what it refuses and how it answers; and OpenAI's own client against it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import openai
import pytest

from llava.inference import Message
from llava.messages import RoutingRequest
from llava.serve.api.answer_fields import score_fields
from llava.serve.api.openai_chat import ChatWriter, read_chat, server_sent
from llava.serve.api.parsed_request import ImageSource, ParsedRequest
from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, Finished, ImageReport, Limits, Sampling, ServeError, Started, TokenScore
from tests.serve.bodies import chat_body, data_url, picture
from tests.serve.fake_engine import CARD, FakeEngine
from tests.serve.running import RunningApp

LIMITS = Limits(max_messages=6, max_prompt_characters=200, max_new_tokens=600, max_stop=2, max_stop_characters=5, max_n=3)


USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}


def read(card=CARD, **fields):
    return read_chat(chat_body(**fields), card, LIMITS)


def test_a_plain_question_is_greedy_and_lets_the_model_choose():
    call = read()
    assert call.turns == (Message("user", "what is this"),)
    assert call.sampling == Sampling() and call.routing == RoutingRequest()
    assert (call.n, call.stream, call.include_usage, call.sources) == (1, False, False, ())


def test_parts_become_text_with_a_placeholder_where_each_image_stands():
    body = chat_body("first?", ("data:a", "data:b"))
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "data:c", "detail": "auto"}})
    body["messages"] += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
    body["messages"].insert(0, {"role": "developer", "content": "be brief"})
    call = read_chat(body, CARD, LIMITS)
    assert [turn.role for turn in call.turns] == ["system", "user", "assistant", "user"]
    assert call.turns[1].text == "<image>\n<image>\nfirst?\n<image>"
    assert call.sources == (
        ImageSource("data:a", "messages[1].content[0].image_url.url"),
        ImageSource("data:b", "messages[1].content[1].image_url.url"),
        ImageSource("data:c", "messages[1].content[3].image_url.url"),
    )


def test_images_behind_the_words_are_read_as_those_in_front_of_them():
    image = [{"type": "image_url", "image_url": {"url": f"data:{name}"}} for name in "ab"]
    words = [{"type": "text", "text": text} for text in ("which", "one?", " \n", "")]
    first = read(messages=[{"role": "user", "content": [*image, *words[:2]]}])
    for parts in ([*words, *image], [words[0], words[1], image[0], words[2], image[1]], [words[3], *image, *words]):
        call = read(messages=[{"role": "user", "content": parts}])
        assert call.turns == first.turns and [source.text for source in call.sources] == [source.text for source in first.sources]
    between = read(messages=[{"role": "user", "content": [words[0], image[0], words[1], image[1]]}])
    assert between.turns[0].text == "which\n<image>\none?\n<image>"


NOTHING = ("", " \n", None, [], [{"type": "text", "text": ""}])


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
def test_turns_without_words_are_left_out(nothing):
    empty = [{"role": role, "content": nothing} for role in ("system", "user", "assistant")]
    call = read(messages=[empty[0], USER, empty[1], ASSISTANT, empty[2], USER])
    assert call.turns == (Message("user", "x"), Message("assistant", "x"), Message("user", "x"))


def test_turns_in_any_order_are_read_as_a_template_can_write_them():
    image = {"type": "image_url", "image_url": {"url": "data:a"}}
    system = [{"role": role, "content": role} for role in ("developer", "system")]
    greeted = read(messages=[ASSISTANT, {"role": "user", "content": [{"type": "text", "text": "look"}, image]}, USER, system[1], ASSISTANT])
    assert [turn.role for turn in greeted.turns] == ["assistant", "user", "assistant"]
    assert greeted.turns[1].text == "<image>\nlook\nx\nsystem"
    assert read(messages=[*system, USER]).turns == (Message("system", "developer\nsystem"), Message("user", "x"))
    assert read(messages=[{"role": "user", "content": [image]}]).turns == (Message("user", "<image>"),)


def test_every_field_arrives():
    call = read(
        temperature=0.5, top_p=0.9, max_tokens=7, min_tokens=4, seed=3, stop=["a", "b"], logprobs=True, top_logprobs=2, n=2, stream=True,
        stream_options={"include_usage": True}, granularity=[36, 144], max_visual_tokens=100, granularity_bias=-0.5, user="me",
        top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=2, logit_bias={"7": -100, "0": 1.5, "2": 0},
        stop_token_ids=[4, 9, 4], ignore_eos=True,
    )  # fmt: skip
    assert call.sampling == Sampling(
        0.5, 0.9, 7, 4, 3, ("a", "b"), 2, 5, 0.1, 1.1, -0.5, 2, ((0, 1.5), (7, -100)), (4, 9), True
    )  # fmt: skip
    assert call.routing == RoutingRequest((36, 144), 100, -0.5)
    assert (call.n, call.stream, call.include_usage, call.user) == (2, True, True, "me")


def test_what_openais_clients_send_by_default_is_accepted():
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}, "tools": None, "n": None, "stop": None}
    assert read(**neutral).sampling == Sampling()
    assert read(tools=[], tool_choice="none", logit_bias={}, store=False).sampling == Sampling()
    assert read(top_k=-1, min_p=0, repetition_penalty=1, stop_token_ids=[], ignore_eos=False, min_tokens=0).sampling == Sampling()
    assert read(top_p=0, temperature=1.5).sampling == Sampling()  # greedy
    assert read(max_completion_tokens=9).sampling.max_new_tokens == 9
    assert read(stop="x").sampling.stop == ("x",)


def test_an_answer_can_be_sent_back_as_it_came():
    nothing = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    answer = {"role": "assistant", "content": "no", **nothing}
    body = chat_body("first?", ("data:a",))
    body["messages"] += [answer, {"role": "user", "name": "bob", "content": "why"}]
    body["messages"][0]["content"][0]["image_url"]["detail"] = "high"
    assert [turn.text for turn in read_chat(body, CARD, LIMITS).turns] == ["<image>\nfirst?", "no", "why"]


def test_an_error_in_a_part_is_named_by_its_path():
    part = {"type": "image_url", "image_url": {"url": "data:a", "detail": "fine"}}
    for wrong, param in (
        (part, "messages[0].content[0].image_url.detail"),
        ({"type": "text", "text": 5}, "messages[0].content[0].text"),
        ({"type": "text"}, "messages[0].content[0].text"),
        ({"type": "text", "text": "a", "image_url": 5}, "messages[0].content[0].image_url"),
        ({"type": "film"}, "messages[0].content[0]"),
    ):
        with pytest.raises(FieldError) as refused:
            read(messages=[{"role": "user", "content": [wrong]}])
        assert refused.value.param == param


def part_of_user(part):
    return {"messages": [{"role": "user", "content": [part]}]}


UNSUPPORTED = "this is not supported here; leave it out, or send "
NO_GRANULARITY = "'granularity': expected 'auto', a whole number, or a list of 1 to 64 whole numbers."
NO_PART = "'messages[0].content[0]': expected an object whose type is 'text' or 'image_url'."


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 10**9}, "max_tokens is 1000000000, expected at most 600."),
        ({"max_tokens": 601}, "max_tokens is 601, expected at most 600."),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens is 1000000000, expected at most 600."),
        ({"min_tokens": 10**9}, "min_tokens is 1000000000, expected at most the longest answer, 512."),
        ({"n": 5000}, "n is 5000, expected at most 3."),
        ({"logprobs": True, "top_logprobs": 5000}, "top_logprobs is 5000, expected at most 20."),
        ({"tools": [{}]}, f"'tools': {UNSUPPORTED}[]."),
        ({"tool_choice": "required"}, f"'tool_choice': {UNSUPPORTED}\"none\" or \"auto\"."),
        ({"store": True}, f"'store': {UNSUPPORTED}false."),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, f"'messages[0].tool_calls': {UNSUPPORTED}[]."),
        ({"messages": [{**USER, "audio": {"id": "a"}}]}, f"'messages[0].audio': {UNSUPPORTED}null."),
        ({"granularity": "16"}, NO_GRANULARITY),
        ({"granularity": []}, NO_GRANULARITY),
        ({"granularity": 1.5}, NO_GRANULARITY),
        ({"granularity": [36] * 65}, NO_GRANULARITY),
        ({"stop": 5}, "'stop': expected a text, or a short list of texts."),
        ({"messages": [{"role": "user", "content": 5}]}, "'messages[0].content': expected a text, or a list of up to 1024 parts."),
        ({"messages": [{"role": "user", "content": []}]}, "Turn 0 is empty; give a question."),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "There is no turn of the user's; give a question."),
        ({"messages": [{"role": "user"}]}, "'messages[0].content': this field is missing."),
        ({"messages": [5]}, "'messages[0]': expected an object."),
        ({"messages": [USER] * 5000}, "'messages': the list is too long."),
        (part_of_user({"type": "image_url", "image_url": "x"}), "'messages[0].content[0].image_url': expected an object."),
        (part_of_user({"type": "secret" * 1000}), NO_PART),
        (part_of_user({}), NO_PART),
        (part_of_user("x"), "'messages[0].content[0]': expected an object."),
        ({"chat_template": "x"}, f"'chat_template': {UNSUPPORTED}null."),
        ({"chat_templates": "x"}, "'chat_templates': this field is unknown."),
    ],
)
def test_a_refusal_says_what_is_taken_here_in_words_of_the_api(fields, told):
    with pytest.raises(FieldError) as refused:
        read(**fields)
    assert refused.value.detail == told


@pytest.mark.parametrize(
    ("granularity", "read_as"), [(None, None), ("auto", None), (36, 36), (576, 576), (9999, 9999), ([576, 36], (576, 36))]
)
def test_granularity(granularity, read_as):
    assert read(granularity=granularity).routing.granularity == read_as


def test_each_image_has_its_own_detail():
    def details(*given, **fields):
        parts = [{"type": "image_url", "image_url": {"url": "data:a", "detail": detail}} for detail in given]
        return read(messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}], **fields).routing

    assert details("low", "high", "original", "auto", None).details == ("low", "high", "high", None, None)
    assert details("auto", None) == RoutingRequest()
    assert details("low", granularity=[36, 144], max_visual_tokens=99) == RoutingRequest((36, 144), 99, 0.0, ("low",))


def test_choices_draw_from_seeds_of_their_own():
    requests = read(n=3, seed=2**63 - 1, temperature=1).requests("id", ())
    assert [request.sampling.seed for request in requests] == [2**63 - 1, 0, 1]
    assert [request.request_id for request in requests] == ["id.0", "id.1", "id.2"]
    assert [request.sampling.seed for request in read(n=2).requests("id", ())] == [None, None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"stream": "yes"}, "stream"),
        ({"n": 4}, "n"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 601}, "max_tokens"),
        ({"max_completion_tokens": 601}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "123456"}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias.1"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"one": 1}}, "logit_bias.one"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"tools": [{}]}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"granularity": 37}, "granularity"),
        ({"granularity": []}, "granularity"),
        ({"granularity": [36, 577]}, "granularity"),
        ({"granularity": "fine"}, "granularity"),
        ({"granularity": True}, "granularity"),
        ({"max_visual_tokens": 0}, "max_visual_tokens"),
        ({"granularity_bias": 1e9}, "granularity_bias"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT, USER, ASSISTANT, USER]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [USER, ASSISTANT, {"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 201}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "nickname": "b"}]}, "messages[0].nickname"),
        ({"messages": [{"role": "user", "content": "look: <image>"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "look: <image-placeholder>"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "x"}]},
                       {"role": "user", "content": "x"}]}, "messages[0].content"),
        ({"urls": ("data:x",) * 9}, "messages"),
    ],
)  # fmt: skip
def test_refused_by_the_name_of_the_field(fields, param):
    with pytest.raises(FieldError) as refused:
        read(**fields)
    assert refused.value.param == param
    assert refused.value.kind in (ErrorKind.INVALID_REQUEST, ErrorKind.CONTEXT_LENGTH)


@pytest.mark.parametrize("value", [None, 3, "x", [], [{}], {}, True])
def test_other_bodies_than_objects_are_refused(value):
    told = "is missing" if value == {} else "^'The body': expected an object.$"
    with pytest.raises(FieldError, match=told):
        read_chat(value, CARD, LIMITS)


def test_another_model_is_not_found():
    with pytest.raises(FieldError) as refused:
        read(model="gpt-4")
    assert refused.value.kind is ErrorKind.MODEL_NOT_FOUND


def test_a_model_without_choices_refuses_to_choose():
    plain = replace(CARD, granularities=(), has_router=False, takes_images=False)
    for fields in ({"granularity": 36}, {"max_visual_tokens": 5}, {"granularity_bias": 1.0}, {"urls": ("data:x",)}):
        with pytest.raises(FieldError):
            read(plain, **fields)
    assert read(plain, granularity="auto").routing == RoutingRequest()


def test_an_error_never_quotes_what_was_sent():
    with pytest.raises(FieldError) as refused:
        read(temperature="secret-text")
    assert "secret" not in refused.value.detail


def test_usage_adds_up_and_tells_what_was_saved():
    image = ImageReport(36, 48, 600, {36: 48, 576: 600})
    ending = Finished("stop", 60, 5, (image, image), {"total": 3.0})
    usage = ChatWriter("id", "m", ParsedRequest(n=2)).completion([("a", [], ending), ("b", [], ending)])["usage"]
    assert usage == {
        "prompt_tokens": 60, "completion_tokens": 10, "total_tokens": 70, "visual_tokens": 96, "full_visual_tokens": 1200,
        "granularities": [36, 36],
    }  # fmt: skip


@pytest.mark.parametrize("scored", [False, True])
def test_where_usage_ends_a_stream_the_other_chunks_say_that_theirs_is_to_come(scored):
    ending = Finished("stop", 60, 5, (), {"total": 3.0})
    for include, shown in ((True, [None]), (False, [])):
        writer = ChatWriter("id", "m", ParsedRequest(sampling=Sampling(logprobs=0 if scored else None), include_usage=include))
        chunks = [writer.on_started(0, Started(60, (), {})), writer.on_text(0, "a", ()), writer.on_finished(0, ending)]
        assert [[value for name, value in json.loads(chunk[6:]).items() if name == "usage"] for chunk in chunks] == [shown] * 3
        *usage, done = writer.on_all_finished({0: ending}).decode().split("\n\n")[:-1]
        assert [json.loads(chunk[6:])["usage"]["total_tokens"] for chunk in usage] == [65] * include and done == "data: [DONE]"


def test_scores_are_json_even_where_a_token_is_impossible():
    fields = score_fields([TokenScore("é", -math.inf, (("b", -1.0),))])
    assert fields["content"][0]["logprob"] == -9999.0
    assert fields["content"][0]["bytes"] == [195, 169]
    assert json.loads(server_sent(fields)[6:]) == fields


NASTY = ["", " ", "word ", 'say "no"', "back\\slash", "line\nline\r\ttab", "\0\x1f\x7f"]
NASTY += ["\ud83d", "a\udfffb", "é 中 😀", '"content":""', "</s>\u2028"]


@pytest.mark.parametrize("name", ["fake", 'a "content":"" \\ \ud800'])
def test_a_piece_is_written_as_any_other_chunk(name):
    writer = ChatWriter("id", name, ParsedRequest())
    for index in (0, 1, 0):
        for text in NASTY:
            choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            whole = server_sent({**writer.head, "object": "chat.completion.chunk", "choices": [choice]})
            assert writer.on_text(index, text, ()) == whole


@pytest.fixture(scope="module")
def running():
    engine = FakeEngine()
    app = create_worker_app(engine, Limits(max_new_tokens=600), api_keys=("key-1",))
    with RunningApp(app) as served:
        served.engine = engine
        yield served


@pytest.fixture
def client(running):
    running.engine.failure = running.engine.fail_after = None
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="key-1", max_retries=0) as made:
        yield made


def ask(client, text="what is this", urls=(), **fields):
    body = chat_body(text, urls)
    return client.chat.completions.create(model="fake", messages=body["messages"], **fields)


def test_the_sdk_asks_about_an_image(client):
    answer = ask(client, "what is this", (data_url(picture()),), extra_body={"granularity": 36, "max_visual_tokens": 64})
    assert answer.choices[0].message.content == "<image> what is this [30x20]"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 58 and answer.usage.visual_tokens == 48 and answer.usage.granularities == [36]
    image = answer.avg_llava["images"][0]
    assert image["tokens_per_level"] == {"36": 48, "144": 180, "576": 600} and len(image["probabilities"]) == 3
    assert answer.avg_llava["milliseconds"]["total"] == 15.5


def test_the_sdk_streams(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "what is this "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 13


def test_the_sdk_gets_choices_and_log_probabilities(client):
    answer = ask(client, n=2, logprobs=True, top_logprobs=2, max_tokens=2)
    assert [choice.message.content for choice in answer.choices] == ["what is "] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert answer.choices[1].logprobs.content[0].logprob == -0.5
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2
    chunks = list(ask(client, n=2, logprobs=True, stream=True))
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "what is this "
        assert sum(len(choice.logprobs.content) for choice in own if choice.logprobs) == 3


def test_the_sdk_carries_a_conversation_on(client):
    first = ask(client)
    messages = [{"role": "user", "content": "what"}, first.choices[0].message, {"role": "user", "content": "and then"}]
    assert client.chat.completions.create(model="fake", messages=messages).choices[0].message.content == "and then "


def test_the_sdk_reads_errors(client, running):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, temperature=9)
    assert refused.value.param == "temperature" and refused.value.code == "invalid_request"
    assert refused.value.body["request_id"] == refused.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="key-2").models.list()
    running.engine.failure = ServeError(ErrorKind.OUT_OF_MEMORY)
    with pytest.raises(openai.InternalServerError) as failed:
        ask(client)
    assert failed.value.status_code == 503 and failed.value.response.headers["retry-after"] == "1"


def test_the_sdk_reads_an_error_in_the_middle_of_a_stream(client, running):
    running.engine.failure, running.engine.fail_after = ServeError(ErrorKind.NOT_FINITE), 2
    pieces = []
    with pytest.raises(openai.APIError) as failed:
        for chunk in ask(client, stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert pieces == ["", "what ", "is "] and failed.value.code == "non_finite_logits"


def test_the_sdk_lists_models(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").granularities == [36, 144, 576]
    assert client.models.retrieve("fake").description == "It repeats what it is asked."
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
