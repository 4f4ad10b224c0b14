"""Which models the page can offer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from llava.serve.backend.chat_client import ChatClient, ChatError, ModelInfo

ListMode = Literal["once", "reload"]


@dataclass(frozen=True)
class ModelList:
    """The models found, or why there are none."""

    models: tuple[ModelInfo, ...] = ()
    error: ChatError | None = None

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    def find(self, name: str | None) -> ModelInfo | None:
        return next((model for model in self.models if model.name == name), None)


class Catalogue:
    """Asks the server for its models, not more often than needed.

    Args:
        mode: `once` keeps the first list that is not empty, `reload` asks again whenever a page wants to know.
        seconds: how long an answer is taken for fresh; many open pages then make one call.
    """

    def __init__(self, client: ChatClient, mode: ListMode, seconds: float = 1.0) -> None:
        self._client, self._mode, self._seconds = client, mode, seconds
        self._list = ModelList()
        self._asked: float | None = None

    async def get(self) -> ModelList:
        """The current list; where the server cannot be asked, an empty one with the reason."""
        fresh = self._asked is not None and time.monotonic() - self._asked < self._seconds
        if fresh or (self._mode == "once" and self._list.models):
            return self._list
        try:
            self._list = ModelList(tuple(await self._client.models()))
        except ChatError as error:
            self._list = ModelList(error=error)
        self._asked = time.monotonic()
        return self._list
