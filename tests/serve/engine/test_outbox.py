"""Events reach the event loop of the one who asked, in order; a loop that is gone harms nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from llava.serve.engine.outbox import EngineGeneration, Outbox, deliver_now
from llava.serve.protocol import ErrorKind, Event, Piece, ServeError


async def read(generation: EngineGeneration) -> list[Event]:
    return [event async for event in generation]


def test_each_gets_its_own_in_order_from_another_thread():
    async def use() -> list[list[Event]]:
        outbox, woken = Outbox(), threading.Event()
        first, second = EngineGeneration(woken.set), EngineGeneration(woken.set)

        def say() -> None:
            for word in "abc":
                outbox.put(first, Piece(word))
                outbox.put(second, Piece(word.upper()))
            outbox.put(first, None)
            outbox.put(second, None)
            outbox.deliver()
            outbox.deliver()  # once more: nothing is said twice

        await asyncio.to_thread(say)
        answers = [await read(first), await read(second)]
        assert woken.is_set() and first.cancelled  # whoever stops reading needs no more work
        return answers

    assert asyncio.run(use()) == [[Piece("a"), Piece("b"), Piece("c")], [Piece("A"), Piece("B"), Piece("C")]]


def test_a_failure_is_raised_where_it_is_read():
    async def use() -> None:
        generation = EngineGeneration(lambda: None)
        await asyncio.to_thread(deliver_now, generation, ServeError(ErrorKind.INTERNAL))
        await read(generation)

    with pytest.raises(ServeError, match=ErrorKind.INTERNAL.fault.text):
        asyncio.run(use())


def test_a_loop_that_was_closed_keeps_nothing_from_the_others(caplog):
    async def made() -> EngineGeneration:
        return EngineGeneration(lambda: None)

    gone = asyncio.run(made())

    async def use() -> list[Event]:
        outbox, generation = Outbox(), EngineGeneration(lambda: None)
        for each in (gone, generation):
            outbox.put(each, Piece("a"))
            outbox.put(each, None)
        outbox.deliver()
        return await read(generation)

    assert asyncio.run(use()) == [Piece("a")]
    assert "2 events had no event loop" in caplog.text
