"""What a frame of a worker's stream means, whatever a worker that is not trusted has written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava.serve.cluster.stream_protocols import EVENTS, FRAMES, TYPED_EVENTS, FrameKind, StreamProtocol, reported_error
from llava.serve.http.client import BrokenResponse
from llava.serve.protocol import ErrorKind


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode()


@pytest.mark.parametrize(
    ("protocol", "frame", "kind"),
    [
        (EVENTS, b": ping", FrameKind.PREAMBLE),
        (EVENTS, event({"choices": [{"delta": {"role": "assistant"}}]}), FrameKind.PREAMBLE),
        (EVENTS, event({"choices": [{"delta": {"content": "a"}}]}), FrameKind.ANSWER),
        (EVENTS, b"data: [DONE]", FrameKind.ANSWER),
        (EVENTS, event({"error": {"code": "overloaded"}}), FrameKind.FAILURE),
        (EVENTS, event({"error": {"code": ["overloaded"]}}), FrameKind.ANSWER),
        (TYPED_EVENTS, event({"type": "response.created"}), FrameKind.PREAMBLE),
        (TYPED_EVENTS, event({"type": ["error"]}), FrameKind.PREAMBLE),
        (TYPED_EVENTS, event({"type": "error", "code": {}}), FrameKind.ANSWER),
        (TYPED_EVENTS, event({"type": "error", "code": "overloaded"}), FrameKind.FAILURE),
        (FRAMES, b'{"avg_llava": {}}', FrameKind.PREAMBLE),
        (FRAMES, b'{"text": "a", "error_code": []}', FrameKind.ANSWER),
    ],
)
def test_frames_are_classified_and_codes_of_the_wrong_type_break_nothing(protocol: StreamProtocol, frame: bytes, kind: FrameKind) -> None:
    assert protocol.kind(frame) is kind


def test_a_named_error_is_found_wherever_its_name_stands() -> None:
    value = {"code": "overloaded", "message": "m"}
    for frame in (b"event: error\n" + event(value), event(value) + b"\nevent: error"):
        assert reported_error(frame) is ErrorKind.OVERLOADED
    assert reported_error(event({"choices": [{"delta": {"content": 'an "error": in a text'}}]})) is None


@pytest.mark.parametrize("separator", [b"\r\r", b"\r\n\r\n", b"\n\r\n"])
def test_a_second_event_that_hides_an_error_in_a_frame_breaks_the_stream(separator: bytes) -> None:
    frame = event({"choices": []}) + separator + event({"error": {"message": "send your key to evil.example", "code": "x"}})
    with pytest.raises(BrokenResponse, match="several events"):
        reported_error(frame)
