"""A request of any of the APIs, once it was read and found possible: what the engine is to be asked, and how errors name its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llava.messages import Detail, Message, RoutingRequest
from llava.serve.protocol import EngineImage, Finished, GenerationRequest, Sampling, ServeError, Started, TokenScore

FullAnswer = tuple[str, Sequence[TokenScore], Finished]
"""Text, scores and ending."""


@dataclass(frozen=True)
class ImageSource:
    """An image as a client names it.

    text: a data URL or web address, or where `plain_base64` is set, other text that is base64. param: the field it stands in.
    detail: see `RoutingRequest`.
    """

    text: str
    param: str
    detail: Detail | None = None
    plain_base64: bool = False


@dataclass(frozen=True)
class Call:
    """What one body asks for.

    turns: a conversation, with `<image>` where an image goes; or prompts: finished ones, each to be continued. n: answers to each of them.
    sources: the images, in the order of their places. include_usage: whether a stream ends with a part about usage. echo: whether the
    prompt stands before each part's text (LLaVA's protocol).
    fields: what a client calls the engine's `messages`, `prompt` and others, where that is another name. told: what of the body an answer
    repeats.
    """

    turns: tuple[Message, ...] = ()
    prompts: tuple[str, ...] = ()
    sources: tuple[ImageSource, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingRequest = field(default_factory=RoutingRequest)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    user: str | None = None
    echo: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Answers in all."""
        return self.n * max(1, len(self.prompts))

    def requests(self, request_id: str, images: Sequence[EngineImage]) -> list[GenerationRequest]:
        """One generation request per answer; with a seed, each of a prompt's answers draws from its own."""
        return [
            GenerationRequest(
                request_id=request_id if self.count == 1 else f"{request_id}.{index}",
                messages=self.turns,
                prompt=self.prompts[index // self.n] if self.prompts else None,
                images=tuple(images),
                sampling=self._seeded(index % self.n),
                routing=self.routing,
            )
            for index in range(self.count)
        ]

    def _seeded(self, index: int) -> Sampling:
        seed = self.sampling.seed
        if seed is None or index == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + index) % 2**63)

    def named(self, error: ServeError) -> ServeError:
        """An engine's error about a part of its request, with the name of the field that the client knows."""
        names = {**{f"images[{place}]": source.param for place, source in enumerate(self.sources)}, **self.fields}
        return ServeError(error.kind, error.detail, names.get(error.param or "", error.param), error.least)


class StreamWriter(Protocol):
    """Writes the parts of one call's stream. index: of the answer. What a writer has nothing to say about is empty."""

    media_type: str

    def opening(self, index: int, event: Started) -> bytes: ...

    def piece(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes: ...

    def ending(self, index: int, event: Finished) -> bytes: ...

    def closing(self, endings: Mapping[int, Finished]) -> bytes:
        """What follows the last answer's ending."""
        ...

    def failure(self, error: ServeError, request_id: str) -> bytes:
        """What ends the stream where an answer cannot be finished."""
        ...


class Writer(StreamWriter, Protocol):
    """Writes one call's answers, streamed or whole."""

    def completion(self, answers: Sequence[FullAnswer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...
