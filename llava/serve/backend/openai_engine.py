"""An engine that has no model: it passes requests on to an OpenAI-compatible server and gives back what that streams.

The backend (SGLang, vLLM, or this project's own worker) is named by the operator. It is asked for its model list now and then, which says
whether it is there and what it can do. Its answers are not believed further than they can be read: errors reach clients with constant
texts, the details go to the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from PIL import Image

from llava.messages import RoutingRequest
from llava.rules import Text
from llava.serve.api.paths import CHAT_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from llava.serve.backend.openai_stream import chat_body, check_head, check_sampling, data_url, is_count, read_stream
from llava.serve.backend.token_ids import prompt_tokens, tokenize_body
from llava.serve.http.addresses import Endpoint, parse_worker_url
from llava.serve.http.client import BoundedClient, BrokenResponse, Timeouts, Unreachable
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import EngineImage, EngineStats, ErrorKind, Event, GenerationRequest, ModelCard, PromptTokens, ServeError
from llava.serve.protocol.error_templates import BACKEND_LACKS_GRANULARITIES, BACKEND_LACKS_TOKENS

logger = logging.getLogger(__name__)

_MAX_STREAM_BYTES = 256_000_000
_MAX_LIST_BYTES = 4_000_000
_MAX_TOKENS_BYTES = 64_000_000
_WAITING_EVENTS = 64
"""Events of one answer that may wait for a slow reader; then the backend's stream is no longer read."""


@dataclass(frozen=True)
class Backend:
    """Which server, and how it is used.

    url: `http(s)://host:port`, with `/v1` or without. model: the name the backend knows the model by. api_key: sent as a bearer token.
    name: what our clients call the model; by default the same.
    context_length: what is told to clients where the backend does not say. max_images: per request.
    concurrency: requests the backend gets at once; the next ones wait here, at most max_queue of them.
    timeouts: seconds for an answer. poll_seconds: between two looks at its model list.
    """

    url: str
    model: str
    name: str | None = None
    api_key: str | None = None
    context_length: int = 4096
    max_images: int = 8
    concurrency: int = 32
    max_queue: int = 64
    timeouts: Timeouts = field(default_factory=lambda: Timeouts(connect=3.0, headers=300.0, read=120.0, total=1800.0))
    poll_seconds: float = 5.0

    @property
    def endpoint(self) -> Endpoint:
        """Where it is called; its name is resolved anew by every connection, as an operator expects of an address they wrote.

        Raises:
            ValueError: the URL is not of the form.
        """
        url = parse_worker_url(self.url.rstrip("/").removesuffix("/v1"))
        return Endpoint(url, (url.host,))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


_DESCRIPTION = Text(longest=1000)


@dataclass(frozen=True)
class BackendModel:
    """One entry of a backend's model list. owner: whose server it is, as `owned_by` says, or nothing."""

    name: str
    context_length: int | None
    granularities: tuple[int, ...]
    has_router: bool
    owner: str = ""
    description: str | None = None


async def list_models(outbound: BoundedClient, backend: Backend) -> list[BackendModel]:
    """Ask a backend for its models.

    Raises:
        Unreachable: it is not there. BrokenResponse: it does not answer, or not with a list of models.
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


class RemoteEngine:
    """Answers requests through a backend; see `protocol.Engine`.

    Args:
        backend: which server and how.
        outbound: carries the calls; the network unless another is given.
    """

    def __init__(self, backend: Backend, outbound: BoundedClient | None = None) -> None:
        self.backend = backend
        self.outbound = outbound or BoundedClient()
        self._model: BackendModel | None = None
        self._places = asyncio.Semaphore(backend.concurrency)
        self._generations: set[RemoteGeneration] = set()
        self._draining = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def card(self) -> ModelCard:
        model = self._model
        return ModelCard(
            name=self.backend.name or self.backend.model,
            context_length=(model.context_length if model else None) or self.backend.context_length,
            granularities=model.granularities if model else (),
            has_router=model.has_router if model else False,
            takes_images=True,
            max_images=self.backend.max_images,
            description=model.description if model else None,
        )

    @property
    def ready(self) -> bool:
        return self._model is not None and not self._draining

    def start(self) -> None:
        """Begin to look at the backend's model list now and then; called within a running event loop."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._keep_looking())

    async def look(self) -> bool:
        """Ask the backend for its models once; returns whether ours is among them, and notes what it can do."""
        try:
            models = await list_models(self.outbound, self.backend)
        except (Unreachable, BrokenResponse) as error:
            self._note(None, f"the backend {self.backend.url} cannot be used: {error}")
            return False
        found = next((model for model in models if model.name == self.backend.model), None)
        self._note(found, f"the backend {self.backend.url} has no model {self.backend.model!r}, only {[m.name for m in models][:8]}")
        return found is not None

    def _note(self, model: BackendModel | None, problem: str) -> None:
        if model is None and (self._model is not None or self._watch is None):
            logger.warning("%s", problem)
        if model is not None and self._model is None:
            logger.info("the backend %s serves %r", self.backend.url, self.backend.model)
        self._model = model

    async def _keep_looking(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self.backend.poll_seconds)

    def prepare_image(self, image: Image.Image) -> EngineImage:
        """The image as a data URL."""
        start = monotonic()
        url = data_url(image)
        return EngineImage(image.size, url, len(url), monotonic() - start)

    def submit(self, request: GenerationRequest) -> RemoteGeneration:
        if self._draining:
            raise ServeError(ErrorKind.DRAINING)
        if len(self._generations) >= self.backend.concurrency + self.backend.max_queue:
            raise ServeError(ErrorKind.OVERLOADED)
        generation = RemoteGeneration(self, request)
        self._generations.add(generation)
        generation.start()
        return generation

    def stats(self) -> EngineStats:
        running = sum(generation.running for generation in self._generations)
        return EngineStats(len(self._generations) - running, running)

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        self._check(request)
        body = await asyncio.to_thread(tokenize_body, request, special, self.backend.model)
        try:
            return prompt_tokens(await self._asked(TOKENIZE_PATH, body))
        except BrokenResponse as error:
            raise ServeError(ErrorKind.BACKEND_FAILED) from error

    async def detokenize(self, ids: Sequence[int]) -> str:
        answer = await self._asked(DETOKENIZE_PATH, {"model": self.backend.model, "tokens": list(ids)})
        if not isinstance(answer.get("prompt"), str):
            raise ServeError(ErrorKind.BACKEND_FAILED)
        return str(answer["prompt"])

    async def _asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The backend's answer to something else than a chat."""
        try:
            async with self.outbound.call(
                "POST",
                self.backend.endpoint,
                path,
                timeouts=self.backend.timeouts,
                max_bytes=_MAX_TOKENS_BYTES,
                content=compact_json(body),
                headers={**self.backend.headers, "Content-Type": "application/json"},
            ) as reply:
                if reply.status in (404, 405):
                    raise ServeError(ErrorKind.NOT_FOUND, BACKEND_LACKS_TOKENS)
                await check_head(reply, "application/json")
                answer = await reply.json()
        except Unreachable as error:
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE) from error
        except BrokenResponse as error:
            raise ServeError(ErrorKind.BACKEND_FAILED) from error
        if not isinstance(answer, dict):
            raise ServeError(ErrorKind.BACKEND_FAILED)
        return answer

    async def drain(self) -> None:
        self._draining = True
        while self._generations:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self._draining = True
        for generation in list(self._generations):
            generation.cancel()
        if self._watch is not None:
            self._watch.cancel()
        while self._generations:
            await asyncio.sleep(0.01)
        await self.outbound.close()

    def ended(self, generation: RemoteGeneration) -> None:
        """Called by a generation at its end, whatever that was."""
        self._generations.discard(generation)

    async def events(self, generation: RemoteGeneration) -> AsyncIterator[Event]:
        """Ask the backend and give its answer's events; waits for a place first."""
        request = generation.request
        begun = monotonic()
        self._check(request)
        async with self._places:
            generation.running = True
            queued = monotonic()
            content = await asyncio.to_thread(self._body, request)
            async with self.outbound.call(
                "POST",
                self.backend.endpoint,
                CHAT_PATH,
                timeouts=self.backend.timeouts,
                max_bytes=_MAX_STREAM_BYTES,
                content=content,
                headers={**self.backend.headers, "Content-Type": "application/json", "Accept": "text/event-stream"},
            ) as reply:
                await check_head(reply)
                async for event in read_stream(reply, begun, queued):
                    yield event

    @property
    def _owner(self) -> str:
        return self._model.owner if self._model else ""

    def _check(self, request: GenerationRequest) -> None:
        check_sampling(request.sampling, self._owner)
        asked = replace(request.routing, details=()) != RoutingRequest()
        if asked and not self.card.granularities:
            raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_LACKS_GRANULARITIES, "granularity")
        if len(request.images) > self.backend.max_images:
            raise ServeError(
                ErrorKind.INVALID_REQUEST, f"The request holds {len(request.images)} pictures, expected at most {self.backend.max_images}."
            )

    def _body(self, request: GenerationRequest) -> bytes:
        return compact_json(chat_body(request, self.backend.model, self._owner))


class RemoteGeneration:
    """One answer on its way from the backend; see `protocol.Generation`."""

    def __init__(self, engine: RemoteEngine, request: GenerationRequest) -> None:
        self.request = request
        self.running = False
        self._engine = engine
        self._events: asyncio.Queue[Event | ServeError | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_WAITING_EVENTS)
        self._task: asyncio.Task[ServeError | None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._pump())
        self._task.add_done_callback(self._done)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, ServeError):
                    raise event
                self._room.release()
                yield event
        finally:
            self.cancel()

    async def _pump(self) -> ServeError | None:
        """Take the backend's events in; returns what went wrong."""
        try:
            async for event in self._engine.events(self):
                await self._room.acquire()
                self._events.put_nowait(event)
        except ServeError as error:
            return error
        except Unreachable as error:
            return self._failed(ErrorKind.BACKEND_UNREACHABLE, error)
        except BrokenResponse as error:
            return self._failed(ErrorKind.BACKEND_FAILED, error)
        except Exception:
            logger.exception("request %s failed in the bridge", self.request.request_id)
            return ServeError(ErrorKind.INTERNAL)
        return None

    def _failed(self, kind: ErrorKind, error: Exception) -> ServeError:
        logger.warning("request %s: the backend %s: %s", self.request.request_id, self._engine.backend.url, error)
        return ServeError(kind)

    def _done(self, task: asyncio.Task[ServeError | None]) -> None:
        """Give the place back before the reader learns of the end."""
        self._engine.ended(self)
        self._events.put_nowait(ServeError(ErrorKind.CANCELLED) if task.cancelled() else task.result())
