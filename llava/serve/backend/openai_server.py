"""The server behind a bridge: how it is called, and which models it lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava.rules import Text
from llava.serve.backend.openai_stream import is_count
from llava.serve.http.addresses import Endpoint, parse_worker_url
from llava.serve.http.client import BoundedClient, BrokenResponse, Timeouts

_MAX_LIST_BYTES = 4_000_000


@dataclass(frozen=True)
class Backend:
    """An OpenAI-compatible server, and how it is used.

    url: `http(s)://host:port`, with `/v1` or without. model: the name the backend knows the model by. api_key: sent as a bearer token.
    name: what our clients call the model; by default the same.
    granularities: tokens per view, coarse to fine, of a vLLM with this project's plug-in; it takes them as `mm_processor_kwargs`, and its
    model list does not name them. has_router: whether that model has one.
    context_length: reported to clients where the backend reports none. max_images: per request.
    concurrency: requests sent to the backend at once; at most max_queue further ones wait here.
    timeouts: seconds for an answer. poll_seconds: between two requests of its model list.
    """

    url: str
    model: str
    name: str | None = None
    api_key: str | None = None
    granularities: tuple[int, ...] = ()
    has_router: bool = True
    context_length: int = 4096
    max_images: int = 8
    concurrency: int = 32
    max_queue: int = 64
    timeouts: Timeouts = field(default_factory=lambda: Timeouts(connect=3.0, headers=300.0, read=120.0, total=1800.0))
    poll_seconds: float = 5.0

    @property
    def endpoint(self) -> Endpoint:
        """Its address; the host name is resolved anew for every connection.

        Raises:
            ValueError: the URL is not of that form.
        """
        url = parse_worker_url(self.url.rstrip("/").removesuffix("/v1"))
        return Endpoint(url, (url.host,))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


_DESCRIPTION = Text(longest=1000)


@dataclass(frozen=True)
class BackendModel:
    """One entry of a backend's model list. owner: its `owned_by`, which names the software; may be empty."""

    name: str
    context_length: int | None
    granularities: tuple[int, ...]
    has_router: bool
    owner: str = ""
    description: str | None = None


async def list_models(outbound: BoundedClient, backend: Backend) -> list[BackendModel]:
    """Ask a backend for its models.

    Raises:
        Unreachable: nothing answers there. BrokenResponse: it does not answer with a list of models.
    """
    timeouts = Timeouts(connect=3.0, headers=5.0, read=5.0, total=10.0)
    async with outbound.call(
        "GET", backend.endpoint, "/v1/models", timeouts=timeouts, max_bytes=_MAX_LIST_BYTES, headers=backend.headers
    ) as reply:
        if reply.status != 200:
            raise BrokenResponse(f"it answered with status {reply.status} when asked for its models")
        listed = await reply.json()
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        raise BrokenResponse("its answer is not a list of models")
    return [_backend_model(entry) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _backend_model(entry: dict[str, Any]) -> BackendModel:
    lengths = [entry.get(key) for key in ("context_length", "max_model_len")]
    levels = entry.get("granularities")
    known = isinstance(levels, list) and all(is_count(level) for level in levels)
    return BackendModel(
        entry["id"],
        next((length for length in lengths if isinstance(length, int) and length > 0), None),
        tuple(levels) if known and levels else (),
        entry.get("has_router") is True,
        str(entry.get("owned_by") or ""),
        entry["description"] if _DESCRIPTION.accepts(entry.get("description")) else None,
    )
