"""Server-sent events of a server that may write anything: cut anywhere, without an end, or not text at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from llava.serve.http.sse import read_event, server_sent_events


def events_of(chunks: Iterable[bytes], max_bytes: int = 1000) -> list[tuple[str, str]]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def run() -> list[tuple[str, str]]:
        return [(event.event, event.data) async for event in server_sent_events(source(), max_bytes)]

    return asyncio.run(run())


STREAM = "data: a\n\n: ping\n\nid: 3\n\nevent: x\r\ndata: ä\r\ndata:b\r\n\r\ndata: [DONE]\n".encode()


@pytest.mark.parametrize("size", [1, 2, 7, len(STREAM)])
def test_events_are_the_same_however_the_stream_is_cut_and_the_last_needs_no_blank_line(size: int) -> None:
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert events_of(chunks) == [("message", "a"), ("x", "ä\nb"), ("message", "[DONE]")]


@pytest.mark.parametrize("piece", [b"data: 12345678\n", b"x" * 15, b": 345678901234\n"], ids=["lines", "one line", "comments"])
def test_an_event_is_bounded_and_a_stream_of_many_is_not(piece: bytes) -> None:
    read = 0

    def without_end() -> Iterable[bytes]:
        nonlocal read
        while True:
            read += len(piece)
            yield piece

    with pytest.raises(ValueError, match="an event is longer than 1,000 bytes"):
        events_of(without_end())
    assert read == 1005
    assert len(events_of([b"data: 12345678\n\n"] * 1000)) == 1000


@pytest.mark.parametrize("chunks", [[b"data: \xff\n\n"], [b"data: \xc3", b"\n\n"]])
def test_text_that_is_not_utf_8_is_refused_and_not_replaced(chunks: list[bytes]) -> None:
    with pytest.raises(ValueError, match="utf-8"):
        events_of(chunks)


def test_a_frame_holds_one_event_and_hides_no_second() -> None:
    event = read_event(b"event: x\ndata: a")
    assert event is not None and (event.event, event.data) == ("x", "a")
    assert read_event(b": ping") is None
    for hidden in (b"data: a\r\rdata: b", b"data: a\r\n\r\ndata: b"):
        with pytest.raises(ValueError, match="several events"):
            read_event(hidden)
    with pytest.raises(ValueError, match="utf-8"):
        read_event(b"data: \xff")
