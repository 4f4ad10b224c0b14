"""The client of the OpenAI API: what it asks, what it reads, and what it makes of servers that fail in every way."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from llava.serve.backend.chat_client import ChatClient, ChatError, Delta, Outcome, server_address
from tests.serve.page_backend import Backend, running


@pytest.fixture(scope="module")
def served():
    backend = Backend()
    with running(backend.app) as url:
        yield backend, url


def ask(url, text, key=None, **fields):
    """Deltas, and the outcome or the error."""

    async def go():
        texts = []
        async with ChatClient(url, key) as client:
            try:
                async for event in client.stream({"model": "m", "messages": [{"role": "user", "content": text}], **fields}):
                    if isinstance(event, Outcome):
                        return texts, event
                    assert isinstance(event, Delta)
                    texts.append(event.text)
            except ChatError as error:
                return texts, error

    return asyncio.run(go())


def models(url, key=None):
    async def go():
        async with ChatClient(url, key) as client:
            return await client.models()

    return asyncio.run(go())


def test_models_come_with_what_they_can_do(served):
    first, second = models(served[1])
    assert (first.name, second.name) == ("avg-llava", "avg-llava-stage3")
    assert first.granularities == (36, 72, 144, 288, 576) and first.has_router and first.max_images == 8


def test_an_answer_comes_in_pieces_and_ends_with_usage(served):
    texts, outcome = ask(served[1], "hello there", granularity=36)
    assert texts == ["You ", "asked ", "m: ", "hello ", "there "]
    assert outcome.finish_reason == "stop" and outcome.usage["completion_tokens"] == 5 and outcome.request_id == "req-7"
    body = served[0].bodies[-1]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["granularity"] == 36


def test_a_refusal_keeps_its_sentence_code_status_and_request_id(served):
    texts, error = ask(served[1], "refuse")
    assert texts == []
    assert error.text == "The server is at capacity; try again."
    assert (error.code, error.status, error.request_id) == ("overloaded", 503, "req-503")


def test_an_error_within_a_stream_is_raised_after_what_came_before_it(served):
    texts, error = ask(served[1], "fail in the middle")
    assert texts == ["You ", "asked "]
    assert error.code == "non_finite_logits" and error.request_id == "req-7"


def test_a_stream_without_an_end_is_an_error(served):
    texts, error = ask(served[1], "die in the middle")
    assert texts and error.code == "connection_lost"


def test_garbage_is_told_apart_from_failure(served):
    assert ask(served[1], "garbage")[1].code == "not_understood"


def test_nobody_there_is_told_with_the_address():
    with running(Backend().app) as url:
        pass
    error = ask(url, "hello")[1]
    assert error.code == "server_unreachable" and url in error.text
    with pytest.raises(ChatError, match="Nothing answers"):
        models(url)


def test_the_key_goes_along():
    backend = Backend()
    backend.key = "secret"
    with running(backend.app) as url:
        assert len(models(url, "secret")) == 2
        with pytest.raises(ChatError) as raised:
            models(url, "wrong")
    assert raised.value.code == "invalid_api_key" and raised.value.status == 401


async def web_page(scope, receive, send):
    if scope["type"] == "http":
        redirect = scope["path"] == "/v1/models"
        headers = [(b"location", b"http://192.0.2.1/")] if redirect else []
        await send({"type": "http.response.start", "status": 302 if redirect else 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"<html>"})


def test_another_kind_of_server_is_no_api_and_no_redirect_is_followed():
    with running(web_page) as url:
        with pytest.raises(ChatError) as raised:
            models(url)
        assert raised.value.status == 302
        assert ask(url, "hello")[1].code == "http_404"


def test_hanging_up_reaches_the_server(served):
    async def go():
        async with ChatClient(served[1]) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "long"}]}
            async with contextlib.aclosing(client.stream(body)) as events:
                async for _ in events:
                    break
            for _ in range(100):
                if served[0].hung_up > before:
                    return
                await asyncio.sleep(0.05)

    before = served[0].hung_up
    asyncio.run(go())
    assert served[0].hung_up == before + 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("http://localhost:30000/", "http://localhost:30000"), ("https://h/v1", "https://h"), ("http://h:1/v1/", "http://h:1")],
)
def test_addresses_are_taken_with_and_without_the_api_path(given, wanted):
    assert server_address(given) == wanted


@pytest.mark.parametrize("address", ["localhost:30000", "ftp://h", "", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="expected one like"):
        server_address(address)
