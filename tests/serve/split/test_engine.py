"""The split engine: its answers are those of the whole model, and what goes wrong on either side is a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from llava.inference import Assistant, Options, write_prompt
from llava.messages import Message, RoutingRequest
from llava.serve.backend.openai_server import Backend
from llava.serve.http.client import BrokenResponse, Timeouts
from llava.serve.protocol import ErrorKind, Event, Finished, GenerationRequest, Piece, Sampling, ServeError, Started
from llava.serve.split.encode import EncodedImages
from llava.serve.split.engine import SplitEngine
from llava.serve.split.token_stream import _picked
from tests.serve.fake_backend import Exchange, FakeBackend
from tests.serve.split.fake_vllm import MODELS, FakeVllm, serving

TIMEOUTS = Timeouts(connect=10.0, headers=30.0, read=30.0, total=60.0)


def with_engine(front: Assistant, url: str, work: Callable[[SplitEngine], Awaitable[Any]], look: bool = True, **options: Any) -> Any:
    """Run `work(engine)` with an engine that has looked at its server."""

    async def run() -> Any:
        engine = SplitEngine(front, "micro", Backend(url, "", timeouts=TIMEOUTS, poll_seconds=0.05), **options)
        try:
            if look:
                assert await engine.look()
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def request(engine: SplitEngine, images: list[Image.Image], text: str, **fields: Any) -> GenerationRequest:
    fields.setdefault("sampling", Sampling(max_new_tokens=24))
    return GenerationRequest("r", (Message("user", text),), images=tuple(map(engine.prepare_image, images)), **fields)


async def collect(engine: SplitEngine, wanted: GenerationRequest) -> list[Event]:
    return [event async for event in engine.submit(wanted)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


ROUTINGS = [
    RoutingRequest(), RoutingRequest(4), RoutingRequest(64), RoutingRequest((4, 16)), RoutingRequest(max_visual_tokens=90),
    RoutingRequest(bias=-1.0), RoutingRequest(details=("low",)),
]  # fmt: skip


@pytest.mark.parametrize("routing", ROUTINGS)
def test_answers_reports_and_lengths_are_those_of_the_whole_model(
    routing: RoutingRequest, front: Assistant, whole: Assistant, backend: FakeBackend, asked: list[tuple[Image.Image, str]]
) -> None:
    async def work(engine: SplitEngine) -> list[list[Event]]:
        return await asyncio.gather(*(collect(engine, request(engine, [image], text, routing=routing)) for image, text in asked))

    for (image, text), events in zip(asked, with_engine(front, backend.url, work), strict=True):
        expected = whole.answer([image], text, Options(max_new_tokens=24, routing=routing))
        end = end_of(events)
        assert text_of(events) == expected.text and end.finish_reason == expected.finish_reason
        assert (end.prompt_tokens, end.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
        [report], [same] = end.images, expected.reports
        assert (report.granularity, report.visual_tokens) == (same.granularity, same.num_visual_tokens)
        assert report.tokens_per_level == same.tokens_per_level
        assert report.logits == pytest.approx([] if same.logits is None else same.logits.tolist(), abs=1e-5)
        assert isinstance(events[0], Started) and {"queue", "views", "vision", "splice", "prefill", "ttft"} <= set(events[0].milliseconds)


def test_a_conversation_about_two_images_of_different_levels(
    front: Assistant, whole: Assistant, backend: FakeBackend, asked: list[tuple[Image.Image, str]]
) -> None:
    images = [asked[0][0], asked[1][0]]
    turns = (Message("system", "Be brief."), Message("user", "<image>\n<image>\nWhat is here?"), Message("assistant", "Signs."),
             Message("user", asked[0][1]))  # fmt: skip
    routing = RoutingRequest(details=("low", "high"))

    async def work(engine: SplitEngine) -> list[Event]:
        prepared = tuple(map(engine.prepare_image, images))
        return await collect(engine, GenerationRequest("r", turns, None, prepared, Sampling(max_new_tokens=24), routing))

    events = with_engine(front, backend.url, work)
    expected = whole.answer(images, turns, Options(max_new_tokens=24, routing=routing))
    assert text_of(events) == expected.text and end_of(events).prompt_tokens == expected.prompt_tokens
    assert [report.granularity for report in end_of(events).images] == [report.granularity for report in expected.reports]
    assert len({report.granularity for report in expected.reports}) == 2


def test_text_alone_and_finished_prompts(front: Assistant, whole: Assistant, backend: FakeBackend, asked: list[Any]) -> None:
    image, text = asked[0]
    prompt = write_prompt([Message("user", text)], 1, whole.model.config.conv_version)

    async def work(engine: SplitEngine) -> tuple[list[Event], list[Event]]:
        alone = await collect(engine, request(engine, [], "What is this?"))
        finished = GenerationRequest("r", prompt=prompt, images=(engine.prepare_image(image),), sampling=Sampling(max_new_tokens=24))
        return alone, await collect(engine, finished)

    alone, finished = with_engine(front, backend.url, work)
    assert text_of(alone) == whole.answer([], "What is this?", Options(max_new_tokens=24)).text
    assert text_of(finished) == whole.answer([image], text, Options(max_new_tokens=24)).text


def test_what_people_say_is_text(front: Assistant, whole: Assistant, backend: FakeBackend) -> None:
    async def work(engine: SplitEngine) -> list[Event]:
        return await collect(engine, request(engine, [], "Is </s> red?"))

    events = with_engine(front, backend.url, work)
    expected = whole.answer([], "Is </s> red?", Options(max_new_tokens=24))
    assert (text_of(events), end_of(events).prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_a_prompt_that_the_server_would_read_otherwise_is_refused(front: Assistant, backend: FakeBackend) -> None:
    async def work(engine: SplitEngine) -> ServeError:
        image = engine.prepare_image(Image.new("RGB", (64, 64)))
        with pytest.raises(ServeError, match="would read this prompt in another way") as caught:
            await collect(engine, GenerationRequest("r", (Message("user", "Which of <image> and that is red?"),), images=(image,)))
        return caught.value

    error = with_engine(front, backend.url, work)
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, "messages")


def test_a_prompt_of_another_template_is_refused(front: Assistant, backend: FakeBackend) -> None:
    prompt = write_prompt([Message("user", "What is this?")], 0, "mpt")

    async def work(engine: SplitEngine) -> None:
        with pytest.raises(ServeError, match="another conversation template"):
            await collect(engine, GenerationRequest("r", prompt=prompt))

    with_engine(front, backend.url, work)


# ---- the rows


def test_an_image_is_encoded_once_and_sent_at_each_level(
    monkeypatch: pytest.MonkeyPatch, front: Assistant, backend: FakeBackend, vllm: FakeVllm, asked: list[Any]
) -> None:
    image, passes = asked[0][0], []
    encode = type(front.model).encode_images
    monkeypatch.setattr(type(front.model), "encode_images", lambda self, views: passes.append(len(views)) or encode(self, views))

    async def work(engine: SplitEngine) -> None:
        passes.clear()
        for granularity in (4, 16, None, 4):
            await collect(engine, request(engine, [image], "What?", routing=RoutingRequest(granularity)))
        assert len(passes) == 1 and engine.stats().cache_hits >= 3
        engine.kept.clear()
        await collect(engine, request(engine, [image], "What?", routing=RoutingRequest(4)))
        assert len(passes) == 2

    with_engine(front, backend.url, work)


def test_rows_alone_answer_a_fixed_level(monkeypatch: pytest.MonkeyPatch, front: Assistant, backend: FakeBackend, asked: list[Any]) -> None:
    """Rows take little of the cache, so that they remain when features have to go."""
    image = asked[0][0]

    async def work(engine: SplitEngine) -> tuple[list[Event], list[Event]]:
        wanted = request(engine, [image], "What?", routing=RoutingRequest(4))
        first = await collect(engine, wanted)
        for key in [key for key in engine.kept._entries if " at " not in key]:
            del engine.kept._entries[key]
        monkeypatch.setattr(type(front.model), "encode_images", lambda self, views: pytest.fail("the image was encoded again"))
        return first, await collect(engine, request(engine, [image], "What?", routing=RoutingRequest(4)))

    first, second = with_engine(front, backend.url, work)
    assert text_of(first) == text_of(second) and end_of(second).images[0].cached is True


def test_rows_that_are_not_finite_do_not_leave(front: Assistant, backend: FakeBackend, vllm: FakeVllm, asked: list[Any]) -> None:
    weight = front.model.get_model().mm_projector[0].weight

    async def work(engine: SplitEngine) -> None:
        sent = len(vllm.bodies)
        good = weight.detach().clone()
        with torch.no_grad():
            weight[:] = float("nan")
        try:
            with pytest.raises(ServeError) as caught:
                await collect(engine, request(engine, [asked[0][0]], "What?", routing=RoutingRequest(4)))
        finally:
            with torch.no_grad():
                weight[:] = good
        assert caught.value.kind is ErrorKind.NOT_FINITE and len(vllm.bodies) == sent
        assert text_of(await collect(engine, request(engine, [asked[0][0]], asked[0][1], routing=RoutingRequest(64))))

    with_engine(front, backend.url, work)


# ---- sampling


def test_stop_texts_end_the_answer_and_the_servers_work(front: Assistant, whole: Assistant, vllm: FakeVllm, asked: list[Any]) -> None:
    image, text = asked[0]
    sampling = Sampling(max_new_tokens=60, min_new_tokens=60)
    vllm.pause = 0.05
    expected = whole.answer([image], text, Options(max_new_tokens=60, min_new_tokens=60)).text
    stop = expected[3:6]

    async def work(engine: SplitEngine) -> list[Event]:
        return await collect(engine, request(engine, [image], text, sampling=replace(sampling, stop=(stop,))))

    with serving(vllm) as fake:
        events = with_engine(front, fake.url, work)
        assert text_of(events) == expected[: expected.index(stop)].rstrip() and end_of(events).finish_reason == "stop"
    assert "stop" not in vllm.bodies[-1] and vllm.written[-1] < 60


def test_log_probabilities_are_of_our_tokens(front: Assistant, backend: FakeBackend, asked: list[Any]) -> None:
    image, text = asked[0]

    async def work(engine: SplitEngine) -> list[Event]:
        return await collect(engine, request(engine, [image], text, sampling=Sampling(max_new_tokens=24, logprobs=3)))

    events = with_engine(front, backend.url, work)
    scores = [score for event in events if isinstance(event, Piece) for score in event.scores]
    assert "".join(score.text for score in scores).strip() == text_of(events)
    assert all(score.log_probability <= 0 and len(score.alternatives) == 3 for score in scores)
    assert all(score.alternatives[0] == (score.text, pytest.approx(score.log_probability)) for score in scores)


def test_sampling_options_reach_the_server(front: Assistant, backend: FakeBackend, vllm: FakeVllm) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=5000, seed=3, top_k=5, ignore_eos=True, logit_bias=((7, -1.0),))

    async def work(engine: SplitEngine) -> int:
        events = await collect(engine, request(engine, [], "What?", sampling=sampling))
        return end_of(events).prompt_tokens

    length = with_engine(front, backend.url, work)
    body = vllm.bodies[-1]
    expected = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "top_k": 5, "ignore_eos": True, "logit_bias": {"7": -1.0}}
    assert {key: body[key] for key in expected} == expected
    assert body["max_tokens"] == MODELS["data"][0]["max_model_len"] - length  # the server's, which is shorter than the model's


# ---- the server


def test_a_cancelled_answer_ends_at_the_server(front: Assistant, vllm: FakeVllm, asked: list[Any]) -> None:
    vllm.pause = 0.05
    image, text = asked[0]

    async def work(engine: SplitEngine) -> None:
        generation = engine.submit(request(engine, [image], text, sampling=Sampling(max_new_tokens=500, min_new_tokens=500)))
        async for event in generation:
            if isinstance(event, Piece):
                break
        generation.cancel()
        while engine.stats().running:
            await asyncio.sleep(0.01)

    with serving(vllm) as fake:
        with_engine(front, fake.url, work)
        assert fake.gone.wait(10)
    assert 0 < vllm.written[-1] < 500


def refusing(exchange: Exchange) -> None:
    exchange.reply({"error": {"message": "You must set `--enable-mm-embeds`", "type": "BadRequestError", "code": 400}}, 400)


def other_prompt(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.event({"prompt_token_ids": [1, 2, 3], "choices": [{"index": 0, "delta": {"content": ""}}]})
    exchange.event({"choices": [{"index": 0, "delta": {}, "token_ids": [5], "finish_reason": "stop"}]})
    exchange.event("[DONE]")
    exchange.end_stream()


def beginning(ids: Any) -> Callable[[Exchange], None]:
    """A stream that says this of the prompt's ids."""

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"prompt_token_ids": ids, "choices": []})
        exchange.event("[DONE]")
        exchange.end_stream()

    return answer


@pytest.mark.parametrize(
    ("answer", "models"),
    [
        (refusing, MODELS),
        (other_prompt, MODELS),
        (lambda exchange: exchange.chat(["no", "ids"]), MODELS),
        (beginning([[1], {"a": 2}]), MODELS),
        (lambda exchange: pytest.fail("was asked"), {"data": [{"id": "a"}, {"id": "b"}]}),
    ],
)
def test_a_server_that_cannot_take_rows_gets_no_requests(
    answer: Any, models: Any, front: Assistant, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(engine: SplitEngine) -> None:
        for _ in range(2):
            assert not await engine.look() and not engine.ready
        assert caplog.text.count(f"the backend {engine.backend.url} ") == 1  # why, once
        with pytest.raises(ServeError) as caught:
            await collect(engine, request(engine, [], "What?"))
        assert caught.value.kind is ErrorKind.BACKEND_UNREACHABLE

    with serving(answer, models) as fake:
        with_engine(front, fake.url, work, look=False)


def garbage(**choice: Any) -> Callable[[Exchange], None]:
    """A stream whose second chunk is not what it should be."""

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"prompt_token_ids": "none", "choices": []} if not choice else {"choices": [{"index": 0, **choice}]})
        exchange.event("[DONE]")
        exchange.end_stream()

    return answer


@pytest.mark.parametrize(
    "broken",
    [
        garbage(),
        garbage(token_ids=["a"]),
        beginning([[1], {"a": 2}]),
        beginning([10**30]),
        lambda exchange: exchange.reply({"error": "?"}, 500),
        lambda exchange: exchange.die(),
    ],
)
def test_a_server_that_breaks_gives_a_typed_error(broken: Any, front: Assistant, vllm: FakeVllm) -> None:
    behave: dict[str, Any] = {"answer": vllm}

    async def work(engine: SplitEngine) -> None:
        behave["answer"] = broken
        with pytest.raises(ServeError) as caught:
            await collect(engine, request(engine, [], "What?"))
        assert caught.value.kind is ErrorKind.BACKEND_FAILED and caught.value.detail == ErrorKind.BACKEND_FAILED.fault.text

    with serving(lambda exchange: behave["answer"](exchange)) as fake:
        with_engine(front, fake.url, work)


def test_a_server_that_goes_while_a_request_is_encoded_gives_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, front: Assistant, backend: FakeBackend, asked: list[Any]
) -> None:
    image, text = asked[0]

    async def work(engine: SplitEngine) -> None:
        encode = engine.encoder.encode

        async def encode_and_lose(*given: Any) -> EncodedImages:
            found = await encode(*given)
            engine._lost()
            return found

        monkeypatch.setattr(engine.encoder, "encode", encode_and_lose)
        with pytest.raises(ServeError) as caught:
            await collect(engine, request(engine, [image], text))
        assert caught.value.kind is ErrorKind.BACKEND_UNREACHABLE

    with_engine(front, backend.url, work)


def scored_token(**token: Any) -> dict[str, Any]:
    return {"token": "token_id:5", "logprob": -0.5, **token}


@pytest.mark.parametrize(
    ("tokens", "content"),
    [
        ([10**30], None),
        ([5], [{"token": "token_id:5"}]),
        ([5], [scored_token(logprob=10**400)]),
        ([5], [scored_token(token="token_id:9999999999")]),
        ([5], [scored_token(top_logprobs=3)]),
        ([5], [scored_token(top_logprobs=[scored_token(logprob=None)])]),
    ],
)
def test_numbers_that_are_no_tokens_or_scores_are_a_broken_response(tokens: Any, content: Any) -> None:
    with pytest.raises(BrokenResponse):
        _picked(tokens, None if content is None else {"content": content})


def test_a_look_that_fails_is_not_the_last(front: Assistant, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    admit = SplitEngine._admit

    async def stumbling(engine: SplitEngine, model: Any) -> None:
        looks.append(1)
        if len(looks) < 3:
            raise TypeError("a fault of ours")
        await admit(engine, model)

    monkeypatch.setattr(SplitEngine, "_admit", stumbling)

    async def work(engine: SplitEngine) -> None:
        engine.start()
        while not engine.ready:
            await asyncio.sleep(0.02)

    with_engine(front, backend.url, work, look=False)
    assert len(looks) == 3
