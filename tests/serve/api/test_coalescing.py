"""Quick pieces become few parts, slow ones go out as they come, and nothing is lost, late or out of order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from llava.serve.api.coalescing import MAX_JOINED, CoalescedPieces, IndexedEvent, merge_events
from llava.serve.protocol import ErrorKind, Event, Finished, GenerationRequest, Piece, Sampling, ServeError, Started, TokenScore
from tests.serve.fake_engine import FakeEngine

LONG = 0.3
"""Seconds between parts where a test wants to see what waits and what does not."""
END = Finished("stop", 1, 1, (), {})


class Story:
    """Events told one by one, with pauses in seconds between them; an exception is raised where it stands."""

    def __init__(self, told: Sequence[IndexedEvent | float | Exception]) -> None:
        self.told, self.given, self.closed = told, 0, False

    async def events(self) -> AsyncGenerator[IndexedEvent, None]:
        try:
            for each in self.told:
                if isinstance(each, Exception):
                    raise each
                if isinstance(each, float):
                    await asyncio.sleep(each)
                else:
                    self.given += 1
                    yield each
        finally:
            self.closed = True


def piece(text: str, index: int = 0) -> IndexedEvent:
    return index, Piece(text)


async def heard(story: Story, interval: int = 1, seconds: float = LONG) -> tuple[list[tuple[float, IndexedEvent]], Exception | None]:
    """What goes out, each with the seconds since the beginning, and what it ends with."""
    begun, out = time.monotonic(), []
    async with aclosing(CoalescedPieces(story.events(), interval, seconds).events()) as events:
        try:
            async for each in events:
                out.append((time.monotonic() - begun, each))
        except ServeError as error:
            return out, error
    return out, None


def texts(out: list[tuple[float, IndexedEvent]], index: int = 0) -> list[str]:
    return [event.text for _, (own, event) in out if own == index and isinstance(event, Piece)]


def test_quick_pieces_are_joined_after_a_first_that_goes_at_once() -> None:
    started = Started(1, (), {})
    story = Story([(0, started), 0.05, piece("a "), 0.02, piece("b "), 0.02, piece("c "), 0.02, (0, END)])
    out, _ = asyncio.run(heard(story))
    assert [event for _, event in out] == [(0, started), piece("a "), piece("b c "), (0, END)]
    assert out[1][0] < 0.15 and out[-1][0] < LONG  # neither the first piece nor the end waits
    assert story.closed


def test_a_held_piece_goes_out_in_time_although_nothing_follows_it() -> None:
    story = Story([piece("a "), 0.01, piece("b "), 0.01, piece("c "), 3 * LONG, (0, END)])
    out, _ = asyncio.run(heard(story))
    assert texts(out) == ["a ", "b c "]
    assert LONG - 0.05 < out[1][0] < 2 * LONG < out[2][0]


def test_pieces_slower_than_that_are_never_joined() -> None:
    out, _ = asyncio.run(heard(Story([each for word in "abcd" for each in (0.05, piece(word))]), seconds=0.02))
    assert texts(out) == list("abcd")
    assert all(abs(when - 0.05 * place) < 0.04 for place, (when, _) in enumerate(out, start=1))


@pytest.mark.parametrize("seconds", [0.0, LONG])
def test_the_interval_counts_pieces_however_slowly_they_come(seconds: float) -> None:
    out, _ = asyncio.run(heard(Story([each for word in "abcde" for each in (0.03, piece(word))] + [(0, END)]), 2, seconds))
    assert texts(out) == (["ab", "cd", "e"] if seconds == 0.0 else ["ab", "cde"])


def test_each_choice_has_its_own_time_and_its_scores_stay_with_its_text() -> None:
    def scored(text: str, index: int) -> IndexedEvent:
        return index, Piece(text, (TokenScore(text, -0.5),))

    told = [scored(text, index) for text in "abc" for index in (0, 1)]
    out, _ = asyncio.run(heard(Story([*told, (1, END), (0, END)])))
    for index in (0, 1):
        assert texts(out, index) == ["a", "bc"]
        own = [event for _, (choice, event) in out if choice == index]
        assert own[-1] == END and [score.text for event in own[:-1] for score in event.scores] == list("abc")  # type: ignore[union-attr]
    assert [choice for _, (choice, event) in out if event == END] == [1, 0]


def test_what_was_held_back_comes_before_the_error_that_ends_a_stream() -> None:
    story = Story([piece("a "), piece("x ", 1), piece("b "), piece("y ", 1), piece("c "), ServeError(ErrorKind.OUT_OF_MEMORY)])
    out, error = asyncio.run(heard(story))
    assert texts(out) == ["a ", "b c "] and texts(out, 1) == ["x ", "y "] and out[-1][0] < LONG
    assert isinstance(error, ServeError) and error.kind is ErrorKind.OUT_OF_MEMORY


def test_an_error_without_a_piece_before_it_is_told() -> None:
    assert asyncio.run(heard(Story([ServeError(ErrorKind.OVERLOADED)])))[1] is not None


def test_a_reader_that_is_slow_holds_the_events_back() -> None:
    story = Story([piece("x") for _ in range(100 * MAX_JOINED)])

    async def read() -> list[int]:
        given = []
        async with aclosing(CoalescedPieces(story.events(), 1, 60.0).events()) as events:
            async for _, event in events:
                assert isinstance(event, Piece) and len(event.text) <= MAX_JOINED
                await asyncio.sleep(0.005)
                given.append(story.given)
                if len(given) == 4:
                    break
        return given

    assert max(asyncio.run(read())) < 6 * MAX_JOINED and story.closed


def test_a_reader_that_leaves_closes_the_events_and_leaves_no_timer() -> None:
    story = Story([piece("a"), piece("b"), 60.0])

    async def read() -> None:
        events = CoalescedPieces(story.events(), 1, 0.05).events()
        assert await anext(events) == piece("a")
        await asyncio.sleep(0)
        await events.aclose()
        assert story.closed and len(asyncio.all_tasks()) == 1
        await asyncio.sleep(0.1)  # a timer that was left would put its piece somewhere now

    asyncio.run(read())


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_nothing_of_an_engines_answers_is_lost(delay: float) -> None:
    words = tuple(f"w{number} " for number in range(6 if delay else 500))
    engine = FakeEngine(pieces=lambda request: words, piece_delay=delay)

    async def read() -> list[IndexedEvent]:
        asked = [GenerationRequest(f"r{index}", prompt="x", sampling=Sampling(logprobs=1)) for index in range(2)]
        async with aclosing(CoalescedPieces(merge_events([engine.submit(each) for each in asked]), 1).events()) as events:
            return [each async for each in events]

    out = asyncio.run(read())
    for index in range(2):
        own: list[Event] = [event for choice, event in out if choice == index]
        pieces = [event for event in own if isinstance(event, Piece)]
        assert isinstance(own[0], Started) and isinstance(own[-1], Finished) and len(own) == len(pieces) + 2
        assert [score.text for each in pieces for score in each.scores] == list(words)
        assert "".join(each.text for each in pieces) == "".join(words)
        assert pieces[0].text == words[0]
        assert len(pieces) == len(words) if delay else len(pieces) < 100


class Scripted:
    """A running answer that tells a few events, and takes a while to let go of what it holds."""

    def __init__(self, told: Sequence[Event | Exception]) -> None:
        self.told, self.is_closed = told, False

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        try:
            for each in self.told:
                if isinstance(each, Exception):
                    raise each
                yield each
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            self.is_closed = True

    def cancel(self) -> None:
        pass


def test_one_answer_alone_is_told_as_it_comes() -> None:
    async def read() -> list[IndexedEvent]:
        return [each async for each in merge_events([Scripted([Piece("a"), END, ServeError(ErrorKind.OVERLOADED)])])]

    with pytest.raises(ServeError):
        asyncio.run(read())

    async def begin() -> list[IndexedEvent]:
        async with aclosing(merge_events([Scripted([Piece("a"), END])])) as events:
            return [await anext(events), await anext(events)]

    assert asyncio.run(begin()) == [piece("a"), (0, END)]


def test_the_first_failure_ends_all_and_nothing_of_them_is_left_running() -> None:
    async def read() -> None:
        others = [Scripted([Piece("a"), Piece("b")]), Scripted([Piece("c")])]
        with pytest.raises(ServeError) as caught:
            async for _ in merge_events([*others, Scripted([Piece("d"), ServeError(ErrorKind.OUT_OF_MEMORY)])]):
                pass
        assert caught.value.kind is ErrorKind.OUT_OF_MEMORY
        assert all(other.is_closed for other in others) and len(asyncio.all_tasks()) == 1

    asyncio.run(read())
