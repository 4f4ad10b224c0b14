"""The interface of whatever answers requests: the embedded engine, and backends in other servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from PIL import Image

from llava.serve.protocol.values import EngineImage, EngineStats, Event, GenerationRequest, ModelCard, PromptTokens


class Generation(Protocol):
    """A running answer: iterate for `Started`, `Piece`s and `Finished`; a `ServeError` may be raised in between. Iterate once.

    Closing the iterator or calling `cancel` stops the work; both may be done at any time, more than once.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None: ...


class Engine(Protocol):
    """Generates answers: the embedded engine, or a bridge to another server."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would run."""
        ...

    def start(self) -> None:
        """Begin what has to run beside the requests; called once, within the event loop that they will come from."""
        ...

    def prepare_image(self, image: Image.Image) -> EngineImage:
        """Take from an RGB image what answering needs, so that its pixels can be freed; called in any thread.

        Raises:
            ServeError: the model takes no images, or not this one.
        """
        ...

    def submit(self, request: GenerationRequest) -> Generation:
        """Submit a request; called within a running event loop, returns at once.

        Raises:
            ServeError: `OVERLOADED` or `DRAINING`; errors in the request itself are raised by the iterator.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        """The tokens of a request's prompt, however long it is; nothing is generated.

        Args:
            special: whether they begin with the token that begins every text.

        Raises:
            ServeError: an error in the request.
        """
        ...

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            ServeError: an id that is not in the vocabulary.
        """
        ...

    async def drain(self) -> None:
        """Accept no more requests and wait until the running ones are done."""
        ...

    async def close(self) -> None:
        """Stop; requests still running are cancelled."""
        ...
