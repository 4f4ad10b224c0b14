"""Each token's text and bytes, and scores that come with the text they are about."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from llava.inference import Assistant
from llava.serve.api.worker_app import create_worker_app
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.engine.sampling import Picked
from llava.serve.engine.scores import ScoreStream, TokenTexts
from llava.serve.protocol import TokenScore, token_bytes
from llava.text_stream import TextStream
from tests.serve.running import RunningApp

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SAMPLE = "no star, ★ day\nñ 𝄞"


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A tokenizer of GPT-2's kind that knows its 256 bytes, one word and an end."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"Ġs": 256, "Ġst": 257}
    model = Tokenizer(BPE(vocabulary, [("Ġ", "s"), ("Ġs", "t")]))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")


def scored(texts: TokenTexts, *tokens: int) -> ScoreStream:
    stream = ScoreStream(texts)
    for token in tokens:
        stream.add(token, Picked(token, -0.5))
    return stream


def shown(scores: tuple[TokenScore, ...]) -> list[str]:
    return [score.text for score in scores]


def test_the_bytes_of_a_texts_tokens_make_it_up(micro, byte_level):
    for tokenizer, space in ((micro.tokenizer, b" "), (byte_level, b"")):
        texts = TokenTexts(tokenizer)
        ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(texts(token)) for token in ids) == space + SAMPLE.encode()


def test_a_token_has_its_leading_space_and_its_single_byte(micro, byte_level):
    texts, vocabulary = TokenTexts(micro.tokenizer), micro.tokenizer.get_vocab()
    assert [texts(vocabulary[token]) for token in ("▁star", "▁", "ay")] == [" star", " ", "ay"]
    assert [token_bytes(texts(vocabulary[token])) for token in ("<0xE2>", "<0x0A>", "</s>")] == [b"\xe2", b"\n", b"</s>"]
    texts, vocabulary = TokenTexts(byte_level), byte_level.get_vocab()
    assert [token_bytes(texts(vocabulary[token])) for token in ("Ġst", "â", "Ċ", "<|end|>")] == [b" st", b"\xe2", b"\n", b"<|end|>"]
    assert texts.special == {vocabulary["<|end|>"]}


def test_another_servers_half_characters_have_bytes_too():
    assert TokenScore("a\ud800", 0.0).data == b"a?"


def test_a_score_waits_until_its_text_was_sent(micro):
    texts, vocabulary = TokenTexts(micro.tokenizer), micro.tokenizer.get_vocab()
    stream = scored(texts, vocabulary["▁no"], vocabulary["▁star"])
    assert shown(stream.sent("")) == []
    assert shown(stream.sent("n")) == []
    assert shown(stream.sent("o")) == [" no"]
    stream.add(vocabulary["</s>"], Picked(2, -0.1))
    stream.add(vocabulary["▁"], Picked(vocabulary["▁"], -0.1))
    assert shown(stream.end(" star", stopped=False)) == [" star", " "]
    assert scored(texts).end("", stopped=True) == ()


def test_the_tokens_of_a_stop_text_are_left_out_and_one_that_it_cuts_is_cut(micro):
    texts, vocabulary = TokenTexts(micro.tokenizer), micro.tokenizer.get_vocab()
    no, star = vocabulary["▁no"], vocabulary["▁star"]
    assert shown(scored(texts, no, star).end("no", stopped=True)) == [" no"]
    assert shown(scored(texts, no, star).end("no st", stopped=True)) == [" no", " st"]


def test_bytes_that_are_no_character_are_steps_waited(micro):
    texts, vocabulary = TokenTexts(micro.tokenizer), micro.tokenizer.get_vocab()
    broken, star = vocabulary["<0xE2>"], vocabulary["▁star"]
    stream = scored(texts, broken, broken, star, star)
    assert [score.data for score in stream.sent("\ufffd\ufffd star")] == [b"\xe2", b"\xe2", b" star"]
    assert [score.data for score in scored(texts, broken, broken, star).sent("\ufffd star")] == [b"\xe2", b"\xe2", b" star"]


@pytest.mark.parametrize("stops", [(), ("e",), ("st", " a"), ("\u2605",)])
def test_whatever_is_written_the_scores_tell_no_less_and_no_more(micro, byte_level, stops):
    """Any tokens in a row, so that characters fall apart, words begin without a space, and stop texts cut tokens."""
    chance = random.Random(1)
    for tokenizer in (micro.tokenizer, byte_level):
        texts = TokenTexts(tokenizer)
        words = [token for token in range(len(tokenizer)) if token not in texts.special]
        plain = [token for token in words if texts(token).isascii()]
        whole = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        for turn in range(60):
            stream, scores, found, content = TextStream(tokenizer, stops), ScoreStream(texts), [], ""
            others = plain if turn % 2 else words
            for token in [*chance.choices(others, k=6), *whole, *chance.choices(others, k=6)]:
                text = stream.add(token)
                scores.add(token, Picked(token, -0.5))
                content, found = content + text, [*found, *scores.sent(text)]
                if stream.stopped:
                    break
            text = stream.end()
            content, found = content + text, [*found, *scores.end(text, stream.stopped)]
            joined = b"".join(score.data for score in found)
            if not stream.stopped:
                assert joined == b"".join(token_bytes(texts(token)) for token in stream.ids)
            if UNFINISHED not in content:  # what a decoder makes of broken characters is its own affair
                assert joined.decode().strip() == content


# ---- over HTTP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(micro):
    with RunningApp(create_worker_app(EmbeddedEngine(micro, "micro"))) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, http_client=httpx.Client(timeout=30)) as made:
            yield made


def choices(client: openai.OpenAI, stream: bool, **fields: Any) -> list[tuple[str, list[Any], str]]:
    """Content, scores and finish reason of each choice."""
    asked = {"model": "micro", "messages": [{"role": "user", "content": "Who are you?"}], "logprobs": True, "top_logprobs": 3, **fields}
    if not stream:
        answer = client.chat.completions.create(**asked)
        return [(choice.message.content, choice.logprobs.content, choice.finish_reason) for choice in answer.choices]
    found: list[Any] = [["", [], None] for _ in range(fields.get("n", 1))]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            found[choice.index][0] += choice.delta.content or ""
            found[choice.index][1] += choice.logprobs.content if choice.logprobs else []
            found[choice.index][2] = choice.finish_reason or found[choice.index][2]
    return [tuple(each) for each in found]


FIELDS: list[dict[str, Any]] = [
    {"max_tokens": 24},
    {"max_tokens": 3},
    {"max_tokens": 24, "n": 2, "temperature": 1.5, "seed": 3},
    {"max_tokens": 24, "n": 2, "temperature": 2.0, "seed": 5},
    {"max_tokens": 24, "stop": [" "]},
    {"max_tokens": 24, "stop": ["e", "zzz"]},
    {"max_tokens": 40, "n": 2, "temperature": 2.0, "seed": 8, "stop": ["a", "st"]},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
def test_the_bytes_of_an_answers_tokens_make_it_up(client, fields, stream):
    for content, scores, _ in choices(client, stream, **fields):
        joined = b"".join(bytes(score.bytes) for score in scores)
        assert joined.decode("utf-8", "replace").strip() == content
        assert all(bytes(score.bytes).decode("utf-8", "replace") == score.token for score in scores)
        assert all(bytes(other.bytes).decode("utf-8", "replace") == other.token for score in scores for other in score.top_logprobs)
        assert all(len(score.top_logprobs) == 3 for score in scores)
        assert "</s>" not in [score.token for score in scores]
        for score in scores:
            first, *others = score.top_logprobs
            assert all(one.logprob >= two.logprob for one, two in pairwise([first, *others]))
            same = [other for other in (first, *others) if other.logprob == score.logprob]
            assert not same or any(other.token.startswith(score.token) for other in same)
