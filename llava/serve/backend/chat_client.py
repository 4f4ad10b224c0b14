"""The web page's client of the OpenAI API, with this project's additions: granularity in, a report of the visual tokens out.

Asked for an answer, it yields it as it comes:

    async with ChatClient("http://localhost:30000") as client:
        async for event in client.stream(body):   # Delta, Delta, ..., Outcome
            ...
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from llava.serve.http.client import first_bytes
from llava.serve.http.sse import server_sent_events

MAX_EVENT_BYTES = 4_000_000
"""Largest event of a stream; the last chunk of an answer about many images has some kilobytes."""
MAX_ERROR_BYTES = 100_000
"""Of an error's body that are read."""


@dataclass(frozen=True)
class ModelInfo:
    """A served model, as `/v1/models` describes it.

    granularities: tokens per view, coarse to fine; empty where there is nothing to choose. max_images: per request. description: shown
    to users; empty where the server has none.
    """

    name: str
    granularities: tuple[int, ...] = ()
    has_router: bool = False
    takes_images: bool = True
    max_images: int = 8
    description: str = ""


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Outcome:
    """The end of an answer.

    finish_reason: `stop` or `length`. usage: OpenAI's counts and ours (`visual_tokens`, `full_visual_tokens`, `granularities`).
    images: one report per image. milliseconds: the server's, per part. Empty where the server reports none.
    """

    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Mapping[str, Any], ...] = ()
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    request_id: str | None = None


class ChatError(Exception):
    """A failure that can be shown to a user.

    text: a sentence. code: OpenAI's error code, or ours. request_id: under which the server logged it. status: HTTP's, if there was one.
    param: the field of the request that caused it. least: the smallest value of that field that would do.
    """

    def __init__(
        self,
        text: str,
        code: str,
        request_id: str | None = None,
        status: int | None = None,
        param: str | None = None,
        least: int | None = None,
    ) -> None:
        self.text, self.code, self.request_id, self.status, self.param, self.least = text, code, request_id, status, param, least
        super().__init__(text)


def server_address(url: str) -> str:
    """A server's address without trailing slashes or `/v1`.

    Raises:
        ValueError: anything but http(s) and a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"The address is {url!r}, expected one like http://localhost:30000.")
    return url.rstrip("/").removesuffix("/v1")


class ChatClient:
    """Calls one server.

    Args:
        url: a controller, or a worker by itself.
        api_key: sent as bearer token.
        first_byte_seconds: how long the server may take to the first byte, and between two pieces.
    """

    def __init__(self, url: str, api_key: str | None = None, *, first_byte_seconds: float = 300.0) -> None:
        self.url = server_address(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(first_byte_seconds, connect=5.0, write=60.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,  # a proxy from the environment has no business between the page and its controller
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def models(self) -> list[ModelInfo]:
        """The models that can be asked now, by name.

        Raises:
            ChatError: the server cannot be reached, refuses, or answers something else.
        """
        try:
            response = await self._client.get("/v1/models", timeout=5.0)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _error_of(response.status_code, response.content, response.headers.get("x-request-id"))
        try:
            found = [_model_info(entry) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _garbage(self.url) from error
        return sorted({model.name: model for model in found}.values(), key=lambda model: model.name)

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Delta | Outcome]:
        """Ask for one answer; `Delta`s, then one `Outcome`. Closing the iterator disconnects, and the server cancels the request.

        Args:
            body: of `/v1/chat/completions`; streaming and usage are switched on here.

        Raises:
            ChatError: see there; also when the stream breaks off.
        """
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=whole) as response:
                request_id = response.headers.get("x-request-id")
                if response.status_code != 200:
                    raise _error_of(response.status_code, await first_bytes(response.aiter_bytes(), MAX_ERROR_BYTES), request_id)
                async for event in _events(response, request_id, self.url):
                    yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> ChatError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return ChatError(f"Nothing answers at {self.url}.", "server_unreachable")
        if isinstance(error, httpx.TimeoutException):
            return ChatError(f"The server at {self.url} did not answer in time.", "timeout")
        return ChatError(f"The connection to {self.url} broke off.", "connection_lost")


def _model_info(entry: Mapping[str, Any]) -> ModelInfo:
    ours = entry.get("avg_llava") or entry
    return ModelInfo(
        name=str(entry["id"]),
        granularities=tuple(int(level) for level in ours.get("granularities") or ()),
        has_router=bool(ours.get("has_router", False)),
        takes_images=bool(ours.get("takes_images", True)),
        max_images=int(ours.get("max_images", 8)),
        description=str(ours.get("description") or "")[:1000],
    )


def _garbage(url: str) -> ChatError:
    return ChatError(f"What {url} answers is not the OpenAI API; is this the address of a controller or a worker?", "not_understood")


def _error_of(status: int, body: bytes, request_id: str | None) -> ChatError:
    try:
        error = json.loads(body)["error"]
        return _stated_error(error, status, request_id)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ChatError(f"The server refused with HTTP status {status} and no reason.", f"http_{status}", request_id, status)


def _stated_error(error: Mapping[str, Any], status: int | None, request_id: str | None) -> ChatError:
    text = str(error.get("message") or "The server reports an error without a message.")
    code = str(error.get("code") or error.get("type") or "error")
    param, least = error.get("param"), error.get("least")
    return ChatError(
        text[:2000],
        code[:100],
        str(error.get("request_id") or request_id or "")[:200] or None,
        status,
        param if isinstance(param, str) else None,
        least if type(least) is int else None,
    )


async def _events(response: httpx.Response, request_id: str | None, url: str) -> AsyncIterator[Delta | Outcome]:
    """Read the stream of an answer to the `[DONE]` that ends it."""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = {}
    ours: Mapping[str, Any] = {}
    try:
        async for event in server_sent_events(response.aiter_bytes(), MAX_EVENT_BYTES):
            if event.data.strip() == "[DONE]":
                yield _outcome(finish_reason, usage, ours, request_id)
                return
            chunk = event.json()
            if chunk.get("error"):
                raise _stated_error(chunk["error"], None, request_id)
            request_id = request_id or chunk.get("id")
            usage, ours = chunk.get("usage") or usage, chunk.get("avg_llava") or ours
            text = ""
            for choice in chunk.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                text += (choice.get("delta") or {}).get("content") or ""
            if text:
                yield Delta(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise _garbage(url) from error
    raise ChatError("The server broke off in the middle of the answer.", "connection_lost", request_id)


def _outcome(finish_reason: str | None, usage: Mapping[str, Any], ours: Mapping[str, Any], request_id: str | None) -> Outcome:
    images = ours.get("images")
    milliseconds = ours.get("milliseconds")
    return Outcome(
        finish_reason=finish_reason,
        usage=usage if isinstance(usage, Mapping) else {},
        images=tuple(image for image in images if isinstance(image, Mapping)) if isinstance(images, list) else (),
        milliseconds=milliseconds if isinstance(milliseconds, Mapping) else {},
        request_id=request_id,
    )
