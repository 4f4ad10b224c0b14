"""Pieces of text: nothing is sent that may still be taken back, and together they are the answer."""

from __future__ import annotations

import random

import pytest

from llava.inference import Assistant
from llava.text_stream import TextStream, cut_at_stop


class Letters:
    """One token per byte, as byte-level tokenizers have for unknown characters."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)


def run(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream


def test_pieces_come_as_soon_as_they_are_certain():
    pieces, _ = run("ab c")
    assert pieces == ["a", "b", "", " c", ""]


def test_a_character_of_several_bytes_comes_whole():
    pieces, _ = run("é→🙂.")
    assert [piece for piece in pieces if piece] == ["é", "→", "🙂", "."]


def test_white_space_around_the_answer_is_left_out():
    pieces, _ = run("  a \n ")
    assert "".join(pieces) == "a"


def test_the_beginning_of_a_stop_text_is_held_back():
    pieces, stream = run("ab###cd", "###")
    assert pieces == ["a", "b", "", "", "", ""]
    assert stream.stopped
    pieces, stream = run("a##b", "###")
    assert pieces == ["a", "", "", "##b", ""]
    assert not stream.stopped


def test_the_first_of_several_stop_texts_counts():
    pieces, stream = run("one two three", "three", "tw")
    assert "".join(pieces) == "one"
    assert stream.stopped


def test_a_stop_text_may_begin_where_the_last_one_failed():
    assert run("a##b###c", "###")[0] == ["a", "", "", "##b", "", "", "", ""]
    assert "".join(run("aab aac", "aac")[0]) == "aab"


@pytest.fixture(scope="module")
def tokenizer(oracle):
    return Assistant.load(str(oracle / "checkpoint"), device="cpu").tokenizer


@pytest.mark.parametrize("seed", range(20))
def test_any_answer_comes_out_as_a_whole_decoding_gives_it(tokenizer, seed):
    source = random.Random(seed)
    ids = [source.randrange(3, len(tokenizer)) for _ in range(30)]
    stop = ("e", "to be") if seed % 2 else ()
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == cut_at_stop(tokenizer.decode(stream.ids, skip_special_tokens=True), stop)[0].strip()
    # It stops with the very token that brings a stop text, in a run of bytes too.
    holds = [cut_at_stop(tokenizer.decode(ids[:count], skip_special_tokens=True), stop)[1] for count in range(1, len(stream.ids) + 1)]
    assert stream.stopped == any(holds)
    assert not any(holds[:-1])


@pytest.mark.parametrize("special", ["<s>", "<unk>"])
def test_bytes_around_a_special_token_are_one_run(tokenizer, special):
    ids = tokenizer.convert_tokens_to_ids(["<0x34>", special, "<0x9C>", special, "a"])
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_line_break_written_as_a_byte_stops_at_once(tokenizer):
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    stream = TextStream(tokenizer, ("\n",))
    stream.add(newline)
    assert stream.stopped and stream.end() == ""
