"""The embedded engine: whatever else is in the batch, a request gets the answer it gets alone; the one to blame fails alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image

from llava.inference import MICRO_MODEL, Assistant, Message, Options, Question, write_prompt
from llava.messages import RoutingRequest
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.engine.failures import FAILED_ITERATIONS
from llava.serve.engine.outbox import EngineGeneration
from llava.serve.engine.prepare import Preparer
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
)

EVAL = MICRO_MODEL.parent / "eval"


@dataclass
class Outcome:
    text: str
    events: list[Event]

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, str]]:
    """Questions of every family about several pictures."""
    rows = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()[:36:3]]
    return [(Image.open(EVAL / row["image"]).convert("RGB"), row["text"]) for row in rows]


def request(picture: Image.Image | None, text: str, name: str = "r", **fields: Any) -> GenerationRequest:
    images = () if picture is None else (picture,)
    fields.setdefault("sampling", Sampling(max_new_tokens=24))
    return GenerationRequest(name, (Message("user", text),), images=images, **fields)


def submit(engine: EmbeddedEngine, wanted: GenerationRequest) -> EngineGeneration:
    """Ask about the images themselves, which a request of these tests holds."""
    return engine.submit(replace(wanted, images=tuple(map(engine.prepare_image, wanted.images))))


async def collect(engine: EmbeddedEngine, wanted: GenerationRequest) -> Outcome:
    events = [event async for event in submit(engine, wanted)]
    return Outcome("".join(event.text for event in events if isinstance(event, Piece)), events)


async def attempt(engine: EmbeddedEngine, wanted: GenerationRequest) -> Outcome | ServeError:
    try:
        return await collect(engine, wanted)
    except ServeError as error:
        return error


@asynccontextmanager
async def running(assistant: Assistant, **options: Any) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(assistant, "micro", **options)
    try:
        yield engine
    finally:
        await engine.close()


def serve(assistant: Assistant, use: Callable[[EmbeddedEngine], Awaitable[Any]], **options: Any) -> Any:
    """Run `use(engine)` with an engine of its own, within a minute."""

    async def main() -> Any:
        async with running(assistant, **options) as engine:
            return await use(engine)

    return asyncio.run(asyncio.wait_for(main(), 60))


def all_at_once(*wanted: GenerationRequest) -> Callable[[EmbeddedEngine], Awaitable[list[Any]]]:
    async def use(engine: EmbeddedEngine) -> list[Any]:
        return await asyncio.gather(*(attempt(engine, each) for each in wanted))

    return use


def hold_until(engine: EmbeddedEngine, count: int) -> None:
    """Let the engine take requests in only when so many wait, so that they share their first batch."""
    original, together = engine.batching_delay.is_over, threading.Event()

    def is_over(waiting: int, running: int, free: int) -> bool:
        if waiting >= count:
            together.set()
        return together.wait(0.001) and original(waiting, running, free)

    engine.batching_delay.is_over = is_over  # type: ignore[method-assign]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise TimeoutError


def alone(assistant: Assistant, wanted: GenerationRequest) -> str:
    sampling = wanted.sampling
    options = Options(
        max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.min_new_tokens, stop=sampling.stop, routing=wanted.routing
    )
    return assistant.answer(wanted.images, wanted.messages, options).text


# ---- right answers -----------------------------------------------------------------------------------------------------------


def test_a_crowd_gets_the_answers_that_each_gets_alone(micro, asked):
    two = asked[0][0], asked[5][0]
    wanted = [
        *(request(picture, text) for picture, text in asked),
        request(asked[1][0], asked[1][1], routing=RoutingRequest(granularity=4)),
        request(asked[1][0], asked[1][1], routing=RoutingRequest(granularity=[16, 64])),
        request(asked[1][0], asked[1][1], routing=RoutingRequest(max_visual_tokens=50)),
        request(None, "Who are you?"),
        GenerationRequest("two", (Message("user", "<image> <image> Which is larger?"),), images=two, sampling=Sampling(max_new_tokens=9)),
        request(asked[2][0], "What?", sampling=Sampling(max_new_tokens=2)),
    ]
    outcomes = serve(micro, all_at_once(*wanted), max_batch_rows=5)
    assert [outcome.text for outcome in outcomes] == [alone(micro, each) for each in wanted]
    assert len({outcome.end.images[0].granularity for outcome in outcomes if outcome.end.images}) > 2


def test_requests_join_while_others_are_being_answered(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Outcome]:
        first = asyncio.create_task(collect(engine, request(*asked[4], sampling=Sampling(max_new_tokens=24))))
        later = []
        for picture, text in asked[5:9]:
            await asyncio.sleep(0.02)
            later.append(asyncio.create_task(collect(engine, request(picture, text))))
        return [await first, *[await each for each in later]]

    outcomes = serve(micro, use)
    assert [outcome.text for outcome in outcomes] == [alone(micro, request(*each)) for each in asked[4:9]]


def test_the_published_layout_in_a_batch(oracle):
    """Several views unpadded by the pooled grid, router over views, another tokenizer: the recorded model of the oracle."""
    assistant = Assistant.load(str(oracle / "checkpoint"), device="cpu")
    pictures = [Image.open(path).convert("RGB") for path in sorted((oracle / "images").glob("*.png"))[:4]]
    wanted = [request(picture, f"What is picture {index}?", sampling=Sampling(max_new_tokens=8)) for index, picture in enumerate(pictures)]
    outcomes = serve(assistant, all_at_once(*wanted))
    assert [outcome.text for outcome in outcomes] == [alone(assistant, each) for each in wanted]


def test_eager_attention_gives_the_same_answers(asked):
    """transformers builds masks of its own for it: of a prompt that is read while others run, and of rows that are equally long."""
    assistant = Assistant.load(device="cpu", attn_implementation="eager")
    assert assistant.model.config._attn_implementation == "eager"
    same, more = Sampling(max_new_tokens=12, min_new_tokens=12), Sampling(max_new_tokens=120, min_new_tokens=120)
    wanted = [request(None, "Tell me more, please.", sampling=more), *(request(*asked[index], sampling=same) for index in (0, 0, 1, 2))]

    async def use(engine: EmbeddedEngine) -> list[Any]:
        first = asyncio.create_task(attempt(engine, wanted[0]))
        while not engine.stats().running:
            await asyncio.sleep(0)
        return [*await all_at_once(*wanted[1:])(engine), await first]

    *outcomes, first = serve(assistant, use)
    assert [outcome.text for outcome in (first, *outcomes)] == [alone(assistant, each) for each in wanted]


def test_a_finished_prompt_with_placeholders_is_taken_as_it_is(micro, asked):
    picture, text = asked[0]
    whole = request(picture, text)
    prompt = f"USER: <image>\n{text} ASSISTANT:"
    full = write_prompt(whole.messages, 1, "v1")
    same = GenerationRequest("p", prompt=full, images=(picture,), sampling=whole.sampling)
    outcomes = serve(micro, all_at_once(whole, same, replace(same, prompt=prompt)))
    assert outcomes[0].text == outcomes[1].text == alone(micro, whole)
    assert outcomes[2].end.prompt_tokens < outcomes[1].end.prompt_tokens


def test_pieces_make_the_answer_and_the_end_counts_it(micro, asked):
    wanted = request(asked[0][0], asked[0][1])
    outcome = serve(micro, lambda engine: collect(engine, wanted))
    answer = micro.answer(wanted.images, wanted.messages)
    assert isinstance(outcome.events[0], Started)
    assert outcome.end.completion_tokens == len(answer.token_ids)
    assert outcome.end.prompt_tokens == outcome.events[0].prompt_tokens == answer.prompt_tokens
    assert outcome.end.finish_reason == "stop"
    assert outcome.end.images[0].visual_tokens == answer.reports[0].num_visual_tokens
    assert sum(outcome.end.images[0].probabilities) == pytest.approx(1)
    assert outcome.end.images[0].grid is not None
    assert {"queue", "views", "vision", "router", "splice", "prefill", "ttft", "decode", "total"} <= set(outcome.end.milliseconds)


def test_stop_texts_and_length_end_an_answer(micro, asked):
    picture, text = next((picture, text) for picture, text in asked if len(alone(micro, request(picture, text)).split()) > 1)
    whole = alone(micro, request(picture, text))
    word = whole.split()[1]
    stopped = request(picture, text, sampling=Sampling(max_new_tokens=24, stop=(word,)))
    short = request(picture, text, sampling=Sampling(max_new_tokens=1))
    first, second = serve(micro, all_at_once(stopped, short))
    assert first.text == whole.split(word)[0].strip()
    assert first.end.finish_reason == "stop"
    assert second.end.finish_reason == "length"
    assert second.end.completion_tokens == 1


def test_an_answer_may_have_to_have_a_length(micro, asked):
    """As transformers' min_new_tokens has it, in a crowd where only some ask for it."""
    wanted = [request(*each, sampling=Sampling(max_new_tokens=12, min_new_tokens=9 * (place % 2))) for place, each in enumerate(asked[:6])]
    outcomes = serve(micro, all_at_once(*wanted))
    for each, outcome in zip(wanted, outcomes, strict=True):
        options = Options(max_new_tokens=12, min_new_tokens=each.sampling.min_new_tokens)
        answer = micro.answer(each.images, each.messages, options)
        assert (outcome.text, outcome.end.completion_tokens) == (answer.text, len(answer.token_ids))
        assert outcome.end.completion_tokens >= each.sampling.min_new_tokens
    with pytest.raises(ValueError, match="min_new_tokens is 9, expected 0 to max_new_tokens, 3"):
        Options(max_new_tokens=3, min_new_tokens=9)


SHAPED = [
    Sampling(max_new_tokens=12, min_new_tokens=12, repetition_penalty=1.3),
    Sampling(max_new_tokens=12, min_new_tokens=12, presence_penalty=2.0, frequency_penalty=2.0),
    Sampling(max_new_tokens=12, min_new_tokens=12, frequency_penalty=-2.0, temperature=1.2, seed=1),
    Sampling(max_new_tokens=12, temperature=2.0, top_k=3, seed=2),
    Sampling(max_new_tokens=12, temperature=2.0, min_p=0.2, top_p=0.9, seed=3),
    Sampling(max_new_tokens=12, ignore_eos=True),
    Sampling(max_new_tokens=12),
]


def test_a_crowd_that_wants_its_tokens_drawn_differently_gets_what_each_gets_alone(micro, asked):
    wanted = [request(*each, sampling=params) for each, params in zip(asked, SHAPED, strict=False)]

    async def one_by_one(engine: EmbeddedEngine) -> list[Any]:
        return [await attempt(engine, each) for each in wanted]

    outcomes = serve(micro, all_at_once(*wanted))
    for outcome, single in zip(outcomes, serve(micro, one_by_one), strict=True):
        assert (outcome.text, outcome.end.completion_tokens) == (single.text, single.end.completion_tokens)
    plain = [alone(micro, replace(each, sampling=replace(SHAPED[-1], min_new_tokens=each.sampling.min_new_tokens))) for each in wanted]
    assert sum(outcome.text != text for outcome, text in zip(outcomes, plain, strict=True)) >= 4
    assert outcomes[-1].text == plain[-1]
    repeated = outcomes[1].text.split()
    assert len(set(repeated)) > len(set(plain[1].split())) or len(repeated) == len(set(repeated))


def test_an_answer_ends_where_the_request_says(micro, asked):
    picture, text = next((picture, text) for picture, text in asked if len(alone(micro, request(picture, text)).split()) > 1)
    [plain] = serve(micro, all_at_once(request(picture, text, sampling=Sampling(max_new_tokens=24, logprobs=0))))
    words = scored_texts(plain)
    ids = micro.answer((picture,), (Message("user", text),), Options(max_new_tokens=24)).token_ids
    wanted = (
        Sampling(max_new_tokens=24, stop_token_ids=(ids[1],)),
        Sampling(max_new_tokens=24, stop_token_ids=(ids[1],), min_new_tokens=6),
        Sampling(max_new_tokens=24, ignore_eos=True),
        Sampling(max_new_tokens=24, logit_bias=((ids[0], -100.0),)),
    )
    stopped, later, endless, other = serve(micro, all_at_once(*(request(picture, text, sampling=params) for params in wanted)))
    assert (stopped.text, stopped.end.finish_reason, stopped.end.completion_tokens) == ("".join(words[:2]).strip(), "stop", 2)
    assert later.end.completion_tokens >= 6
    assert (endless.end.finish_reason, endless.end.completion_tokens) == ("length", 24)
    assert endless.text.startswith(plain.text) and plain.end.completion_tokens < 24
    assert not other.text.startswith(words[0].strip())


CHOICE = Guide(GuideKind.CHOICE, json.dumps(["a red sign", "a blue sign"]), "guided_choice")
SCHEMA = {"type": "object", "properties": {"known": {"type": "boolean"}, "number": {"enum": [1, 22, 333]}}, "required": ["known", "number"]}
OBJECT = Guide(GuideKind.JSON, json.dumps({**SCHEMA, "additionalProperties": False}), "response_format")
GUIDED = [
    Sampling(max_new_tokens=200, guide=OBJECT),
    Sampling(max_new_tokens=200, guide=OBJECT, temperature=1.5, seed=3, repetition_penalty=1.2, logprobs=2),
    Sampling(max_new_tokens=200, guide=CHOICE, min_new_tokens=100),
    Sampling(max_new_tokens=200, guide=CHOICE, ignore_eos=True, stop_token_ids=(5,)),
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=5, guide=Guide(GuideKind.REGEX, "[0-9]*", "guided_regex"), min_new_tokens=5),
    Sampling(max_new_tokens=24, guide=Guide(GuideKind.REGEX, "(x|y)+", "guided_regex"), stop=("yy",), temperature=2.0, seed=1),
]


def check_guided(outcomes: list[Any]) -> None:
    for outcome in outcomes[:2]:
        value = json.loads(outcome.text)
        assert value.keys() == {"known", "number"} and value["known"] in (True, False) and value["number"] in (1, 22, 333)
        assert outcome.end.finish_reason == "stop"
    assert outcomes[1].text == "".join(scored_texts(outcomes[1])).strip()
    for outcome in outcomes[2:4]:
        assert outcome.text in json.loads(CHOICE.text) and outcome.end.finish_reason == "stop" and outcome.end.completion_tokens < 30
    number = outcomes[5]
    assert number.text.isdecimal() and (number.end.completion_tokens, number.end.finish_reason) == (5, "length")
    assert set(outcomes[6].text) <= {"x", "y"} and "yy" not in outcomes[6].text


def test_a_crowd_whose_answers_have_to_be_something_gets_what_each_gets_alone(micro, asked):
    wanted = [request(*each, sampling=params) for each, params in zip(asked, GUIDED, strict=False)]

    async def one_by_one(engine: EmbeddedEngine) -> list[Any]:
        return [await attempt(engine, each) for each in wanted]

    outcomes, expected = serve(micro, all_at_once(*wanted)), serve(micro, one_by_one)
    assert [outcome.text for outcome in outcomes] == [single.text for single in expected]
    check_guided(outcomes)
    assert outcomes[4].text == alone(micro, wanted[4])


def test_those_who_are_preempted_are_held_to_the_same_afterwards(micro, asked):
    wanted = [request(*each, str(place), sampling=params) for place, (each, params) in enumerate(zip(asked, GUIDED, strict=False))]

    async def use(engine: EmbeddedEngine) -> list[Any]:
        await all_at_once(*wanted)(engine)  # so that their grammars are built, and all begin together
        steps_back = seldom_room(engine, 2, after=3)
        outcomes = await all_at_once(*wanted)(engine)
        assert steps_back
        return outcomes

    outcomes = serve(micro, use)
    check_guided(outcomes)
    assert [outcome.text for outcome in outcomes] == [outcome.text for outcome in serve(micro, all_at_once(*wanted))]


def test_an_answer_that_cannot_be_what_it_has_to_be_fails_alone(micro, asked):
    """One whose pattern cannot be read, one whose pattern grows too large on the way, and neighbours."""
    patterns = ["(a", "x(a{1000}){1000}", "x{3}"]
    wanted = [Sampling(max_new_tokens=9, guide=Guide(GuideKind.REGEX, pattern, "regex")) for pattern in patterns]
    unread, grown, good, free = serve(micro, all_at_once(*(request(*asked[0], sampling=params) for params in wanted), request(*asked[1])))
    for failed, told in ((unread, "is not supported"), (grown, "became too complex")):
        assert isinstance(failed, ServeError) and (failed.kind, failed.param) == (ErrorKind.INVALID_REQUEST, "regex")
        assert told in failed.detail
    assert good.text == "xxx" and free.text == alone(micro, request(*asked[1]))


@pytest.mark.parametrize(("name", "value"), [("logit_bias", ((10**6, 1.0),)), ("stop_token_ids", (641,))])
def test_a_token_that_the_vocabulary_has_not_is_refused_by_the_name_of_its_field(micro, asked, name, value):
    assert micro.model.config.vocab_size == 641
    wanted = request(*asked[0], sampling=Sampling(**{name: value}))
    [refused] = serve(micro, all_at_once(wanted))
    assert isinstance(refused, ServeError) and refused.kind is ErrorKind.INVALID_REQUEST and refused.param == name
    assert "vocabulary has 641" in refused.detail


def test_a_seed_repeats_whatever_else_is_in_the_batch(micro, asked):
    warm = Sampling(temperature=3.0, top_p=0.95, max_new_tokens=8, seed=7)
    seeded = request(*asked[0], sampling=warm)
    crowd = [request(*each, sampling=replace(warm, seed=None)) for each in asked[:6]]
    [lonely] = serve(micro, all_at_once(seeded))
    outcomes = serve(micro, all_at_once(*crowd[:3], seeded, *crowd[3:]))
    assert outcomes[3].text == lonely.text
    other = serve(micro, all_at_once(*(replace(seeded, sampling=replace(warm, seed=seed)) for seed in range(4))))
    assert len({outcome.text for outcome in other}) > 1


def test_log_probabilities_are_those_of_the_model(micro, asked):
    wanted = request(*asked[0], sampling=Sampling(max_new_tokens=24, logprobs=3))
    outcome = serve(micro, lambda engine: collect(engine, wanted))
    scores = [score for event in outcome.events if isinstance(event, Piece) for score in event.scores]
    assert len(scores) == outcome.end.completion_tokens - 1  # the end is no part of the answer
    assert all(len(score.alternatives) == 3 and score.alternatives[0] == (score.text, score.log_probability) for score in scores)
    [likelihood] = micro.log_likelihoods([Question(wanted.images, wanted.messages)], [outcome.text])
    assert sum(score.log_probability for score in scores) == pytest.approx(likelihood.log_probability, abs=1e-3)


# ---- pictures are encoded once -----------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once_for_all_questions_and_turns(micro, asked, monkeypatch):
    seen: list[int] = []
    original = micro.model.encode_images
    monkeypatch.setattr(micro.model, "encode_images", lambda views: seen.append(len(views)) or original(views))
    picture = asked[0][0]

    async def use(engine: EmbeddedEngine) -> tuple[list[Any], Any, Any]:
        hold_until(engine, 2)
        together = await all_at_once(request(picture, "What is this?"), request(picture.copy(), "Which colour is it?"))(engine)
        turns = (Message("user", "What is this?"), Message("assistant", "A picture."), Message("user", "Is it day or night?"))
        later = await collect(engine, GenerationRequest("t", turns, images=(picture,), sampling=Sampling(max_new_tokens=8)))
        return together, later, engine.stats()

    _, later, stats = serve(micro, use)
    assert seen == [5]
    assert later.end.images[0].cached
    assert stats.cache_entries == 1 and stats.cache_hits >= 1 and stats.cache_bytes > 0


def test_a_second_question_reads_only_what_is_new(micro, asked, monkeypatch):
    """The prompt up to the end of the picture is known, in a crowd of known and unknown ones too; the answers stay the same."""
    read: list[tuple[int, int]] = []

    async def use(engine: EmbeddedEngine) -> list[Any]:
        original = engine.batch.prefill

        def noting(tasks: Any) -> Any:
            read.extend((task.pending.prefix_length, task.pending.row.length) for task in tasks)
            return original(tasks)

        engine.batch.prefill = noting  # type: ignore[method-assign]
        first = await all_at_once(*(request(*each) for each in asked[:4]))(engine)
        again = await all_at_once(*(request(*each) for each in asked[:6]))(engine)
        turns = (Message("user", asked[0][1]), Message("assistant", first[0].text), Message("user", asked[0][1]))
        later = [await attempt(engine, GenerationRequest("turns", turns, images=(asked[0][0],), sampling=Sampling(max_new_tokens=24)))]
        assert engine.prefixes.hits >= 5 and engine.prefixes.bytes > 0
        return [*first, *again, *later]

    outcomes = serve(micro, use)
    lengths = {outcome.end.prompt_tokens for outcome in outcomes}
    known = [entry for entry in read if entry[0]]
    assert len(known) >= 5
    assert all(before > 40 and sum((before, now)) in lengths for before, now in known)
    assert [outcome.text for outcome in outcomes[:4]] == [outcome.text for outcome in outcomes[4:8]]
    turns = [Message("user", asked[0][1]), Message("assistant", outcomes[0].text), Message("user", asked[0][1])]
    expected = [alone(micro, request(*each)) for each in (*asked[:4], *asked[:6])]
    assert [outcome.text for outcome in outcomes] == [*expected, micro.answer([asked[0][0]], turns, Options(max_new_tokens=24)).text]


def test_a_prompt_that_ends_with_its_picture_can_be_asked_twice(micro, asked):
    wanted = GenerationRequest("p", prompt="USER: <image>", images=(asked[0][0],), sampling=Sampling(max_new_tokens=4))

    async def use(engine: EmbeddedEngine) -> list[Any]:
        return [await attempt(engine, wanted), await attempt(engine, wanted)]

    first, second = serve(micro, use)
    assert first.text == second.text


def test_without_a_cache_nothing_is_kept(micro, asked):
    async def use(engine: EmbeddedEngine) -> tuple[Any, Any, int]:
        await collect(engine, request(*asked[0]))
        again = await collect(engine, request(*asked[0]))
        return again, engine.stats(), len(engine.prefixes)

    again, stats, prefixes = serve(micro, use, cache_bytes=0, prefix_cache_bytes=0)
    assert not again.end.images[0].cached
    assert prefixes == 0
    assert (stats.cache_entries, stats.cache_bytes) == (0, 0)


# ---- one to blame ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "kind", "sentence"),
    [
        (lambda p: request(p, "Hi", routing=RoutingRequest(granularity=5)), ErrorKind.INVALID_REQUEST, r"this model has \[4, 8"),
        (lambda p: request(p, "Hi", routing=RoutingRequest(max_visual_tokens=3)), ErrorKind.INVALID_REQUEST, "raise the budget"),
        (lambda p: GenerationRequest("e", (Message("user", " "),)), ErrorKind.INVALID_REQUEST, "is empty"),
        (lambda p: request(p, "<image> <image> same?"), ErrorKind.INVALID_REQUEST, "holds 2 <image> placeholders"),
        (lambda p: request(p, "word " * 9000), ErrorKind.CONTEXT_LENGTH, "leaves no room for an answer within"),
        (lambda p: request(Image.new("RGB", (900, 2)), "Hi"), ErrorKind.INVALID_IMAGE, "An image cannot be used"),
        (lambda p: GenerationRequest("e", prompt=""), ErrorKind.INVALID_REQUEST, "The prompt is empty"),
        (lambda p: GenerationRequest("e", prompt="USER: <image>"), ErrorKind.INVALID_REQUEST, "write one <image> per image"),
    ],
)
def test_a_request_that_cannot_work_fails_alone_with_a_sentence(micro, asked, wanted, kind, sentence):
    good = request(*asked[0])
    outcomes = serve(micro, all_at_once(good, wanted(asked[0][0]), request(*asked[1])))
    assert outcomes[0].text == alone(micro, good)
    assert outcomes[2].text == alone(micro, request(*asked[1]))
    assert isinstance(outcomes[1], ServeError) and outcomes[1].kind == kind
    with pytest.raises(ServeError, match=sentence):
        raise outcomes[1]


def fail_on(part: object, method: str, when: Callable[..., bool], error: BaseException) -> None:
    """Make a method of the engine, or of one of its parts, fail on certain calls."""
    original = getattr(part, method)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error
        return original(*args, **kwargs)

    setattr(part, method, failing)


@pytest.mark.parametrize("method", ["_encode", "_prefill", "pick"])
def test_a_poisoned_request_fails_alone(micro, asked, method):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        def poisoned(*args: Any) -> bool:
            return any(task.request.request_id == "poison" and (method != "pick" or task.stream.ids) for task in args[-1])

        fail_on(engine.batch if method == "pick" else engine, method, poisoned, RuntimeError("a secret at 0x7f00"))
        wanted = [request(*asked[0]), request(*asked[1], "poison"), request(*asked[2]), request(*asked[3])]
        return await all_at_once(*wanted)(engine)

    outcomes = serve(micro, use)
    assert isinstance(outcomes[1], ServeError) and outcomes[1].kind == ErrorKind.INTERNAL
    assert "0x7f00" not in str(outcomes[1])
    for index in (0, 2, 3):
        assert outcomes[index].text == alone(micro, request(*asked[index]))


def test_running_out_of_memory_in_a_step_costs_nobody_an_answer(micro, asked):
    def large_step(inputs_embeds: torch.Tensor, **others: Any) -> bool:
        return inputs_embeds.shape[0] > 2 and inputs_embeds.shape[1] == 1

    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine.batch, "language_model", large_step, MemoryError())
        outcomes = await all_at_once(*(request(*each) for each in asked[:6]))(engine)
        assert engine.stats().running == 0
        return outcomes

    outcomes = serve(micro, use)
    assert [outcome.text for outcome in outcomes] == [alone(micro, request(*each)) for each in asked[:6]]


def seldom_room(engine: EmbeddedEngine, rows: int, after: int = 1) -> list[tuple[int, int]]:
    """Memory for the steps of so many requests only, whatever part of them a pass is about, once all that run have written `after` tokens.

    Returns preemptions as (running, written).
    """
    seen: list[tuple[int, int]] = []
    original = engine.batch.preempt

    def preempt() -> Any:
        running, task = len(engine.batch.tasks), original()
        if task is not None:
            seen.append((running, len(task.stream.ids)))
        return task

    def short(inputs_embeds: torch.Tensor, **others: Any) -> bool:
        written = [len(task.stream.ids) for task in engine.batch.tasks]
        return inputs_embeds.shape[1] == 1 and len(written) > rows and (bool(seen) or min(written) >= after)

    engine.batch.preempt = preempt  # type: ignore[method-assign]
    fail_on(engine.batch, "language_model", short, torch.OutOfMemoryError("oom"))
    return seen


def scored_texts(outcome: Outcome) -> list[str]:
    return [score.text for event in outcome.events if isinstance(event, Piece) for score in event.scores]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_youngest_are_preempted_when_not_all_fit_and_lose_nothing(micro, asked, rows):
    same = {"max_new_tokens": 14, "min_new_tokens": 14}
    wanted = [request(*each, str(place), sampling=Sampling(**same)) for place, each in enumerate(asked[:4])]
    wanted += [request(*asked[4], "warm", sampling=Sampling(**same, temperature=1.5, seed=3)), request(None, "Who are you?", "text")]
    wanted.append(request(*asked[5], "scored", sampling=Sampling(max_new_tokens=9, min_new_tokens=9, logprobs=1)))
    wanted.append(request(*asked[6], "warm too", sampling=Sampling(**same, temperature=1.5, seed=4), routing=RoutingRequest(bias=-1.0)))
    heavy = Sampling(**same, temperature=1.5, seed=5, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, top_k=20)
    wanted.append(request(*asked[7], "penalised", sampling=heavy))

    async def use(engine: EmbeddedEngine) -> tuple[list[Any], list[tuple[int, int]]]:
        steps_back = seldom_room(engine, rows, after=3)
        return await all_at_once(*wanted)(engine), steps_back

    async def one_by_one(engine: EmbeddedEngine) -> list[Any]:
        return [await attempt(engine, each) for each in wanted]

    outcomes, steps_back = serve(micro, use)
    expected = serve(micro, one_by_one)
    assert len(steps_back) >= 2 and steps_back[0][1] >= 3
    for outcome, single in zip(outcomes, expected, strict=True):
        assert outcome.text == single.text
        assert [type(event) for event in outcome.events].count(Started) == 1
        assert outcome.end.completion_tokens == single.end.completion_tokens
        assert [image.granularity for image in outcome.end.images] == [image.granularity for image in single.end.images]
        assert scored_texts(outcome) == scored_texts(single)
        parts = outcome.end.milliseconds
        named = ("queue", "views", "vision", "router", "splice", "prefill")
        assert sum(parts.get(name, 0.0) for name in named) == pytest.approx(parts["ttft"])


def test_one_that_steps_back_and_finds_no_room_for_its_row_waits(micro, asked):
    """Memory for two rows, also when they are reserved."""

    async def use(engine: EmbeddedEngine) -> list[Any]:
        seldom_room(engine, 2)
        fail_on(engine.batch.slots, "reserve", lambda rows, *others: rows > 3, MemoryError())
        return await all_at_once(*(request(*each, sampling=Sampling(max_new_tokens=9, min_new_tokens=9)) for each in asked[:6]))(engine)

    outcomes = serve(micro, use, cache_bytes=0, prefix_cache_bytes=0)  # pictures are encoded again
    expected = [alone(micro, request(*each, sampling=Sampling(max_new_tokens=9, min_new_tokens=9))) for each in asked[:6]]
    assert [outcome.text for outcome in outcomes] == expected


def test_what_does_not_fit_even_alone_fails_and_the_others_come_back(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        def short(inputs_embeds: torch.Tensor, **others: Any) -> bool:
            return inputs_embeds.shape[1] == 1 and any(task.name == "large" for task in engine.batch.tasks)

        fail_on(engine.batch, "language_model", short, torch.OutOfMemoryError("oom"))
        hold_until(engine, 4)
        outcomes = await all_at_once(request(*asked[0], "large"), *(request(*each) for each in asked[1:4]))(engine)
        assert (engine.stats().waiting, engine.stats().running) == (0, 0)
        return outcomes

    large, *others = serve(micro, use)
    assert isinstance(large, ServeError) and large.kind == ErrorKind.OUT_OF_MEMORY
    assert [outcome.text for outcome in others] == [alone(micro, request(*each)) for each in asked[1:4]]


def test_one_that_steps_back_can_be_cancelled(micro, asked):
    endless = Sampling(max_new_tokens=400, min_new_tokens=400)

    async def use(engine: EmbeddedEngine) -> list[Any]:
        steps_back = seldom_room(engine, 1)
        hold_until(engine, 2)
        first, second = (submit(engine, request(*asked[index], sampling=endless)) for index in (0, 1))
        await asyncio.to_thread(wait_for, lambda: bool(steps_back))
        second.cancel()
        first.cancel()
        await asyncio.wait_for(engine.drain(), 5)
        return [engine.stats().waiting, engine.stats().running]

    assert serve(micro, use) == [0, 0]


def test_one_request_that_does_not_fit_into_memory_is_told_so(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine.batch, "language_model", lambda **inputs: inputs["inputs_embeds"].shape[1] > 300, torch.OutOfMemoryError("oom"))
        large = request(*asked[0], routing=RoutingRequest(granularity=64))
        return await all_at_once(large, request(*asked[1], routing=RoutingRequest(granularity=4)))(engine)

    large, small = serve(micro, use)
    assert isinstance(large, ServeError) and large.kind == ErrorKind.OUT_OF_MEMORY
    assert small.text == alone(micro, request(*asked[1], routing=RoutingRequest(granularity=4)))


@pytest.mark.parametrize("tokens", [0, 2])
def test_broken_numbers_fail_their_own_row(micro, asked, tokens):
    """At the first token or later, with a neighbour on either side."""
    groups: list[list[str]] = []

    async def use(engine: EmbeddedEngine) -> list[Any]:
        original = engine.batch.pick

        def pick(hidden: torch.Tensor, tasks: Any) -> Any:
            poisoned = [task.request.request_id == "poison" and len(task.stream.ids) >= tokens for task in tasks]
            if any(poisoned):
                groups.append([task.request.request_id for task in tasks])
            return original(hidden.masked_fill(torch.tensor(poisoned)[:, None], float("nan")), tasks)

        engine.batch.pick = pick  # type: ignore[method-assign]
        hold_until(engine, 3)
        return await all_at_once(*wanted)(engine)

    wanted = [request(*asked[0], name, sampling=Sampling(max_new_tokens=8, min_new_tokens=8)) for name in ("left", "poison", "right")]
    left, poison, right = serve(micro, use)
    assert [len(group) for group in groups] == [3]
    assert isinstance(poison, ServeError) and poison.kind == ErrorKind.NOT_FINITE
    assert left.text == right.text == alone(micro, wanted[0])


def test_broken_numbers_leave_nothing_behind(micro, asked, monkeypatch):
    """Neither in the rows of the batch, nor in what is kept of pictures and prompts: the same picture is answered a moment later."""
    texts = "Hi?", "Tell me more about the colours of the sky and the sea."
    original, broken = micro.model.encode_images, [True]
    monkeypatch.setattr(micro.model, "encode_images", lambda views: original(views) * (float("nan") if broken and broken.pop() else 1))

    async def use(engine: EmbeddedEngine) -> list[Any]:
        first = await attempt(engine, request(*asked[0]))
        together = await all_at_once(*(request(None, text) for text in texts))(engine)
        return [first, *together, await attempt(engine, request(*asked[0])), len(engine.features)]

    first, short, long, again, kept = serve(micro, use)
    assert isinstance(first, ServeError) and first.kind == ErrorKind.NOT_FINITE
    assert [short.text, long.text] == [alone(micro, request(None, text)) for text in texts]
    assert again.text == alone(micro, request(*asked[0]))
    assert kept == 1


def test_a_passing_failure_of_the_model_alone_is_not_remembered_with_the_picture(micro, asked, monkeypatch):
    original, broken = micro.model.lm_head.forward, [True]
    monkeypatch.setattr(micro.model.lm_head, "forward", lambda hidden: original(hidden) * (float("nan") if broken and broken.pop() else 1))

    async def use(engine: EmbeddedEngine) -> list[Any]:
        return [await attempt(engine, request(*asked[0])), await attempt(engine, request(*asked[0]))]

    first, second = serve(micro, use)
    assert isinstance(first, ServeError) and first.kind == ErrorKind.NOT_FINITE
    assert second.text == alone(micro, request(*asked[0]))


def test_a_known_picture_is_answered_after_the_batch_was_given_up(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        first = await attempt(engine, request(*asked[0]))
        broken = [True]
        fail_on(engine, "_drop_cancelled", lambda: bool(broken) and broken.pop(), RuntimeError("odd"))
        return [first, await attempt(engine, request(*asked[0])), await attempt(engine, request(*asked[0]))]

    first, given_up, again = serve(micro, use)
    assert isinstance(given_up, ServeError) and given_up.kind == ErrorKind.INTERNAL
    assert again.text == first.text


def test_a_passing_failure_of_a_step_slows_nobody_down(micro, asked):
    rows: list[int] = []

    async def use(engine: EmbeddedEngine) -> list[Any]:
        broken = [True]

        def once(first: int, tasks: Any) -> bool:
            rows.append(len(tasks))
            return len(tasks) >= 4 and bool(broken) and broken.pop()

        fail_on(engine.batch, "decode", once, RuntimeError("odd"))
        return await all_at_once(*(request(*each, sampling=Sampling(max_new_tokens=12, min_new_tokens=12)) for each in asked[:6]))(engine)

    outcomes = serve(micro, use)
    assert not any(isinstance(outcome, ServeError) for outcome in outcomes)
    place = next(index for index, count in enumerate(rows) if count >= 4)
    assert rows[place + 1] < 4 and max(rows[place + 3 :]) >= 4  # in halves once, then together again


def test_a_prompt_that_does_not_fit_beside_others_waits_for_them(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine.batch, "prefill", lambda tasks: len(tasks) + len(engine.batch.tasks) > 2, MemoryError())
        outcomes = await all_at_once(*(request(*each) for each in asked[:6]))(engine)
        assert engine.stats().running == engine.stats().waiting == 0
        return outcomes

    outcomes = serve(micro, use)
    assert [outcome.text for outcome in outcomes] == [alone(micro, request(*each)) for each in asked[:6]]


def test_what_cannot_be_kept_costs_nobody_an_answer_or_a_place(micro, asked, monkeypatch):
    async def use(engine: EmbeddedEngine) -> tuple[list[Any], int]:
        monkeypatch.setattr(engine.prefixes, "put", lambda *each: (_ for _ in ()).throw(MemoryError()))
        outcomes = await all_at_once(*(request(*each) for each in asked[:3]))(engine)
        await asyncio.wait_for(engine.drain(), 5)
        return outcomes, engine.stats().waiting

    outcomes, outstanding = serve(micro, use)
    assert [outcome.text for outcome in outcomes] == [alone(micro, request(*each)) for each in asked[:3]]
    assert outstanding == 0


def test_an_answer_that_cannot_be_written_down_fails_alone(micro, asked, monkeypatch):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine, "_record", lambda task, token, picked: task.request.request_id == "bad", RuntimeError("odd"))
        return await all_at_once(request(*asked[0]), request(*asked[1], "bad"), request(*asked[2]))(engine)

    outcomes = serve(micro, use)
    assert isinstance(outcomes[1], ServeError) and outcomes[1].kind == ErrorKind.INTERNAL
    assert [outcomes[index].text for index in (0, 2)] == [alone(micro, request(*asked[index])) for index in (0, 2)]


def test_the_parts_of_the_time_to_the_first_token_make_it_up(micro, asked):
    outcomes = serve(micro, all_at_once(*(request(*each) for each in asked[:5])), max_batch_tokens=500)
    for outcome in outcomes:
        parts = outcome.end.milliseconds
        named = sum(parts[name] for name in ("queue", "views", "vision", "router", "splice", "prefill"))
        assert named == pytest.approx(parts["ttft"], rel=1e-6)
        assert parts["queue"] > -1e-6


def test_requests_of_one_name_are_told_apart_without_looking_at_their_pictures(micro, asked, monkeypatch):
    monkeypatch.setattr(EngineImage, "__eq__", lambda self, other: pytest.fail("pictures were compared"))

    async def use(engine: EmbeddedEngine) -> list[Any]:
        generations = [submit(engine, request(asked[0][0].copy(), "Which?", "same")) for _ in range(6)]
        for generation in generations[3:]:
            generation.cancel()
        return [event async for event in generations[0]]

    assert isinstance(serve(micro, use, max_batch_rows=1)[-1], Finished)


def test_a_failure_outside_of_any_request_ends_the_running_ones_and_the_engine_goes_on(micro, asked):
    async def use(engine: EmbeddedEngine) -> tuple[list[Any], Outcome]:
        broken = [True]
        fail_on(engine, "_drop_cancelled", lambda: broken.pop() if broken else False, RuntimeError("odd"))
        first = await all_at_once(request(*asked[0]))(engine)
        return first, await collect(engine, request(*asked[1]))

    [first], second = serve(micro, use)
    assert isinstance(first, ServeError) and first.kind == ErrorKind.INTERNAL
    assert second.text == alone(micro, request(*asked[1]))


# ---- coming and going --------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_gives_its_place_back(micro, asked):
    endless = Sampling(max_new_tokens=900, min_new_tokens=900)

    async def use(engine: EmbeddedEngine) -> tuple[int, Outcome]:
        generation = submit(engine, request(*asked[0], sampling=endless))
        other = asyncio.create_task(collect(engine, request(*asked[1])))
        async for event in generation:
            if isinstance(event, Piece):
                break
        generation.cancel()
        generation.cancel()
        outcome = await other
        for _ in range(200):
            if not engine.stats().running:
                break
            await asyncio.sleep(0.01)
        return engine.stats().running, outcome

    left, outcome = serve(micro, use)
    assert left == 0
    assert outcome.text == alone(micro, request(*asked[1]))


def test_more_than_the_queue_holds_is_refused_at_once(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        return await all_at_once(*(request(*asked[index % 4]) for index in range(9)))(engine)

    outcomes = serve(micro, use, max_batch_rows=2, max_queue=3)
    refused = [outcome for outcome in outcomes if isinstance(outcome, ServeError)]
    assert len(refused) == 4 and {error.kind for error in refused} == {ErrorKind.OVERLOADED}
    for index, outcome in enumerate(outcomes):
        assert isinstance(outcome, ServeError) or outcome.text == alone(micro, request(*asked[index % 4]))


def test_draining_finishes_what_runs_and_takes_no_more(micro, asked):
    async def use(engine: EmbeddedEngine) -> tuple[Any, Any]:
        first = asyncio.create_task(attempt(engine, request(*asked[0])))
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        assert not engine.ready
        late = await attempt(engine, request(*asked[1]))
        await draining
        return await first, late

    first, late = serve(micro, use)
    assert first.text == alone(micro, request(*asked[0]))
    assert isinstance(late, ServeError) and late.kind == ErrorKind.DRAINING


def test_closing_ends_what_runs(micro, asked):
    async def main() -> Any:
        engine = EmbeddedEngine(micro, "micro")
        first = asyncio.create_task(attempt(engine, request(*asked[0], sampling=Sampling(max_new_tokens=900, min_new_tokens=900))))
        await asyncio.sleep(0.2)
        await engine.close()
        return await first

    outcome = asyncio.run(asyncio.wait_for(main(), 30))
    assert isinstance(outcome, ServeError) and outcome.kind == ErrorKind.CANCELLED


def test_closing_tells_those_that_are_still_being_prepared(micro, asked, monkeypatch):
    started = threading.Event()

    write = Preparer._ids

    def slow(self: Any, request: Any) -> Any:
        started.set()
        time.sleep(0.5)
        return write(self, request)

    monkeypatch.setattr(Preparer, "_ids", slow)

    async def main() -> list[Any]:
        engine = EmbeddedEngine(micro, "micro")
        tasks = [asyncio.create_task(attempt(engine, request(*asked[index]))) for index in range(4)]
        await asyncio.to_thread(started.wait, 5)
        await engine.close()
        return await asyncio.gather(*tasks)

    outcomes = asyncio.run(asyncio.wait_for(main(), 20))
    assert all(isinstance(outcome, ServeError) and outcome.kind == ErrorKind.CANCELLED for outcome in outcomes)


@pytest.mark.parametrize("part", ["_encode", "_prefill"])
def test_requests_that_are_on_their_way_when_the_accelerator_dies_are_told_too(micro, asked, part):
    """Neither waiting nor running: taken out of a queue, in work, and what cleans up after a failure fails as well."""

    async def use(engine: EmbeddedEngine) -> list[Any]:
        broken = [True]
        fail_on(engine, part, lambda tasks: bool(broken), RuntimeError("device-side assert"))
        fail_on(engine.batch.slots, "wipe_unused", lambda: bool(broken), RuntimeError("device-side assert"))
        hold_until(engine, 3)
        outcomes = await all_at_once(*(request(*each) for each in asked[:3]))(engine)
        await asyncio.sleep(0)
        counts = engine.stats().waiting, engine.stats().running
        broken.clear()
        return [*outcomes, counts, await attempt(engine, request(*asked[0])), await asyncio.wait_for(engine.drain(), 5)]

    *outcomes, counts, again, _ = serve(micro, use)
    assert [outcome.kind for outcome in outcomes] == [ErrorKind.INTERNAL] * 3
    assert counts == (0, 0)
    assert again.text == alone(micro, request(*asked[0]))


def test_requests_that_are_being_prepared_when_the_engines_thread_dies_are_told(micro, asked, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    write = Preparer._ids

    def slow(self: Any, request: Any) -> Any:
        if request.images:
            started.set()
            go_on.wait(10)
        return write(self, request)

    async def use(engine: EmbeddedEngine) -> list[Any]:
        monkeypatch.setattr(Preparer, "_ids", slow)
        fail_on(engine, "_drop_cancelled", lambda: True, SystemExit())
        tasks = [asyncio.create_task(attempt(engine, request(*asked[0])))]
        await asyncio.to_thread(started.wait, 5)
        tasks.append(asyncio.create_task(attempt(engine, request(None, "Hi?"))))  # wakes the engine, which dies
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks), 5)
        go_on.set()
        return [*outcomes, await asyncio.wait_for(engine.drain(), 5)]

    first, second, _ = serve(micro, use)
    assert first.kind == second.kind == ErrorKind.INTERNAL


def test_a_request_that_comes_while_the_engine_closes_is_refused_and_takes_no_place(micro, asked, monkeypatch):
    """Whether it closes before the request's place was taken, or no thread can be had to prepare it."""
    import llava.serve.engine.embedded as module

    async def use(engine: EmbeddedEngine) -> list[Any]:
        monkeypatch.setattr(engine._preparers, "submit", lambda *each: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        no_thread = await attempt(engine, request(*asked[0]))
        original = module.template_stops

        def close_meanwhile(template: str) -> Any:
            closing = threading.Thread(target=lambda: asyncio.run(engine.close()))
            closing.start()
            closing.join(10)
            return original(template)

        monkeypatch.setattr(module, "template_stops", close_meanwhile)
        late = await attempt(engine, request(*asked[0]))
        return [no_thread, late, engine.stats().waiting, await asyncio.wait_for(engine.drain(), 5)]

    no_thread, late, waiting, _ = serve(micro, use)
    assert (no_thread.kind, late.kind, waiting) == (ErrorKind.OVERLOADED, ErrorKind.DRAINING, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_if_the_engines_thread_dies_everyone_is_told(micro, asked):
    """An accelerator that has failed for good fails at everything, giving memory back included."""

    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine, "_drop_cancelled", lambda: True, RuntimeError("device-side assert"))
        fail_on(engine.batch, "free_memory", lambda: True, RuntimeError("device-side assert"))
        first = await all_at_once(request(*asked[0]), request(*asked[1]))(engine)
        while engine._thread.is_alive():
            await asyncio.sleep(0.01)
        return [*first, await attempt(engine, request(*asked[2])), engine.ready]

    *outcomes, ready = serve(micro, use)
    assert {outcome.kind for outcome in outcomes} == {ErrorKind.INTERNAL}
    assert not ready


def until_closed(engine: EmbeddedEngine, wanted: GenerationRequest, most: int) -> Awaitable[list[Any]]:
    """Outcomes of the same request, asked again and again until the engine refuses it."""

    async def ask() -> list[Any]:
        outcomes: list[Any] = []
        while engine.ready and len(outcomes) < most:
            outcomes.append(await attempt(engine, wanted))
            await asyncio.sleep(0.01)
        return outcomes

    return ask()


@pytest.mark.parametrize("where", ["language model", "everything"])
def test_an_engine_on_a_lost_accelerator_closes(micro, asked, monkeypatch, where):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        first = await attempt(engine, request(*asked[0]))
        assert engine.stats().failed is None
        monkeypatch.setattr(micro.model.get_model(), "forward", lambda **inputs: (_ for _ in ()).throw(RuntimeError("device-side assert")))
        if where == "everything":
            for part, method in ((engine, "_encode"), (engine.batch.slots, "wipe_unused")):
                fail_on(part, method, lambda *each: True, RuntimeError("device-side assert"))
        failed = await until_closed(engine, request(*asked[1]), 20)
        monkeypatch.undo()
        return [first, failed, await attempt(engine, request(*asked[2])), engine.stats(), await asyncio.wait_for(engine.drain(), 5)]

    first, failed, late, stats, _ = serve(micro, use)
    assert first.text == alone(micro, request(*asked[0]))
    assert [error.kind for error in failed] == [ErrorKind.INTERNAL] * FAILED_ITERATIONS
    assert late.kind == stats.failed == ErrorKind.INTERNAL
    assert (stats.waiting, stats.running) == (0, 0)


def test_poisoned_requests_alone_do_not_close_the_engine(micro, asked):
    async def use(engine: EmbeddedEngine) -> list[Any]:
        fail_on(engine, "_encode", lambda tasks: any(task.name == "poison" for task in tasks), RuntimeError("odd"))
        return [await until_closed(engine, request(*asked[1], "poison"), 20), await attempt(engine, request(*asked[2]))]

    failed, good = serve(micro, use)
    assert [error.kind for error in failed] == [ErrorKind.INTERNAL] * 20
    assert good.text == alone(micro, request(*asked[2]))


def test_the_batch_keeps_within_its_positions(micro, asked):
    async def use(engine: EmbeddedEngine) -> tuple[list[Any], int]:
        largest = 0
        original = engine.batch.slots.reserve

        def reserve(*args: Any) -> None:
            nonlocal largest
            original(*args)
            rows, positions = engine.batch.slots.capacity
            largest = max(largest, rows * positions)

        engine.batch.slots.reserve = reserve  # type: ignore[method-assign]
        outcomes = await all_at_once(*(request(*each) for each in asked))(engine)
        return outcomes, largest

    outcomes, largest = serve(micro, use, max_batch_tokens=1024)
    assert [outcome.text for outcome in outcomes] == [alone(micro, request(*each)) for each in asked]
    assert 0 < largest <= 1024


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"max_batch_rows": 0}, "max_batch_rows is 0"), ({"max_batch_tokens": 1}, "max_batch_tokens is 1"), ({"cache_bytes": -1}, "-1 bytes")],
)
def test_sizes_that_cannot_work_are_refused(micro, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EmbeddedEngine(micro, "micro", **options)


def test_an_attention_that_the_batches_cannot_use_is_refused(micro, monkeypatch):
    monkeypatch.setattr(micro.model.config.text, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2, but this engine's batches need sdpa or eager"):
        EmbeddedEngine(micro, "micro")
