"""What clients read when a worker refuses: the controller's own words, whatever the worker wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava.serve.api.image_loader import NOT_FETCHED
from llava.serve.api.paths import CHAT_PATH, WORKER_PATH
from llava.serve.cluster.refusals import client_error, error_kind
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.protocol import error_templates as texts
from tests.serve.bodies import chat_body, worker_body
from tests.serve.fake_engine import CARD

LIE = "Your key has expired: send it to https://evil.example"


def told(code: Any, param: Any = None, **more: Any) -> dict[str, Any]:
    return {"error": {"message": LIE, "code": code, "param": param, "type": LIE}, **more}


def words(kind: ErrorKind, param: Any, body: Any = None, path: str = CHAT_PATH) -> ServeError:
    error = client_error(kind, told(kind.value, param), path, json.dumps(chat_body() if body is None else body).encode())
    assert "evil" not in f"{error.detail} {error.param}"
    return error


def test_kinds_are_known_by_our_codes_and_else_by_the_status() -> None:
    for kind in ErrorKind:
        assert error_kind(told(kind.value)) is error_kind(told(None, error_code=kind.fault.code)) is kind
    unknown: list[Any] = ["BadRequest", 400, None, [], {}, True, -1]
    for code in unknown:
        assert error_kind(told(code), 400) is ErrorKind.INVALID_REQUEST
        assert error_kind(told(code), 503) is ErrorKind.OVERLOADED
        assert error_kind(told(code), 418) is error_kind(told(code)) is ErrorKind.BACKEND_FAILED
    assert error_kind({"error": LIE}, 413) is ErrorKind.TOO_LARGE


@pytest.mark.parametrize(
    ("least", "taken"), [(192, 192), (0, None), (-1, None), (10**12, None), ("192", None), (LIE, None), (True, None), (None, None)]
)
def test_the_least_value_that_would_do_is_taken_as_a_number(least: Any, taken: int | None) -> None:
    refusal = told("invalid_request_error", "max_visual_tokens")
    refusal["error"]["least"] = least
    error = client_error(ErrorKind.INVALID_REQUEST, refusal, CHAT_PATH, json.dumps(chat_body(max_visual_tokens=5)).encode())
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
    error = words(ErrorKind.INVALID_REQUEST, LIE, worker_body(top_p=7), WORKER_PATH)
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
    error = client_error(ErrorKind.INVALID_REQUEST, told("invalid_request", "granularity"), "/nowhere", b"not json")
    assert (error.detail, error.param) == (ErrorKind.INVALID_REQUEST.fault.text, None)


@pytest.mark.parametrize(
    ("fields", "kind", "param", "said"),
    [
        ({"granularity": 7}, ErrorKind.INVALID_REQUEST, "granularity", "granularity is not among this model's: [36, 144, 576]."),
        ({"top_logprobs": 3}, ErrorKind.INVALID_REQUEST, "top_logprobs", "logprobs is not true; set both or neither."),
        ({"stream_options": {}}, ErrorKind.INVALID_REQUEST, "stream_options", "stream is not true; set both or neither."),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, ErrorKind.CONTEXT_LENGTH, "messages", "200001 characters"),
        ({"messages": [{"role": "user", "content": " "}]}, ErrorKind.INVALID_REQUEST, "messages", "Turn 0 is empty; give a question."),
    ],
)
def test_a_request_is_read_as_the_worker_reads_it(fields: dict[str, Any], kind: ErrorKind, param: str, said: str) -> None:
    body, refusal = json.dumps(chat_body(**fields)).encode(), told(kind.value, "messages")
    error = client_error(kind, refusal, CHAT_PATH, body, CARD)
    assert error.param == param and said in error.detail
    assert said not in client_error(kind, refusal, CHAT_PATH, body).detail  # without the model it cannot be known
    other = client_error(ErrorKind.NOT_FINITE, refusal, CHAT_PATH, body, CARD)
    assert other.detail == ErrorKind.NOT_FINITE.fault.text  # that was not what the worker minded


WITH_KEYWORDS = texts.GUIDE_UNSUPPORTED_KEYWORDS.format(param="response_format", keywords="not, then")


@pytest.mark.parametrize(
    ("kind", "param", "text"),
    [
        (ErrorKind.INVALID_REQUEST, "max_tokens", "max_tokens is 51, expected at most 50."),
        (ErrorKind.INVALID_REQUEST, "stop_token_ids", texts.TOKEN_OUT_OF_VOCABULARY.format(param="stop_token_ids", number=512, count=512)),
        (ErrorKind.INVALID_REQUEST, "response_format", WITH_KEYWORDS),
        (ErrorKind.CONTEXT_LENGTH, "messages", texts.TOO_LONG.format(positions=4096)),
        (ErrorKind.INVALID_IMAGE, "messages[0].content[1].image_url.url", NOT_FETCHED),
    ],
)
def test_what_only_a_worker_knows_is_told_in_sentences_of_ours(kind: ErrorKind, param: str, text: str) -> None:
    refusal, body = told(kind.value, param), json.dumps(chat_body()).encode()
    refusal["error"]["message"] = text
    error = client_error(kind, refusal, CHAT_PATH, body, CARD)
    assert (error.kind, error.detail, error.param) == (kind, text, param)
    for lie in (f"{text} {LIE}", text.replace("s", "s evil.example ", 1), text.upper() + "evil", ["evil", text], {"evil": text}):
        refusal["error"]["message"] = lie
        assert "evil" not in client_error(kind, refusal, CHAT_PATH, body, CARD).detail


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("n is x, expected at most 2.", "n"),
        ("n is 3, expected at most 2.", "m"),
        ("n is 3, expected at most 2.", None),
        ("n is \u0663, expected at most 2.", "n"),
        (f"n is {'9' * 20}, expected at most 2.", "n"),
        ("n is 3, expected at most 2.\n", "n"),
        ("n is 3, expected at most 2", "n"),
        ("n is 3, expected at most 2. ", "n"),
    ],
)
def test_holes_hold_whole_numbers_and_the_errors_own_field(text: str, param: str | None) -> None:
    assert texts.matches_template("n is 3, expected at most 2.", texts.AT_MOST, "n")
    assert not texts.matches_template(text, texts.AT_MOST, param)


def test_of_json_schema_keywords_alone_are_named() -> None:
    assert texts.matches_template(WITH_KEYWORDS, texts.GUIDE_UNSUPPORTED_KEYWORDS, "response_format")
    assert not texts.matches_template(WITH_KEYWORDS.replace("then", "evil"), texts.GUIDE_UNSUPPORTED_KEYWORDS, "response_format")


def test_every_sentence_is_in_the_table() -> None:
    named = [value for name, value in vars(texts).items() if name.isupper() and name[0] != "_" and isinstance(value, str)]
    assert sorted(named) == sorted(texts.ERROR_TEMPLATES)
