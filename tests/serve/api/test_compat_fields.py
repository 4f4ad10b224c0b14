"""Fields of other servers: their defaults change nothing, and what asks for something is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from llava.inference import Message
from llava.serve.api import compat_fields
from llava.serve.api.openai_chat import ChatRequest, read_chat
from llava.serve.http.errors import FieldError
from llava.serve.protocol import Limits
from tests.serve.bodies import chat_body
from tests.serve.fake_engine import CARD

ROUTERS = {
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "include_reasoning": True,
}
"""What the stock routers of vLLM and SGLang put into each body."""
OTHERS: dict[type, Any] = {bool: "yes", int: 10**6, float: 10**6, str: "something", list: [{"a": 1}], dict: {"a": 1}}


def read(**fields: Any) -> Any:
    return read_chat(chat_body(**fields), CARD, Limits())


def test_all_neutral_values_together_change_nothing():
    whole = {name: values[0] for name, values in compat_fields.CHAT_FIELDS.items() if values}
    assert read(**whole) == read(**dict.fromkeys(compat_fields.CHAT_FIELDS)) == read(**ROUTERS) == read()


@pytest.mark.parametrize("name", compat_fields.CHAT_FIELDS)
def test_each_neutral_value_is_taken_and_any_other_refused(name):
    values = compat_fields.CHAT_FIELDS[name]
    for value in (None, *values):
        assert read(**{name: value}) == read()
    for value in (*OTHERS.values(), *(not value for value in values if isinstance(value, bool) and len(values) == 1)):
        if value not in values:
            with pytest.raises(FieldError, match="this is not supported here; leave it out, or send") as refused:
                read(**{name: value})
            assert refused.value.param == name


def test_no_alternatives_may_be_asked_for_without_scores():
    assert read(top_logprobs=0) == read(logprobs=False, top_logprobs=0) == read()


def test_true_is_not_1_and_false_not_0():
    for name, value in (("best_of", True), ("priority", False), ("echo", 0), ("skip_special_tokens", 1)):
        with pytest.raises(FieldError):
            read(**{name: value})


@pytest.mark.parametrize("name", compat_fields.MESSAGE_FIELDS)
def test_an_answer_goes_back_with_whatever_says_nothing(name):
    for value in (None, *compat_fields.MESSAGE_FIELDS[name]):
        body = chat_body("why")
        body["messages"][:0] = [{"role": "user", "content": "first?"}, {"role": "assistant", "content": "no", name: value}]
        assert read_chat(body, CARD, Limits()).turns[1] == Message("assistant", "no")
    body["messages"][1][name] = [{"id": "a"}]
    with pytest.raises(FieldError, match="not supported here"):
        read_chat(body, CARD, Limits())


def test_parts_and_stream_options_have_theirs_too():
    body = chat_body("what", ("data:a",), stream=True, stream_options={"include_obfuscation": False, "continuous_usage_stats": False})
    body["messages"][0]["content"][0] |= {"uuid": None, "modalities": "image", "cache_control": None}
    body["messages"][0]["content"][0]["image_url"] |= {"max_dynamic_patch": None, "content_hash": None}
    body["messages"][0]["content"][1] |= {"cache_control": None, "prompt_cache_breakpoint": None}
    assert [source.text for source in read_chat(body, CARD, Limits()).sources] == ["data:a"]


def test_every_field_of_openais_own_api_is_known():
    """By the SDK's own types, so that a new one is seen when the SDK brings it."""
    assert set(CompletionCreateParamsBase.__annotations__) | {"stream"} <= set(ChatRequest.model_fields)
    assert set(ChatCompletionMessage.model_fields) - {"role", "content"} <= set(compat_fields.MESSAGE_FIELDS)


def test_labels_for_the_clients_own_records_are_taken():
    labels = {"metadata": {"run": "a"}, "safety_identifier": "someone", "prompt_cache_key": "k", "session_id": "s"}
    assert read(**labels) == read()


def test_the_document_lists_them_with_their_values():
    listed = ChatRequest.model_json_schema()["properties"]
    assert listed["tools"]["enum"] == [None, []] and listed["skip_special_tokens"]["enum"] == [None, True]
