"""A request inside the engine, and what each stage hands to the next.

    request ─ prepare ─> Prepared ─ encode and route ─> Encoded, PendingPrefill ─ prefill ─> a slot of the running batch
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
    """A request that has passed every check that needs no computation by the model.

    keys: of its images, in the feature cache. images: already encoded where that cache had their features.
    """

    prompt: PromptRow
    keys: tuple[str, ...]
    images: tuple[ImageInput, ...]


@dataclass(frozen=True)
class Encoded:
    """What is known of a prompt and its answer once its images are encoded and their granularities chosen.

    length: positions of the prompt. prefixes: cache key and length of each prefix that another question about the same images may
        share, longest first.
    """

    length: int
    max_new_tokens: int
    reports: tuple[ImageReport, ...]
    prefixes: tuple[tuple[str, int], ...]
    milliseconds: dict[str, float]

    @property
    def positions(self) -> int:
        """Positions that the prompt and the longest possible answer take."""
        return self.length + self.max_new_tokens


@dataclass(frozen=True)
class PendingPrefill:
    """The input of a prefill. prefix: cached keys and values of the prompt's longest known prefix, if any; row: what follows it."""

    row: SplicedRow
    prefix: tuple[Tensor, ...]

    @property
    def prefix_length(self) -> int:
        """Positions that need not be computed again."""
        return self.prefix[0].shape[1] if self.prefix else 0


@dataclass(eq=False)
class Task:
    """A request and its progress.

    stream, scores, seed: of its answer. guide: constrains the answer, where the request asks for that. text_ids: (L,) of its prompt,
        without placeholders. slot: its row in the running batch; -1 while it is not in it.
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
    _pending: PendingPrefill | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def begun(self) -> bool:
        """Whether its prompt has been prefilled and its first token sent; a preempted request stays begun and is prefilled again."""
        return self.first_token > 0

    @property
    def length(self) -> int:
        """Positions of its prompt and of its answer so far."""
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
    def pending(self) -> PendingPrefill:
        assert self._pending is not None, "the request is not between encoding and prefill"
        return self._pending

    def was_prepared(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.text_ids = prepared.prompt.ids[~prepared.prompt.is_image]

    def was_encoded(self, encoded: Encoded, pending: PendingPrefill) -> None:
        self._encoded, self._pending, self._prepared = encoded, pending, None
        if not self.begun:
            self.milliseconds |= encoded.milliseconds

    def was_prefilled(self, at: float, took: float) -> None:
        """After a prefill, which gave the first token, or the next one of a preempted request. at: the time; took: its seconds."""
        self._pending = None
        if self.begun:
            return
        self.first_token = at
        parts, ttft = {**self.milliseconds, "prefill": 1000 * took}, 1000 * (at - self.submitted)
        self.milliseconds = {"queue": ttft - sum(parts.values()), **parts, "ttft": ttft}

    def all_milliseconds(self, now: float) -> dict[str, float]:
        """The timings of an answer that ends now."""
        return {**self.milliseconds, "decode": 1000 * (now - self.first_token), "total": 1000 * (now - self.submitted)}
