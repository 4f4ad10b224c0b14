"""One question to an OpenAI-compatible server: vLLM with the plug-in, a router before several of them, or one of this project's workers.

A request that fails for a reason that may pass (no connection, 429, 5xx) is sent again, later each time. What is left after that is one of
two things: this question's failure, or a server that is gone, which ends the run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import httpx

from llava.eval.answerers import Reply
from llava.eval.one_by_one import GoneError
from llava.messages import Options
from llava.openai_chat import processor_kwargs, routing_fields
from llava.rules import Integer, ListOf, Number, Rule, Text, faults, optional, refuse

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
"""HTTP statuses that may pass."""
REFUSING = frozenset((401, 403, 404, 405))
"""HTTP statuses that every question would get."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each further attempt where the server does not say: a minute in all, in which a replica restarts or is replaced."""
LONGEST_DELAY = 120.0
"""Of what a server asks for in `Retry-After`, in seconds."""
OURS = "avg-llava"
"""`owned_by` of the models of this project's own services."""
API_KEY = "VLLM_API_KEY"
"""The environment variable that holds the key, under the name that vLLM's own server reads."""
REASON_CHARACTERS = 500
_NUMBER = Number(-1e30, 1e30)
_SAID: dict[str, Rule] = {
    "text": Text(longest=2**24, shortest=0),
    "finish_reason": Text(),
    **dict.fromkeys(("prompt_tokens", "new_tokens"), Integer()),
    **dict.fromkeys(("visual_tokens", "full_visual_tokens"), optional(Integer())),
    "granularity": ListOf(optional(Integer(1))),
    "logits": ListOf(optional(ListOf(_NUMBER))),
}
"""Fields of `Reply` -> what a server may say of them."""


class GoneServerError(GoneError):
    """The server cannot be reached, refuses everybody, or is not what it should be; the run ends."""


class RefusedError(ValueError):
    """The server refused one question."""


class FailedError(RefusedError):
    """The server failed at one question every time it was asked, although it lives."""


class ChatServer:
    """A server at an address. `connect` comes first; everything runs in one event loop.

    Args:
        address: `http://host:port`, with or without `/v1`.
        model: a served model's name; where the server has one only, the name may be `None`.
        seconds: how long one answer may take.
    """

    def __init__(self, address: str, model: str | None = None, seconds: float = 600.0) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        if not _is_address(self.address):
            raise ValueError(f"--vllm is {address!r}, expected the address of a server, as in http://localhost:8000.")
        self.model, self.owner, self.root, self.seconds = model or "", "", "", seconds
        key = os.environ.get(API_KEY)
        self._client = httpx.AsyncClient(
            base_url=self.address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(seconds, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy from the environment has no business between a job and its engine
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def connect(self) -> None:
        """Find the model to ask.

        Raises:
            GoneServerError: nothing answers, or something other than a list of models. ValueError: no such model, or several.
        """
        response = await self._sent("GET", "/v1/models")
        try:
            entries = {str(entry["id"]): entry for entry in response.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise GoneServerError(f"{self.address} does not answer as an OpenAI-compatible server does; check --vllm.") from error
        if not self.model and len(entries) == 1:
            self.model = next(iter(entries))
        if self.model not in entries:
            chosen = f"has no model {self.model!r}" if self.model else "has several models"
            raise ValueError(f"{self.address} {chosen}; give --model-path one of {', '.join(sorted(entries))}.")
        self.owner = str(entries[self.model].get("owned_by") or "")
        self.root = str(entries[self.model].get("root") or "")

    async def ask(self, messages: list[dict[str, Any]], num_images: int, options: Options) -> Reply:
        """Ask one question, as often as it takes.

        Args:
            messages: as `llava.openai_chat.chat_messages` writes them.

        Raises:
            RefusedError: this question cannot be answered. GoneServerError: no question can.
        """
        response = await self._sent("POST", "/v1/chat/completions", self._body(messages, options))
        try:
            return _reply(response.json(), num_images, options)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            reason = repr(error)[:REASON_CHARACTERS]
            raise RefusedError(f"{self.address} answered something other than a chat completion: {reason}") from error

    def _body(self, messages: list[dict[str, Any]], options: Options) -> dict[str, Any]:
        body = {"model": self.model, "messages": messages, **sampling_fields(options)}
        if self.owner == OURS:
            return body | routing_fields(options.routing)
        wishes = processor_kwargs(options.routing)
        return body | ({"mm_processor_kwargs": wishes} if wishes else {})

    async def _sent(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """A response of status 200."""
        reason = ""
        for delay in (*DELAYS, None):
            wait = delay
            try:
                # httpx's own limits are per read; a server may send a byte now and then
                response = await asyncio.wait_for(self._client.request(method, path, json=body), self.seconds)
            except (httpx.HTTPError, asyncio.TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.status_code == 200:
                    return response
                reason = f"HTTP status {response.status_code}: {_said(response)}"
                if response.status_code in REFUSING:
                    raise GoneServerError(f"{self.address} refuses {path}; {reason}")
                if response.status_code not in RETRIED:
                    raise RefusedError(reason)
                wait = _asked_for(response, delay)
            if wait is not None:
                await asyncio.sleep(wait)
        raise await self._given_up(path, reason)

    async def _given_up(self, path: str, reason: str) -> Exception:
        """Whether it is this request that the server cannot answer, or any."""
        try:
            alive = (await self._client.get("/v1/models", timeout=10.0)).status_code == 200
        except httpx.HTTPError:
            alive = False
        tries = f"{len(DELAYS) + 1} attempts over {sum(DELAYS):.0f} s"
        if alive and path != "/v1/models":
            return FailedError(f"{tries} failed; the last: {reason}")
        return GoneServerError(f"Nothing answers at {self.address} ({tries} failed; the last: {reason}); start it, or check --vllm.")


def sampling_fields(options: Options) -> dict[str, Any]:
    """How to decode, as fields of a chat completion.

    Raises:
        ValueError: what a server cannot be asked for.
    """
    if options.num_beams > 1:
        raise ValueError(f"--num-beams is {options.num_beams}, but vLLM has no beams to serve; leave it out, or use --engine embedded.")
    if options.conv_mode is not None:
        raise ValueError(f"--conv-mode is {options.conv_mode}, but a server writes its model's own template; leave it out.")
    given = {"top_p": options.top_p, "seed": options.seed, "stop": list(options.stop) or None, "min_tokens": options.min_new_tokens or None}
    fields = {"temperature": options.temperature, "max_tokens": options.max_new_tokens}
    return fields | {name: value for name, value in given.items() if value is not None}


def _said(response: httpx.Response) -> str:
    """A server's own words about an error."""
    try:
        error = response.json()
        error = error.get("error", error)
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        text = response.text
    return text[:REASON_CHARACTERS]


def _asked_for(response: httpx.Response, delay: float | None) -> float | None:
    """Seconds to wait: what the server asks for, where it does; `None` after the last attempt."""
    asked = response.headers.get("retry-after", "")
    return min(max(float(asked), delay), LONGEST_DELAY) if delay is not None and asked.isdecimal() else delay


def _is_address(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _reply(body: Mapping[str, Any], num_images: int, options: Options) -> Reply:
    """What a chat completion says; nothing of another form gets into an answers file.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: it is none.
    """
    choice, usage = body["choices"][0], body["usage"]
    details = (usage.get("prompt_tokens_details") or {}).get("multimodal_tokens") or {}
    images = (body.get("avg_llava") or {}).get("images") or []
    fixed = options.routing.granularity if isinstance(options.routing.granularity, int) else None
    counted = usage.get("visual_tokens", details.get("image", None if num_images else 0))
    said: dict[str, Any] = {
        "text": choice["message"]["content"] or "",
        "finish_reason": choice["finish_reason"],
        "prompt_tokens": usage["prompt_tokens"],
        "new_tokens": usage["completion_tokens"],
        "granularity": usage.get("granularities") or [fixed] * num_images,
        "visual_tokens": counted,
        "full_visual_tokens": usage.get("full_visual_tokens", None if num_images else 0),
        "logits": [image.get("logits") for image in images] or [None] * num_images,
    }
    milliseconds = dict((body.get("avg_llava") or {}).get("milliseconds") or {})
    refuse("The answer", faults(said, _SAID) + faults(milliseconds, dict.fromkeys(milliseconds, _NUMBER)))
    return Reply(**{**said, "text": said["text"].strip()}, milliseconds=milliseconds)
