"""An engine without a model: it sends requests to an OpenAI-compatible server and turns what that streams into events.

The backend (SGLang, vLLM, or this project's own worker) is named by the operator. Its model list is polled: it shows whether the backend is
up and what it can do. Its text is not trusted: clients get constant texts for its errors, the details go to the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from PIL import Image

from llava.messages import RoutingRequest
from llava.serve.api.paths import CHAT_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from llava.serve.backend.openai_request import chat_body, check_sampling, data_url
from llava.serve.backend.openai_server import Backend, BackendModel, list_models
from llava.serve.backend.openai_stream import check_head, read_stream
from llava.serve.backend.openai_tokens import prompt_tokens, tokenize_body
from llava.serve.http.client import BoundedClient, BrokenResponse, Unreachable
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import EngineImage, EngineStats, ErrorKind, Event, GenerationRequest, ModelCard, PromptTokens, ServeError
from llava.serve.protocol.error_templates import BACKEND_LACKS_GRANULARITIES, BACKEND_LACKS_TOKENS

logger = logging.getLogger(__name__)

_MAX_STREAM_BYTES = 256_000_000
_MAX_TOKENS_BYTES = 64_000_000
_WAITING_EVENTS = 64
"""Events of one answer that may wait for a slow reader; beyond that the backend's stream is not read on."""


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
        self._concurrency = asyncio.Semaphore(backend.concurrency)
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
        """Begin to poll the backend's model list; called within a running event loop."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._poll())

    async def look(self) -> bool:
        """Ask the backend for its models once and keep what ours can do; returns whether it is among them."""
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

    async def _poll(self) -> None:
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
            return prompt_tokens(await self._post(TOKENIZE_PATH, body))
        except BrokenResponse as error:
            raise ServeError(ErrorKind.BACKEND_FAILED) from error

    async def detokenize(self, ids: Sequence[int]) -> str:
        answer = await self._post(DETOKENIZE_PATH, {"model": self.backend.model, "tokens": list(ids)})
        if not isinstance(answer.get("prompt"), str):
            raise ServeError(ErrorKind.BACKEND_FAILED)
        return str(answer["prompt"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The backend's answer at a path that streams nothing."""
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
        """Called by a generation when it ends, in whatever way."""
        self._generations.discard(generation)

    async def events(self, generation: RemoteGeneration) -> AsyncIterator[Event]:
        """Wait until the backend takes another request, send it, and yield the answer's events."""
        request = generation.request
        begun = monotonic()
        self._check(request)
        async with self._concurrency:
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
        is_routed = replace(request.routing, details=()) != RoutingRequest()
        if is_routed and not self.card.granularities:
            raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_LACKS_GRANULARITIES, "granularity")
        if len(request.images) > self.backend.max_images:
            raise ServeError(
                ErrorKind.INVALID_REQUEST, f"The request holds {len(request.images)} images, expected at most {self.backend.max_images}."
            )

    def _body(self, request: GenerationRequest) -> bytes:
        return compact_json(chat_body(request, self.backend.model, self._owner))


class RemoteGeneration:
    """One answer that the backend is streaming; see `protocol.Generation`."""

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
        """Move the backend's events into the queue; returns the error that ended them, if any."""
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
        """Leave the engine before the reader is woken by the end."""
        self._engine.ended(self)
        self._events.put_nowait(ServeError(ErrorKind.CANCELLED) if task.cancelled() else task.result())
