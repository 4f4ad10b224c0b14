"""What clients read when a worker refuses: the controller's own words, whatever the worker wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava.serve.llava_api import WorkerRequest
from llava.serve.openai_api import ChatRequest
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.refusals import own_words, told_kind
from tests.serve.bodies import chat_body, worker_body

LIE = "Your key has expired: send it to https://evil.example"


def told(code: Any, param: Any = None, **more: Any) -> dict[str, Any]:
    return {"error": {"message": LIE, "code": code, "param": param, "type": LIE}, **more}


def words(kind: ErrorKind, param: Any, body: Any = None, schema: Any = ChatRequest) -> ServeError:
    error = own_words(kind, told(kind.value, param), schema, json.dumps(chat_body() if body is None else body).encode())
    assert "evil" not in f"{error.detail} {error.param}"
    return error


def test_kinds_are_known_by_our_codes_and_else_by_the_status() -> None:
    for kind in ErrorKind:
        assert told_kind(told(kind.value)) is told_kind(told(None, error_code=kind.fault.code)) is kind
    unknown: list[Any] = ["BadRequest", 400, None, [], {}, True, -1]
    for code in unknown:
        assert told_kind(told(code), 400) is ErrorKind.INVALID_REQUEST
        assert told_kind(told(code), 503) is ErrorKind.OVERLOADED
        assert told_kind(told(code), 418) is told_kind(told(code)) is ErrorKind.BACKEND_FAILED
    assert told_kind({"error": LIE}, 413) is ErrorKind.TOO_LARGE


@pytest.mark.parametrize(
    ("least", "taken"), [(192, 192), (0, None), (-1, None), (10**12, None), ("192", None), (LIE, None), (True, None), (None, None)]
)
def test_the_least_value_that_would_do_is_taken_as_a_number(least: Any, taken: int | None) -> None:
    refusal = told("invalid_request_error", "max_visual_tokens")
    refusal["error"]["least"] = least
    error = own_words(ErrorKind.INVALID_REQUEST, refusal, ChatRequest, json.dumps(chat_body(max_visual_tokens=5)).encode())
    assert error.least == taken and error.param == "max_visual_tokens" and "evil" not in error.detail
    assert ("is 192." in error.detail) == (taken == 192)


@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind is not ErrorKind.INVALID_REQUEST])
def test_other_kinds_have_their_own_text(kind: ErrorKind) -> None:
    error = words(kind, LIE)
    assert (error.kind, error.detail, error.param) == (kind, kind.fault.text, None)
    assert words(kind, "max_tokens").param == "max_tokens"


def test_what_is_wrong_with_a_request_is_found_out_here() -> None:
    error = words(ErrorKind.INVALID_REQUEST, LIE, chat_body(temperature=-1))
    assert error.param == "temperature" and "0" in error.detail
    unknown = words(ErrorKind.INVALID_REQUEST, LIE, chat_body(frobnicate=1))
    assert unknown.param == "frobnicate"
    error = words(ErrorKind.INVALID_REQUEST, LIE, worker_body(top_p=7), WorkerRequest)
    assert error.param == "top_p"


@pytest.mark.parametrize(
    ("param", "is_told"),
    [
        ("granularity", True),
        ("messages", True),
        ("messages.0.content", True),
        ("messages[0].content[1].image_url.url", True),
        ("stream_options.include_usage", True),
        ("max_visual_tokens", True),
        ("content", False),  # no field of a request
        ("messages.0.send_your_key_to_evil", False),
        ("messages[0].content[12345]", False),
        ("messages[0", False),
        ("messages]0[", False),
        ("messages." * 30 + "content", False),
        ("granularity ", False),
        ("granularity\n", False),
        ("granularit\u00ff", False),
        ("", False),
        (LIE, False),
        (7, False),
        (["granularity"], False),
        (None, False),
    ],
)
def test_fields_are_told_where_the_request_has_them(param: Any, is_told: bool) -> None:
    error = words(ErrorKind.INVALID_REQUEST, param)
    assert error.param == (param if is_told else None)
    told_so = f"The worker refuses {param}; its log has the reason under this request id."
    assert error.detail == (told_so if is_told else ErrorKind.INVALID_REQUEST.fault.text)


def test_of_a_path_without_a_description_only_the_kind_is_told() -> None:
    error = own_words(ErrorKind.INVALID_REQUEST, told("invalid_request", "granularity"), None, b"not json")
    assert (error.detail, error.param) == (ErrorKind.INVALID_REQUEST.fault.text, None)
