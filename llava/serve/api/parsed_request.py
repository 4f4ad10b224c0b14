"""A request of any of the APIs, parsed and checked: what to ask the engine for, and how errors name its fields."""

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
    """An image as a client sends it.

    text: a data URL or a web address, or where `plain_base64` is set, bare base64. param: the field that holds it.
    detail: see `RoutingRequest`.
    """

    text: str
    param: str
    detail: Detail | None = None
    plain_base64: bool = False


@dataclass(frozen=True)
class ParsedRequest:
    """What one body asks for.

    turns: a conversation, with `<image>` where an image goes; or prompts: finished ones, each to be continued. n: answers to each of them.
    sources: the images, in the order of their placeholders. include_usage: whether a stream ends with a chunk about usage. echo: whether
    the text of each part begins with the prompt (LLaVA's protocol).
    field_names: the client's names of the engine's `messages`, `prompt` and others, where they differ. repeated: fields of the body that
    an answer repeats.
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
    field_names: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of answers."""
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

    def with_client_names(self, error: ServeError) -> ServeError:
        """An engine's error about a field of its request, under the client's name of that field."""
        names = {**{f"images[{index}]": source.param for index, source in enumerate(self.sources)}, **self.field_names}
        return ServeError(error.kind, error.detail, names.get(error.param or "", error.param), error.least)


class StreamWriter(Protocol):
    """Writes the parts of one stream. index: of the answer. Empty bytes where the protocol has nothing to send."""

    media_type: str

    def on_started(self, index: int, event: Started) -> bytes: ...

    def on_text(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes: ...

    def on_finished(self, index: int, event: Finished) -> bytes: ...

    def on_all_finished(self, endings: Mapping[int, Finished]) -> bytes:
        """What follows the end of the last answer."""
        ...

    def on_error(self, error: ServeError, request_id: str) -> bytes:
        """What ends the stream when an answer fails."""
        ...


class Writer(StreamWriter, Protocol):
    """Writes the answers to one request, streamed or whole."""

    def completion(self, answers: Sequence[FullAnswer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...
