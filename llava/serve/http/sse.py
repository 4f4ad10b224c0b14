"""Reading server-sent events that another server writes, with `httpx-sse` and within bounds of our own: it has none."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator

import httpx
from httpx_sse import EventSource, ServerSentEvent

_HEADERS = {"Content-Type": "text/event-stream"}


async def server_sent_events(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[ServerSentEvent]:
    """The events of a stream that hold data; the last one also where the blank line after it is missing.

    Args:
        chunks: the stream's bytes, cut anywhere.
        max_bytes: of one event, with the comments before it; at most one chunk more is held.

    Raises:
        ValueError: an event is longer, or the stream is not UTF-8.
    """
    since_event = 0

    async def bounded() -> AsyncIterator[bytes]:
        nonlocal since_event
        utf8 = codecs.getincrementaldecoder("utf-8")()
        async for chunk in chunks:
            utf8.decode(chunk)  # httpx would replace what is not
            since_event += len(chunk)
            if since_event > max_bytes:
                raise ValueError(f"an event is longer than {max_bytes:,} bytes")
            yield chunk
        yield b"\n\n"

    async for event in EventSource(httpx.Response(200, headers=_HEADERS, content=bounded())).aiter_sse():
        since_event = 0
        if event.data:
            yield event


def read_event(frame: bytes) -> ServerSentEvent | None:
    """The one event that a piece of a stream holds; `None` where it holds no data, as comments do.

    Raises:
        ValueError: it holds several, though no blank line of `\\n` alone parts them, or is not UTF-8.
    """
    text = frame.decode()
    found = [each for each in EventSource(httpx.Response(200, headers=_HEADERS, text=text + "\n\n")).iter_sse() if each.data]
    if len(found) > 1:
        raise ValueError("one frame holds several events")
    return found[0] if found else None
