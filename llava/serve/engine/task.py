"""A request inside the engine, and what each stage leaves for the next one.

    request ─ prepare ─> Prepared ─ encode and route ─> Encoded, Unread ─ prefill ─> a slot of the running batch
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.model.compose import ImageInput
from llava.model.splice import PromptRow, SplicedRow
from llava.serve.engine.guides import AnswerGuide
from llava.serve.engine.outbox import EngineGeneration
from llava.serve.engine.scores import ScoreStream
from llava.serve.protocol import GenerationRequest, ImageReport
from llava.text_stream import TextStream


@dataclass(frozen=True)
class Prepared:
    """A request that passed every check which needs no computation by the model.

    keys: of its images, in the cache of features. images: encoded where that cache had their features.
    """

    prompt: PromptRow
    keys: tuple[str, ...]
    images: tuple[ImageInput, ...]


@dataclass(frozen=True)
class Encoded:
    """What is known of a prompt and its answer once the pictures are in it.

    length: positions of the prompt. beginnings: key and length of what another question about the same pictures may share, longest first.
    """

    length: int
    max_new_tokens: int
    reports: tuple[ImageReport, ...]
    beginnings: tuple[tuple[str, int], ...]
    milliseconds: dict[str, float]

    @property
    def positions(self) -> int:
        """Positions it may come to need."""
        return self.length + self.max_new_tokens


@dataclass(frozen=True)
class Unread:
    """What the prefill reads, held until then. known: keys and values of the longest beginning that was read before; row: what follows."""

    row: SplicedRow
    known: tuple[Tensor, ...]

    @property
    def num_known(self) -> int:
        """Positions that need not be read again."""
        return self.known[0].shape[1] if self.known else 0


@dataclass(eq=False)
class Task:
    """A request and how far it has come.

    stream, scores, seed: of its answer, and guide, where it has to be something. text_ids: (L,) of its prompt, without placeholders.
    slot: its row of the running batch, below 0 outside of it.
    """

    request: GenerationRequest
    generation: EngineGeneration
    submitted: float
    stream: TextStream
    scores: ScoreStream
    seed: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    first_token: float = 0.0
    text_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    guide: AnswerGuide | None = None
    slot: int = -1
    _prepared: Prepared | None = field(default=None, init=False)
    _encoded: Encoded | None = field(default=None, init=False)
    _unread: Unread | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def begun(self) -> bool:
        """Whether its prompt has been read, and the first token told. One that has stepped back since is read again."""
        return self.first_token > 0

    @property
    def length(self) -> int:
        """Positions of its prompt and of what is written of its answer."""
        return self.encoded.length + len(self.stream.ids)

    @property
    def prepared(self) -> Prepared:
        assert self._prepared is not None, "the request is not between preparation and encoding"
        return self._prepared

    @property
    def encoded(self) -> Encoded:
        assert self._encoded is not None, "the request was not encoded yet"
        return self._encoded

    @property
    def unread(self) -> Unread:
        assert self._unread is not None, "the request is not between encoding and prefill"
        return self._unread

    def was_prepared(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.text_ids = prepared.prompt.ids[~prepared.prompt.is_image]

    def was_encoded(self, encoded: Encoded, unread: Unread) -> None:
        self._encoded, self._unread, self._prepared = encoded, unread, None
        if not self.begun:
            self.milliseconds |= encoded.milliseconds

    def was_read(self, at: float, took: float) -> None:
        """Its first token is known, or the next one after it was read again. at: the time, took: seconds of the prefill."""
        self._unread = None
        if self.begun:
            return
        self.first_token = at
        parts, ttft = {**self.milliseconds, "prefill": 1000 * took}, 1000 * (at - self.submitted)
        self.milliseconds = {"queue": ttft - sum(parts.values()), **parts, "ttft": ttft}

    def all_milliseconds(self, now: float) -> dict[str, float]:
        """Of a whole answer that ends now."""
        return {**self.milliseconds, "decode": 1000 * (now - self.first_token), "total": 1000 * (now - self.submitted)}
