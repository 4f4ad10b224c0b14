"""The answer of a vLLM as an engine's events: from its token ids, so that text, stop texts and scores come about as in our own engine."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from llava.serve.backend.openai_stream import chunks_of, is_number
from llava.serve.engine.sampling import Picked
from llava.serve.engine.scores import ScoreStream
from llava.serve.http.client import BrokenResponse, Reply
from llava.serve.protocol import Event, Finished, ImageReport, Piece, Started
from llava.text_stream import TextStream

_TOKEN = re.compile(r"token_id:(\d{1,10})", re.ASCII)
"""A token where `return_tokens_as_token_ids` is set."""
_MOST_TOKEN = 2**31 - 1
"""Largest id that a tokenizer can be asked about."""


@dataclass
class AnswerStream:
    """One answer, read chunk by chunk.

    text, scores: of the answer. is_prompt: whether the ids of the server's prompt are ours. reports: of the images.
    begun: when the request came, in monotonic seconds. milliseconds: of the parts up to the server's call, made at `asked`.
    """

    text: TextStream
    scores: ScoreStream
    is_prompt: Callable[[Sequence[object]], bool]
    reports: tuple[ImageReport, ...]
    begun: float
    milliseconds: dict[str, float]
    asked: float = field(default_factory=monotonic)
    _length: int = field(default=0, init=False)
    _first: float = field(default=0.0, init=False)
    _reason: str | None = field(default=None, init=False)

    async def events(self, reply: Reply) -> AsyncIterator[Event]:
        """
        Raises:
            BrokenResponse: the stream is not one of tokens, ends before the answer does, or answers another prompt.
            ServeError: the server reports an error.
        """
        async for chunk in chunks_of(reply):
            for event in self._take(chunk):
                yield event
            if self.text.stopped:  # the rest is of no interest; leaving the stream ends it at the server
                break
        if not self._first or (self._reason is None and not self.text.stopped):
            raise BrokenResponse("the stream ended before the answer did")
        for event in self._end():
            yield event

    def _take(self, chunk: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        if not self._first:
            events.append(self._start(chunk.get("prompt_token_ids")))
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise BrokenResponse("a chunk of the stream has no list of choices")
        for choice in choices:
            tokens = choice.get("token_ids") or []
            for token, picked in zip(tokens, _picked(tokens, choice.get("logprobs")), strict=True):
                if self.text.stopped:
                    return events
                text = self.text.add(token)
                self.scores.add(token, picked)
                events += _piece(text, self.scores.sent(text))
            reason = choice.get("finish_reason")
            if reason is not None:
                if reason not in ("stop", "length"):
                    raise BrokenResponse(f"the answer ended with {str(reason)[:40]!r}")
                self._reason = reason
        return events

    def _start(self, ids: Any) -> Started:
        if not _are_tokens(ids):
            raise BrokenResponse("the stream does not begin with the prompt's token ids; is the server a vLLM?")
        if not self.is_prompt(ids):
            raise BrokenResponse(f"it read the prompt as {len(ids)} other tokens; does it serve the same model, with the plug-in?")
        self._length, self._first = len(ids), monotonic()
        parts = {**self.milliseconds, "prefill": 1000 * (self._first - self.asked)}
        ttft = 1000 * (self._first - self.begun)
        self.milliseconds = {"queue": ttft - sum(parts.values()), **parts, "ttft": ttft}
        return Started(self._length, self.reports, dict(self.milliseconds))

    def _end(self) -> list[Event]:
        now, rest = monotonic(), self.text.end()
        milliseconds = {**self.milliseconds, "decode": 1000 * (now - self._first), "total": 1000 * (now - self.begun)}
        reason = "stop" if self.text.stopped else self._reason or "stop"
        end = Finished(reason, self._length, len(self.text.ids), self.reports, milliseconds)
        return [*_piece(rest, self.scores.end(rest, self.text.stopped)), end]


def _piece(text: str, scores: tuple[Any, ...]) -> list[Event]:
    return [Piece(text, scores)] if text or scores else []


def _are_tokens(ids: object) -> bool:
    return isinstance(ids, list) and all(type(token) is int and 0 <= token <= _MOST_TOKEN for token in ids)


def _picked(tokens: Any, logprobs: object) -> list[Picked]:
    """The tokens of a chunk with their log probabilities, where it has any."""
    if not _are_tokens(tokens):
        raise BrokenResponse("a chunk's token ids cannot be read")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        return [Picked(token) for token in tokens]
    if not isinstance(content, list) or len(content) != len(tokens):
        raise BrokenResponse("a chunk's log probabilities are not those of its tokens")
    scored = [_scored(each) for each in content]
    others = [_scored_list(each.get("top_logprobs") or []) for each in content]
    return [Picked(token, score, tuple(alternatives)) for token, (_, score), alternatives in zip(tokens, scored, others, strict=True)]


def _scored_list(tokens: object) -> list[tuple[int, float]]:
    if not isinstance(tokens, list):
        raise BrokenResponse("a token's likeliest alternatives cannot be read")
    return [_scored(token) for token in tokens]


def _scored(token: Any) -> tuple[int, float]:
    found = _TOKEN.fullmatch(str(token.get("token"))) if isinstance(token, dict) else None
    if found is None or int(found[1]) > _MOST_TOKEN or not is_number(token.get("logprob")):
        raise BrokenResponse("a token's log probability cannot be read")
    return int(found[1]), float(token["logprob"])
