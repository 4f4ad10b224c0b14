"""The split engine: images become rows here, and a vLLM answers the prompt that holds them; see the package's docstring."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from PIL import Image

from llava.inference import Assistant, template_stops
from llava.messages import Message, RoutingRequest
from llava.model.image_embeds import image_embeds_part
from llava.openai_chat import messages_with
from llava.serve.api.paths import CHAT_PATH
from llava.serve.backend.openai_engine import MAX_STREAM_BYTES, RemoteGeneration, ServerEngine
from llava.serve.backend.openai_request import sampling_fields
from llava.serve.backend.openai_server import Backend, BackendModel
from llava.serve.backend.openai_stream import check_head
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.embedded import card_of
from llava.serve.engine.failures import explain
from llava.serve.engine.prepare import too_long
from llava.serve.engine.scores import ScoreStream, TokenTexts
from llava.serve.http.client import BoundedClient
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import (
    EngineImage,
    EngineStats,
    ErrorKind,
    Event,
    GenerationRequest,
    ModelCard,
    PromptTokens,
    Sampling,
    ServeError,
)
from llava.serve.split.child import ChildServer
from llava.serve.split.encode import BatchedEncoder, EncodedImages, RowEncoder
from llava.serve.split.prompt import SplitPreparer, SplitPrompt
from llava.serve.split.token_stream import AnswerStream
from llava.text_stream import TextStream

logger = logging.getLogger(__name__)

_OWNER = "vllm"
"""Whose extensions of OpenAI's API the server knows."""


@dataclass(frozen=True)
class _Sent:
    """A request on its way to the server. room: new tokens that it may write."""

    request: GenerationRequest
    prompt: SplitPrompt
    images: EncodedImages
    room: int


class SplitEngine(ServerEngine):
    """Answers requests with the front of a model in this process and its language model in a vLLM; see `protocol.Engine`.

    Args:
        assistant: the front, from `load_pretrained_model(front_only=True)`.
        name: what clients call the model.
        backend: the vLLM, or a router before several. Without a `model`, its only one.
        child: the process behind it, where it is ours.
        cache_bytes: of features and rows of images seen before. revision: of the weights, for the cache's keys.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        backend: Backend,
        child: ChildServer | None = None,
        *,
        cache_bytes: int = 256_000_000,
        revision: str = "",
        outbound: BoundedClient | None = None,
    ) -> None:
        super().__init__(backend, outbound)
        self.assistant, self.child = assistant, child
        self.kept = TensorCache(cache_bytes)
        self._card = card_of(assistant, name, backend.max_images)
        weights = f"{name}@{revision or id(assistant.model)}"
        self.preparer = SplitPreparer(assistant, self.kept, weights, self._card.context_length)
        self.encoder = BatchedEncoder(RowEncoder(assistant, self.kept))
        self._token_texts = TokenTexts(assistant.tokenizer)
        self._keeping: asyncio.Task[None] | None = None
        if child is not None:
            child.on_end = self._lost

    @property
    def card(self) -> ModelCard:
        return replace(self._card, context_length=self.preparer.longest_row)

    def start(self) -> None:
        super().start()
        if self.child is not None and self._keeping is None:
            self._keeping = asyncio.get_running_loop().create_task(self.child.run())

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self.encoder.close)
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])

    def stats(self) -> EngineStats:
        kept = self.kept
        failed = ErrorKind.BACKEND_FAILED if self.child is not None and self.child.gave_up else None
        return replace(
            super().stats(),
            cache_entries=len(kept), cache_bytes=kept.bytes, cache_hits=kept.hits, cache_misses=kept.misses, failed=failed,
        )  # fmt: skip

    # ---- whether the server is there -----------------------------------------------------------------------------------------

    def _choose(self, models: Sequence[BackendModel]) -> BackendModel | None:
        return super()._choose(models) if self.backend.model else models[0] if len(models) == 1 else None

    def _lost(self) -> None:
        """The server's process has ended; what it was asked breaks off by itself."""
        self._model = None

    async def _admit(self, model: BackendModel) -> None:
        """Ask the server about an image before any client does: it has to take rows, and to read prompts as we write them.

        Raises:
            Unreachable, BrokenResponse, ServeError: it does not.
        """
        self.preparer.longest_row = min(self._card.context_length, model.context_length or self._card.context_length)
        asked = replace(_PROBE, images=(await asyncio.to_thread(self.prepare_image, Image.new("RGB", (64, 64))),) * self._card.takes_images)
        async for _ in self._answered(await self._encoded(asked), model.name, monotonic()):
            pass
        if self.child is not None:
            self.child.was_ready()

    # ---- requests ------------------------------------------------------------------------------------------------------------

    def prepare_image(self, image: Image.Image) -> EngineImage:
        return self.preparer.prepare_image(image)

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        return await asyncio.to_thread(self.preparer.tokens, request, special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self.preparer.text_of, ids)

    async def events(self, generation: RemoteGeneration) -> AsyncIterator[Event]:
        request = generation.request
        begun = monotonic() - sum(image.seconds for image in request.images)  # the time that its images took counts
        self._served()  # before anything is computed
        async with self._concurrency:
            generation.running = True
            sent = await self._encoded(request)
            async for event in self._answered(sent, self._served(), begun):
                yield event

    def _served(self) -> str:
        """The model's name at the server.

        Raises:
            ServeError: the server is not there, or no longer.
        """
        if self._model is None:
            raise ServeError(ErrorKind.BACKEND_UNREACHABLE)
        return self._model.name

    async def _encoded(self, request: GenerationRequest) -> _Sent:
        """A request with its images decided.

        Raises:
            ServeError: it cannot be answered.
        """
        start = monotonic()
        try:
            prompt = await asyncio.to_thread(self.preparer.prepare_turns, request)
            views = 1000 * (monotonic() - start + sum(image.seconds for image in request.images))
            images = await self.encoder.encode(request, prompt.prepared)
        except Exception as error:
            raise explain(request.request_id, error) from error
        length = prompt.prepared.prompt.num_text_tokens + sum(report.visual_tokens for report in images.reports)
        room = self.preparer.longest_row - length
        if room < 1:
            raise too_long(request, self.preparer.longest_row)
        return _Sent(request, prompt, replace(images, milliseconds={"views": views, **images.milliseconds}), room)

    async def _answered(self, sent: _Sent, model: str, begun: float) -> AsyncIterator[Event]:
        content = await asyncio.to_thread(_body, sent, model)
        stops = (*template_stops(self.assistant.model.config.conv_version), *sent.request.sampling.stop)
        costs = [report.visual_tokens for report in sent.images.reports]
        answer = AnswerStream(
            TextStream(self.assistant.tokenizer, stops),
            ScoreStream(self._token_texts),
            lambda ids: sent.prompt.is_read_as(ids, costs),
            sent.images.reports,
            begun,
            sent.images.milliseconds,
        )
        async with self.ask(CHAT_PATH, content, "text/event-stream", MAX_STREAM_BYTES) as reply:
            await check_head(reply)
            async for event in answer.events(reply):
                yield event


_PROBE = GenerationRequest("probe", (Message("user", "What is this?"),), sampling=Sampling(max_new_tokens=1), routing=RoutingRequest())


def _body(sent: _Sent, model: str) -> bytes:
    """A request as the body of a chat completion with rows for images. Stop texts are watched for here, where the text is made."""
    sampling = sent.request.sampling
    least = min(sampling.max_new_tokens, sent.room)
    asked = replace(sampling, stop=(), max_new_tokens=least, min_new_tokens=min(sampling.min_new_tokens, least))
    messages = messages_with(sent.prompt.turns, [image_embeds_part(rows) for rows in sent.images.rows])
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": sampling.logprobs is not None}
    return compact_json({"model": model, "messages": messages, **sampling_fields(asked, _OWNER), **ids})
