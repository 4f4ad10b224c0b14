"""The ways in which a body may say what the answer has to be, and how each is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava.serve.api.openai_chat import read_chat
from llava.serve.api.openai_responses import read_response
from llava.serve.api.parsed_request import ParsedRequest
from llava.serve.http.errors import FieldError
from llava.serve.protocol import Guide, GuideKind, Limits
from tests.serve.bodies import chat_body
from tests.serve.fake_engine import CARD

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TEXT = '{"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}'


def guide(**fields: Any) -> Guide | None:
    return read_chat(chat_body(**fields), CARD, Limits(max_guide_characters=100)).sampling.guide


def named(schema: Any, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **others}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": named(SCHEMA, strict=True, description="of a sign")},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": TEXT, "regex": None, "disable_any_whitespace": False}},
        {"guided_json": SCHEMA, "response_format": {"type": "text"}},
        {"guided_json": TEXT, "structured_outputs": {}},
    ],
)
def test_a_schema_keeps_the_order_of_its_properties_in_whichever_field_it_comes(fields):
    found = guide(**fields)
    assert found == Guide(GuideKind.JSON, TEXT, "any")  # where it came from is no part of what it is
    assert found is not None and found.param.split(".")[0] in fields


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, GuideKind.JSON, '{"type": "object"}', "response_format"),
        ({"structured_outputs": {"json_object": True}}, GuideKind.JSON, '{"type": "object"}', "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a+"}}, GuideKind.REGEX, "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "é"]}}, GuideKind.CHOICE, '["a", "\\u00e9"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: x"}}, GuideKind.GRAMMAR, "start: x", "structured_outputs.grammar"),
        ({"guided_regex": "a+"}, GuideKind.REGEX, "a+", "guided_regex"),
        ({"guided_choice": ["a"]}, GuideKind.CHOICE, '["a"]', "guided_choice"),
        ({"guided_grammar": "x"}, GuideKind.GRAMMAR, "x", "guided_grammar"),
        ({"regex": "a"}, GuideKind.REGEX, "a", "regex"),
        ({"ebnf": "x"}, GuideKind.GRAMMAR, "x", "ebnf"),
    ],
)
def test_other_wishes(fields, kind, text, param):
    found = guide(**fields)
    assert found is not None and (found.kind, found.text, found.param) == (kind, text, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": None},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "whitespace_pattern": None, "structural_tag": None}},
        dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex", "ebnf")),
    ],
)
def test_what_asks_for_nothing(fields):
    assert guide(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "expected 'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {**named(SCHEMA), "type": "json_object"}}, "response_format.json_schema", "make it 'json_schema'"),
        ({"response_format": {**named(SCHEMA), "type": "text"}}, "response_format.json_schema", "leave the schema out"),
        ({"response_format": named([])}, "response_format.json_schema.schema", "expected an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "missing"),
        ({"response_format": named({"enum": ["x" * 100]})}, "response_format.json_schema.schema", "characters, expected at most 100"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": "[" * 99}, "guided_json", "not JSON"),
        ({"guided_json": "[1]"}, "guided_json", "not an object"),
        ({"guided_json": 5}, "guided_json", "expected a JSON schema"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "expected a JSON schema"),
        ({"structured_outputs": {"disable_any_whitespace": 3}}, "structured_outputs.disable_any_whitespace", "not supported"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml", "is unknown"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_regex": "a" * 101}, "guided_regex", "has 101 characters, expected at most 100"),
        ({"guided_regex": "a", "regex": "a"}, "regex", "guided_regex and regex both constrain"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "both constrain"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json", "both constrain"),
    ],
)
def test_refused_by_the_name_of_the_field(fields, param, told):
    with pytest.raises(FieldError, match=told) as refused:
        guide(**fields)
    assert refused.value.param == param


FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}


def of_response(**fields: Any) -> Any:
    return read_response({"model": "fake", "input": "x", **fields}, CARD, Limits())


@pytest.mark.parametrize(
    ("wanted", "text", "param"), [(FORMAT, TEXT, "text.format.schema"), ({"type": "json_object"}, '{"type": "object"}', "text.format")]
)
def test_the_responses_api_says_it_in_a_field_of_its_own_and_tells_it_again(wanted, text, param):
    call = of_response(text={"format": wanted, "verbosity": "medium"})
    assert call.sampling.guide == Guide(GuideKind.JSON, text, "any") and call.sampling.guide.param == param
    assert call.repeated["text"] == {"format": wanted, "verbosity": "medium"}
    assert of_response().repeated["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert of_response(text={"format": {"type": "text"}}).sampling.guide is of_response().sampling.guide is None


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text', 'json_object' or 'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
        ({"text": {"format": FORMAT}, "guided_regex": "a"}, "guided_regex", "text.format.schema and guided_regex both constrain"),
    ],
)
def test_what_it_refuses_is_named_there(fields, param, told):
    with pytest.raises(FieldError, match=told) as refused:
        of_response(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("depth", [99, 100, 400, 900])
@pytest.mark.parametrize("brackets", [('{"a":', "}"), ("[", "]")])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_schema_is_only_so_deep(as_text: bool, brackets: tuple[str, str], depth: int) -> None:
    """Some hundred levels can be read by a thread with an empty stack, and not be written again by one with a fuller one."""
    text = '{"enum": ' + brackets[0] * depth + "1" + brackets[1] * depth + "}"

    def ask() -> ParsedRequest:
        return read_chat(chat_body(guided_json=text if as_text else json.loads(text)), CARD, Limits())

    if depth < 100:
        assert ask().sampling.guide is not None
        return
    with pytest.raises(FieldError, match="nested more than 100 levels deep") as refused:
        ask()
    assert refused.value.param == "guided_json"
