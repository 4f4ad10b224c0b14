"""The engine behind a bridge: what it asks of a backend, and what becomes of answers that are late, broken or none."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields
from functools import partial
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from llava.conversation import SeparatorStyle, conv_templates
from llava.inference import Message, write_prompt
from llava.messages import RoutingRequest
from llava.serve.api.read_prompt import read_prompt
from llava.serve.backend.openai_engine import RemoteEngine
from llava.serve.backend.openai_request import chat_body, data_url
from llava.serve.backend.openai_server import Backend
from llava.serve.http.client import Timeouts
from llava.serve.protocol import (
    EngineImage,
    ErrorKind,
    Event,
    Finished,
    GenerationRequest,
    Guide,
    GuideKind,
    Piece,
    Sampling,
    ServeError,
    Started,
    TokenScore,
)
from tests.serve.fake_backend import Exchange, FakeBackend

PATIENT = Timeouts(connect=10.0, headers=10.0, read=10.0, total=60.0)
IMPATIENT = Timeouts(connect=10.0, headers=0.3, read=0.3, total=60.0)
"""For backends that hang, and no others: on a busy machine an answer may take longer."""
RED_IMAGE, BLUE_IMAGE = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (2, 5), "blue")
RED, BLUE = (EngineImage(image.size, data_url(image)) for image in (RED_IMAGE, BLUE_IMAGE))


def asking(text: str = "Hello", **fields: Any) -> GenerationRequest:
    return GenerationRequest("r1", (Message("user", text),), **fields)


def with_engine(fake: FakeBackend, work: Callable[[RemoteEngine], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def run() -> Any:
        engine = RemoteEngine(Backend(fake.url, "other", **{"timeouts": PATIENT, **options}))
        try:
            await engine.look()
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def collected(engine: RemoteEngine, request: GenerationRequest) -> list[Event]:
    return [event async for event in engine.submit(request)]


def failure_of(answer: Callable[[Exchange], None], timeouts: Timeouts = PATIENT) -> tuple[ErrorKind, list[Event]]:
    """How a request fails, and the events before that."""

    async def work(engine: RemoteEngine) -> tuple[ErrorKind, list[Event]]:
        events: list[Event] = []
        with pytest.raises(ServeError) as caught:
            async for event in engine.submit(asking()):
                events.append(event)
        assert engine.stats().running == engine.stats().waiting == 0
        assert caught.value.detail == caught.value.kind.fault.text  # constant: nothing of the backend's own words
        return caught.value.kind, events

    with FakeBackend(answer) as fake:
        return with_engine(fake, work, timeouts=timeouts)


def test_an_answer_is_streamed_with_its_usage() -> None:
    with FakeBackend(lambda exchange: exchange.chat(["A ", "red ", "cat"])) as fake:
        events = with_engine(fake, lambda engine: collected(engine, asking()))
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert [event.text for event in events[1:-1]] == ["A ", "red ", "cat"]
    assert (events[-1].finish_reason, events[-1].prompt_tokens, events[-1].completion_tokens) == ("stop", 7, 3)
    assert events[-1].milliseconds["total"] >= events[-1].milliseconds["ttft"] > 0


def test_the_backend_is_asked_for_what_the_request_says() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=33, seed=4, stop=("END",), logprobs=2)
    turns = (
        Message("system", "Be brief."),
        Message("user", "<image>\nWhat?\nAnd <image>?"),
        Message("assistant", "Red."),
        Message("user", "Sure?"),
    )
    request = GenerationRequest("r1", turns, images=(RED, BLUE), sampling=sampling)
    with FakeBackend(lambda exchange: exchange.chat(["x"])) as fake:
        with_engine(fake, lambda engine: collected(engine, request), api_key="its-key")
        exchange = fake.requests[0]
    assert exchange.path == "/v1/chat/completions" and exchange.headers["Authorization"] == "Bearer its-key"
    body = exchange.json
    messages = body.pop("messages")
    assert body == {
        "model": "other",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 33,
        "seed": 4,
        "stop": ["END"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert [(message["role"], message["content"]) for message in messages if isinstance(message["content"], str)] == [
        ("system", "Be brief."),
        ("assistant", "Red."),
        ("user", "Sure?"),
    ]
    parts = messages[1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts if part["type"] == "text"] == ["What?\nAnd ", "?"]
    for part, image in zip(parts[::2], (RED_IMAGE, BLUE_IMAGE), strict=True):
        head, data = part["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"
        decoded = Image.open(BytesIO(base64.b64decode(data)))
        assert decoded.format == "PNG" and decoded.tobytes() == image.tobytes()


def test_no_field_of_the_sampling_is_forgotten() -> None:
    """Each field of `Sampling`, set to something else than its default, changes what the backend is asked for."""
    wishes = {
        "temperature": (0.5, {"temperature": 0.5}),
        "top_p": (0.5, {"top_p": 0.5}),
        "max_new_tokens": (7, {"max_tokens": 7}),
        "min_new_tokens": (7, {"min_tokens": 7}),
        "seed": (0, {"seed": 0}),
        "stop": (("END",), {"stop": ["END"]}),
        "logprobs": (0, {"logprobs": True, "top_logprobs": 0}),
        "top_k": (3, {"top_k": 3}),
        "min_p": (0.5, {"min_p": 0.5}),
        "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
        "presence_penalty": (-1.0, {"presence_penalty": -1.0}),
        "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
        "logit_bias": (((3, -100.0), (5, 1.0)), {"logit_bias": {"3": -100.0, "5": 1.0}}),
        "stop_token_ids": ((7, 8), {"stop_token_ids": [7, 8]}),
        "ignore_eos": (True, {"ignore_eos": True}),
        "guide": (Guide(GuideKind.REGEX, "a+", "regex"), {"structured_outputs": {"regex": "a+"}}),
    }
    assert wishes.keys() == {field.name for field in fields(Sampling)}
    plain = chat_body(asking(), "m")
    for name, (value, told) in wishes.items():
        assert chat_body(asking(sampling=Sampling(**{name: value})), "m") == {**plain, **told}


NAMED = {"name": "answer", "schema": {"type": "array"}, "strict": True}
BEYOND_OPENAI = ("min_tokens", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos")
ALL_BEYOND = Sampling(min_new_tokens=1, top_k=3, min_p=0.5, repetition_penalty=1.2, stop_token_ids=(7,), ignore_eos=True)


@pytest.mark.parametrize("owner", ["vllm", "sglang", "avg-llava"])
def test_a_server_that_knows_more_than_openais_api_gets_more(owner: str) -> None:
    models = {"data": [{"id": "other", "owned_by": owner}]}
    with FakeBackend(lambda exchange: exchange.chat(["x"]), models=models) as fake:
        with_engine(fake, lambda engine: collected(engine, asking(sampling=ALL_BEYOND)))
        assert fake.requests[0].json.keys() >= set(BEYOND_OPENAI)


@pytest.mark.parametrize("owner", [None, 5, "somebody"])
def test_a_server_that_may_ignore_a_field_is_not_asked(owner: object) -> None:
    models = {"data": [{"id": "other", "owned_by": owner}]}
    with FakeBackend(lambda exchange: exchange.chat(["x"]), models=models) as fake:
        for name in [each.name for each in fields(Sampling) if getattr(ALL_BEYOND, each.name) != each.default]:
            wish = Sampling(**{name: getattr(ALL_BEYOND, name)})
            with pytest.raises(ServeError, match="is not known to support") as refused:
                with_engine(fake, partial(collected, request=asking(sampling=wish)))
            assert refused.value.kind is ErrorKind.INVALID_REQUEST and refused.value.param in BEYOND_OPENAI
        assert not fake.requests
        for kind in (GuideKind.REGEX, GuideKind.CHOICE, GuideKind.GRAMMAR):
            with pytest.raises(ServeError, match="is not known to support its_name"):
                with_engine(fake, partial(collected, request=asking(sampling=Sampling(guide=Guide(kind, "[]", "its_name")))))
        assert len(fake.requests) == 0
        of_openai = Sampling(seed=1, stop=("x",), presence_penalty=1.0, frequency_penalty=1.0, logit_bias=((3, 1.0),))
        with_engine(fake, partial(collected, request=asking(sampling=of_openai)))
        assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("guide", "of_vllm", "of_sglang"),
    [
        ((GuideKind.REGEX, "a+"), {"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ((GuideKind.CHOICE, '["a.b", "c"]'), {"structured_outputs": {"choice": ["a.b", "c"]}}, {"regex": "a\\.b|c"}),
        ((GuideKind.GRAMMAR, "root ::= x"), {"structured_outputs": {"grammar": "root ::= x"}}, {"ebnf": "root ::= x"}),
        ((GuideKind.JSON, '{"type": "object"}'), *[{"response_format": {"type": "json_object"}}] * 2),
        ((GuideKind.JSON, '{"type": "array"}'), *[{"response_format": {"type": "json_schema", "json_schema": NAMED}}] * 2),
    ],
)
def test_what_an_answer_has_to_be_is_said_in_the_backends_words(guide: Any, of_vllm: Any, of_sglang: Any) -> None:
    plain = chat_body(asking(), "m")
    asked = asking(sampling=Sampling(guide=Guide(*guide, "field")))
    for owner, words in (("vllm", of_vllm), ("avg-llava", of_vllm), ("sglang", of_sglang)):
        assert chat_body(asked, "m", owner) == {**plain, **words}


def test_pictures_without_placeholders_begin_the_first_question() -> None:
    messages = chat_body(asking("What?", images=(RED, BLUE)), "m")["messages"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "image_url", "text"]


def test_images_behind_the_words_go_in_front_of_them_and_a_finished_prompt_stays() -> None:
    first, behind = (asking(text, images=(RED, BLUE)) for text in ("<image><image>What?", "What? <image><image>"))
    assert chat_body(first, "m") == chat_body(behind, "m")
    prompt = write_prompt([Message("user", "What?")], 0, "v1").replace("What?", "What?\n<image>")
    parts = chat_body(GenerationRequest("r", prompt=prompt, images=(RED,)), "m")["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]


def test_placeholders_unlike_pictures_are_refused() -> None:
    with pytest.raises(ServeError, match="2 <image> placeholders, but 1 images"):
        chat_body(asking("<image> <image>", images=(RED,)), "m")


TEMPLATES = [name for name, template in conv_templates.items() if template.sep_style is not SeparatorStyle.PLAIN]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_finished_prompts_of_every_template_become_turns_again(template: str, count: int) -> None:
    turns = [Message(("user", "assistant")[index % 2], f"turn {index}:\n ###it's <image-placeholder>?") for index in range(count)]
    turns = [Message(turn.role, turn.text.replace("<image-placeholder>", "")) for turn in turns]
    prompt = write_prompt(turns, 1, template)
    read = read_prompt(prompt)
    assert read is not None
    shown = conv_templates[template].offset  # turns of the template's own
    assert [turn for turn in read if turn.role != "system"][shown:] == [Message("user", "<image>\n" + turns[0].text), *turns[1:]]
    system = [turn.text for turn in read if turn.role == "system"]
    again = write_prompt([*(Message("system", text) for text in system), *read[len(system) + shown :]], 1, template)
    assert again == prompt


@pytest.mark.parametrize(
    "prompt",
    ["", "Hello", "USER: x ASSISTANT:", "A chat. USER: x", "A chat. USER: x ASSISTANT: half an answ", "[INST] x", "###", " [/INST]"],
)
def test_other_prompts_are_of_no_template(prompt: str) -> None:
    assert read_prompt(prompt) is None


def test_llavas_single_turn_prompt_goes_to_the_backend_and_an_unknown_one_is_refused_with_a_reason() -> None:
    prompt = write_prompt([Message("user", "What?")], 1, "vicuna_v1")
    messages = chat_body(GenerationRequest("r", prompt=prompt, images=(RED,)), "m")["messages"]
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"][1] == {"type": "text", "text": "What?"}
    with pytest.raises(ServeError, match="known template") as caught:
        chat_body(GenerationRequest("r", prompt="Once upon a time"), "m")
    assert caught.value.kind is ErrorKind.INVALID_REQUEST and caught.value.param == "prompt"


def test_tokens_are_the_backends() -> None:
    def told(exchange: Exchange) -> None:
        if exchange.path == "/detokenize":
            exchange.reply({"prompt": "ab"})
        else:
            exchange.reply({"count": 3, "tokens": [1, 97, 98], "token_strs": ["<s>", "a", "b"], "max_model_len": 9})

    async def asked(engine: RemoteEngine) -> Any:
        found = await engine.tokenize(GenerationRequest("r", prompt="ab"), special=False)
        return found, await engine.tokenize(asking(images=(RED,))), await engine.detokenize([97, 98])

    with FakeBackend(told) as fake:
        found, _, text = with_engine(fake, asked)
        plain, turns, back = (each.json for each in fake.requests)
    assert (found.ids, found.texts, text) == ((1, 97, 98), ("<s>", "a", "b"), "ab")
    assert plain == {"model": "other", "return_token_strs": True, "prompt": "ab", "add_special_tokens": False}
    assert turns["messages"][0]["content"][0]["type"] == "image_url" and back == {"model": "other", "tokens": [97, 98]}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda exchange: exchange.reply({}, 404), ErrorKind.NOT_FOUND),
        (lambda exchange: exchange.reply({"error": {"message": "secret"}}, 400), ErrorKind.INVALID_REQUEST),
        (lambda exchange: exchange.reply([]), ErrorKind.BACKEND_FAILED),
        (lambda exchange: exchange.reply({"tokens": ["a"], "prompt": 5}), ErrorKind.BACKEND_FAILED),
        (lambda exchange: exchange.die(), ErrorKind.BACKEND_FAILED),
    ],
)
def test_a_backend_that_tells_no_tokens_is_a_typed_error(answer: Any, kind: ErrorKind) -> None:
    async def asked(engine: RemoteEngine) -> None:
        for asking_for in (engine.tokenize(GenerationRequest("r", prompt="ab")), engine.detokenize([1])):
            with pytest.raises(ServeError) as caught:
                await asking_for
            assert caught.value.kind is kind and "secret" not in caught.value.detail

    with FakeBackend(answer) as fake:
        with_engine(fake, asked)


def test_each_image_goes_to_the_backend_with_its_detail() -> None:
    wish = asking(images=(RED, RED, RED), routing=RoutingRequest(details=("low", None, "high")))
    parts = [part for message in chat_body(wish, "m")["messages"] for part in message["content"] if part["type"] == "image_url"]
    assert [part["image_url"].get("detail") for part in parts] == ["low", None, "high"]

    async def answered(engine: RemoteEngine) -> None:
        await collected(engine, wish)  # also where there are no granularities: servers that know no detail do without

    with FakeBackend(lambda exchange: exchange.chat(["x"])) as fake:
        with_engine(fake, answered)


def test_granularity_goes_only_to_a_backend_that_has_some() -> None:
    wish = asking(images=(RED,), routing=RoutingRequest((36, 144), 500, -0.5))

    async def refused(engine: RemoteEngine) -> None:
        with pytest.raises(ServeError, match="no granularities") as caught:
            await collected(engine, wish)
        assert caught.value.kind is ErrorKind.INVALID_REQUEST and caught.value.param == "granularity"

    ours = {"data": [{"id": "other", "granularities": [36, 144, 576], "has_router": True, "context_length": 1024}]}
    with FakeBackend(lambda exchange: exchange.chat(["x"])) as fake:
        with_engine(fake, refused)
        assert fake.requests == []
        fake.models = ours

        async def passed_on(engine: RemoteEngine) -> Any:
            card = engine.card
            await collected(engine, wish)
            return card

        card = with_engine(fake, passed_on)
        body = fake.requests[0].json
    assert (card.granularities, card.has_router, card.context_length) == ((36, 144, 576), True, 1024)
    assert (body["granularity"], body["max_visual_tokens"], body["granularity_bias"]) == ([36, 144], 500, -0.5)


def test_a_backend_of_our_own_reports_what_pictures_cost() -> None:
    image = {
        "granularity": 144,
        "visual_tokens": 180,
        "full_visual_tokens": 600,
        "tokens_per_level": {"36": 48, "144": 180, "x": 3, "576": -1},
        "logits": [0.5, 1],
        "probabilities": [0.4, "no", 0.6],
        "cached": True,
    }
    told = {"images": [image, "nonsense"], "milliseconds": {"vision": 2.5, "router": "slow"}}

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "avg_llava": told})
        exchange.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        exchange.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "avg_llava": told})
        exchange.event("[DONE]")
        exchange.end_stream()

    with FakeBackend(answer) as fake:
        started, piece, finished = with_engine(fake, lambda engine: collected(engine, asking()))
    for event in (started, finished):
        (report,) = event.images
        assert (report.granularity, report.visual_tokens, report.full_visual_tokens, report.cached) == (144, 180, 600, True)
        assert (report.tokens_per_level, report.logits, report.probabilities) == ({36: 48, 144: 180}, (0.5, 1.0), (0.4, 0.6))
        assert event.milliseconds["vision"] == 2.5 and "router" not in event.milliseconds
    assert finished.finish_reason == "length" and piece.text == "x"


def test_log_probabilities_come_through() -> None:
    content = [{"token": "x", "logprob": -0.5, "top_logprobs": [{"token": "y", "logprob": -1, "bytes": None}]}]
    content += [{"token": "\ufffd", "logprob": -2, "bytes": [0xE2]}, {"token": "z", "logprob": -3, "bytes": [-1]}]

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": content}, "finish_reason": "stop"}]})
        exchange.event("[DONE]")
        exchange.end_stream()

    with FakeBackend(answer) as fake:
        events = with_engine(fake, lambda engine: collected(engine, asking()))
    scores = (TokenScore("x", -0.5, (("y", -1.0),)), TokenScore("\udce2", -2.0), TokenScore("z", -3.0))
    assert events[1] == Piece("x", scores) and scores[1].data == b"\xe2"


def refusing(status: int, body: Any = None, **headers: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.reply(body or {"error": {"message": "secret 0x7fdeadbeef", "code": 400}}, status, **headers)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ErrorKind.INVALID_REQUEST),
        (422, ErrorKind.INVALID_REQUEST),
        (418, ErrorKind.INVALID_REQUEST),
        (401, ErrorKind.BACKEND_FAILED),
        (403, ErrorKind.BACKEND_FAILED),
        (404, ErrorKind.BACKEND_FAILED),
        (413, ErrorKind.TOO_LARGE),
        (429, ErrorKind.OVERLOADED),
        (503, ErrorKind.OVERLOADED),
        (500, ErrorKind.BACKEND_FAILED),
        (502, ErrorKind.BACKEND_FAILED),
    ],
)
def test_statuses_become_kinds_with_constant_texts(status: int, kind: ErrorKind) -> None:
    assert failure_of(refusing(status)) == (kind, [])


def test_a_backend_of_our_own_may_say_which_error_it_was() -> None:
    assert failure_of(refusing(400, {"error": {"code": "context_length_exceeded", "message": "x"}}))[0] is ErrorKind.CONTEXT_LENGTH
    assert failure_of(refusing(503, {"error": {"code": "out_of_memory", "message": "x"}}))[0] is ErrorKind.OUT_OF_MEMORY
    assert failure_of(refusing(400, {"error": {"code": "out_of_memory", "message": "x"}}))[0] is ErrorKind.INVALID_REQUEST


def test_a_redirect_is_not_followed() -> None:
    with FakeBackend(lambda exchange: exchange.chat(["never"])) as elsewhere:
        answer = refusing(307, None, Location=elsewhere.url + "/v1/chat/completions")
        assert failure_of(answer) == (ErrorKind.BACKEND_FAILED, [])
        assert elsewhere.requests == []


def streaming(*events: Any, end: bool = True, content_type: str = "text/event-stream") -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream(content_type)
        for event in events:
            exchange.event(event) if not isinstance(event, bytes) else exchange.piece(event)
        exchange.end_stream() if end else exchange.die()

    return answer


WORD = {"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda exchange: exchange.head(200, "text/html", Content_Length="0"), 0),
        (lambda exchange: exchange.reply({"choices": []}), 0),
        (streaming("not json"), 0),
        (streaming("[1, 2]"), 0),
        (streaming({"no": "choices"}), 0),
        (streaming({"choices": "x"}), 0),
        (streaming({"choices": [3]}), 0),
        (streaming({"choices": [{"index": 0, "delta": {"content": 5}}]}), 0),
        (streaming({"choices": [{"index": 1, "delta": {"content": "x"}}]}), 0),
        (streaming({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}), 0),
        (streaming({"choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [{"token": 1}]}}]}), 0),
        (streaming(b"data: \xff\xfe\n\n"), 0),
        (streaming("{" * 100_000), 0),
        (streaming(), 0),
        (streaming("[DONE]"), 0),
        (streaming(WORD, "[DONE]"), 1),
        (streaming(WORD, end=False), 1),
        (streaming(WORD, {"error": {"message": "secret 0x7fdeadbeef"}}), 1),
        (lambda exchange: exchange.die(), 0),
    ],
)
def test_garbage_and_broken_streams_are_typed_errors(answer: Callable[[Exchange], None], words: int) -> None:
    kind, events = failure_of(answer)
    assert kind is ErrorKind.BACKEND_FAILED
    assert [event.text for event in events if isinstance(event, Piece)] == ["word"] * words


def test_a_compressed_body_is_refused() -> None:
    def answer(exchange: Exchange) -> None:
        exchange.head(200, "text/event-stream", Content_Encoding="gzip", Content_Length="3")
        exchange.handler.wfile.write(b"abc")

    assert failure_of(answer)[0] is ErrorKind.BACKEND_FAILED


@pytest.mark.parametrize("begins", [False, True])
def test_a_backend_that_hangs_is_given_up(begins: bool) -> None:
    def answer(exchange: Exchange) -> None:
        if begins:
            exchange.begin_stream()
            exchange.event(WORD)
        exchange.until_gone()

    begun = time.monotonic()
    kind, events = failure_of(answer, IMPATIENT)
    assert kind is ErrorKind.BACKEND_FAILED and time.monotonic() - begun < 30
    assert len(events) == (2 if begins else 0)


def test_an_endless_event_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.http.client.MAX_FRAME_BYTES", 100_000)

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        while True:
            exchange.piece(b"x" * 10_000)

    assert failure_of(answer)[0] is ErrorKind.BACKEND_FAILED


def test_an_endless_stream_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.backend.openai_engine.MAX_STREAM_BYTES", 50_000)

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        while True:
            exchange.event(WORD)

    assert failure_of(answer)[0] is ErrorKind.BACKEND_FAILED


def test_a_backend_that_is_not_there_is_unreachable_and_ready_says_so() -> None:
    with FakeBackend(lambda exchange: exchange.chat(["x"])) as fake:
        url = fake.url

    async def run() -> None:
        engine = RemoteEngine(Backend(url, "other", timeouts=PATIENT))
        assert not await engine.look() and not engine.ready
        with pytest.raises(ServeError) as caught:
            await collected(engine, asking())
        assert caught.value.kind is ErrorKind.BACKEND_UNREACHABLE
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("models", [{"data": [{"id": "another"}]}, {"data": "x"}, [], "x", lambda exchange: exchange.reply({}, 500)])
def test_a_backend_without_the_model_is_not_ready(models: Any) -> None:
    async def work(engine: RemoteEngine) -> bool:
        return engine.ready

    with FakeBackend(lambda exchange: exchange.chat(["x"]), models) as fake:
        assert with_engine(fake, work) is False


def test_readiness_follows_the_backend() -> None:
    async def work(engine: RemoteEngine) -> list[bool]:
        engine.start()
        seen = [engine.ready]
        fake.models = {"data": []}
        while engine.ready:
            await asyncio.sleep(0.01)
        seen.append(engine.ready)
        fake.models = {"data": [{"id": "other"}]}
        while not engine.ready:
            await asyncio.sleep(0.01)
        return seen

    with FakeBackend(lambda exchange: exchange.chat(["x"])) as fake:
        assert with_engine(fake, work, poll_seconds=0.02) == [True, False]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_cancelling_closes_the_connection_to_the_backend(how: str) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event(WORD)
        exchange.until_gone()

    async def work(engine: RemoteEngine) -> None:
        generation = engine.submit(asking())
        events = generation.__aiter__()
        assert isinstance(await events.__anext__(), Started)
        if how == "cancel":
            generation.cancel()
            generation.cancel()
            with pytest.raises(ServeError) as caught:
                async for _ in events:
                    pass
            assert caught.value.kind is ErrorKind.CANCELLED
        else:
            await events.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(fake.gone.wait, 60)
        assert engine.stats().running == 0

    with FakeBackend(answer) as fake:
        with_engine(fake, work)


def test_the_queue_is_bounded_and_drains() -> None:
    async def work(engine: RemoteEngine) -> None:
        first, second = engine.submit(asking("1")), engine.submit(asking("2"))
        with pytest.raises(ServeError) as caught:
            engine.submit(asking("3"))
        assert caught.value.kind is ErrorKind.OVERLOADED
        while not fake.requests:
            await asyncio.sleep(0.01)
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(ServeError) as caught:
            engine.submit(asking("4"))
        assert caught.value.kind is ErrorKind.DRAINING and not engine.ready
        answering.set()
        for generation in (first, second):
            assert isinstance([event async for event in generation][-1], Finished)
        await asyncio.wait_for(draining, 60)

    answering = threading.Event()

    def answer(exchange: Exchange) -> None:
        answering.wait(60)
        exchange.chat(["a", "b"])

    with FakeBackend(answer) as fake:
        with_engine(fake, work, concurrency=1, max_queue=1, timeouts=Timeouts(headers=60, read=60))


def test_a_slow_reader_holds_the_backend_back() -> None:
    sent = 0

    def answer(exchange: Exchange) -> None:
        nonlocal sent
        exchange.begin_stream()
        for _ in range(20_000):
            sent += 1
            exchange.event({"choices": [{"index": 0, "delta": {"content": "word " * 200}}]})

    async def work(engine: RemoteEngine) -> None:
        generation = engine.submit(asking())
        held = -1
        while not 0 < sent == held:  # until it stands still
            held = sent
            await asyncio.sleep(0.5)
        assert sent < 19_000
        generation.cancel()

    with FakeBackend(answer) as fake:
        with_engine(fake, work)


@pytest.mark.parametrize(
    "url", ["localhost", "http://localhost", "ftp://localhost:1", "http://u:p@localhost:1", "http://localhost:1/other"]
)
def test_a_backends_url_is_checked(url: str) -> None:
    with pytest.raises(ValueError):
        _ = Backend(url, "m").endpoint
    assert Backend("http://localhost:30000/v1/", "m").endpoint.url.port == 30000


# ---- a vLLM with the plug-in


def plugin(exchange: Exchange) -> None:
    """A whole answer whose usage counts the positions of its images."""
    exchange.begin_stream()
    exchange.event({"choices": [{"index": 0, "delta": {"content": "red"}, "finish_reason": "stop"}]})
    exchange.event({
        "choices": [],
        "usage": {"prompt_tokens": 40, "completion_tokens": 1, "prompt_tokens_details": {"multimodal_tokens": {"image": 24}}},
    })  # fmt: skip
    exchange.event("[DONE]")
    exchange.end_stream()


LEVELS = {"granularities": (4, 16, 64)}


@pytest.mark.parametrize(
    ("routing", "kwargs"),
    [
        (RoutingRequest(), None),
        (RoutingRequest(16), {"vis_token_granularity": 16}),
        (RoutingRequest((4, 16), 90, -0.5), {"vis_token_granularity": [4, 16], "max_visual_tokens": 90, "granularity_bias": -0.5}),
        (RoutingRequest(details=("low", "low")), {"vis_token_granularity": 4}),
        (RoutingRequest((4, 16), details=("high", "high")), {"vis_token_granularity": 16}),
        (RoutingRequest(16, details=("high", None)), {"vis_token_granularity": 16}),
    ],
)
def test_a_vllm_with_the_plug_in_gets_granularities_in_its_own_form(routing: RoutingRequest, kwargs: Any) -> None:
    async def work(engine: RemoteEngine) -> list[Event]:
        return await collected(engine, asking("<image>\n<image>\nWhich?", images=(RED, BLUE), routing=routing))

    with FakeBackend(plugin) as fake:
        end = with_engine(fake, work, **LEVELS)[-1]
        body = fake.requests[-1].json
    assert body.get("mm_processor_kwargs") == kwargs and not {"granularity", "max_visual_tokens", "granularity_bias"} & body.keys()
    assert all("detail" not in part.get("image_url", {}) for part in body["messages"][0]["content"])
    assert end.visual_tokens == 24 and end.images == ()


@pytest.mark.parametrize(
    "routing", [RoutingRequest(details=("low", None)), RoutingRequest(details=("low", "high")),
                RoutingRequest(max_visual_tokens=50, details=("high", "high"))]
)  # fmt: skip
def test_details_that_differ_cannot_be_said_to_the_plug_in(routing: RoutingRequest) -> None:
    async def work(engine: RemoteEngine) -> ServeError:
        with pytest.raises(ServeError) as caught:
            await collected(engine, asking("<image>\n<image>\nWhich?", images=(RED, BLUE), routing=routing))
        return caught.value

    with FakeBackend(plugin) as fake:
        error = with_engine(fake, work, **LEVELS)
    assert error.kind is ErrorKind.INVALID_REQUEST and error.param == "images" and "the same detail" in error.detail


@pytest.mark.parametrize(("has_router", "bias"), [(True, True), (False, False)])
def test_the_plug_in_is_asked_about_its_granularities_first(has_router: bool, bias: bool) -> None:
    async def work(engine: RemoteEngine) -> tuple[bool, Any]:
        return engine.ready, engine.card

    with FakeBackend(plugin) as fake:
        ready, card = with_engine(fake, work, has_router=has_router, **LEVELS)
        kwargs = fake.requests[0].json["mm_processor_kwargs"]
    assert ready and card.granularities == (4, 16, 64) and card.has_router is has_router
    assert kwargs["vis_token_granularity"] == [4, 16, 64] and ("granularity_bias" in kwargs) is bias


def test_a_server_that_refuses_granularities_is_not_ready() -> None:
    async def work(engine: RemoteEngine) -> bool:
        return engine.ready

    with FakeBackend(lambda exchange: exchange.reply({"error": {"message": "--trust-request-mm-kwargs"}}, 400)) as fake:
        assert not with_engine(fake, work, **LEVELS)
