"""Requests, the events of an answer, and descriptions of a model and an engine: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llava.messages import Message, RoutingRequest
from llava.serve.protocol.errors import ErrorKind


class GuideKind(Enum):
    """The language a guide is written in, by vLLM's names."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Guide:
    """A constraint on the whole text of an answer (guided decoding).

    kind: the language of `text`: a JSON schema; a regular expression; a JSON list of texts, of which the answer is one; a grammar in the
    notation of Lark or GBNF. param: the field that asked for it, for errors.
    """

    kind: GuideKind
    text: str
    param: str = field(compare=False)


@dataclass(frozen=True)
class Sampling:
    """How the answer's tokens are sampled.

    temperature: 0 is greedy. top_p: probability mass to sample from. max_new_tokens: at most; the context may end sooner.
    min_new_tokens: neither the model's end token nor one of `stop_token_ids` before this many tokens.
    seed: makes sampling reproducible, whatever else is in the batch. stop: texts that end the answer, themselves left out; the template's
    own are added. logprobs: `None`, or how many alternatives per token to report (0: the chosen token alone); always the model's own, at
    temperature 1, before anything below is applied.
    top_k: sample from this many of the likeliest tokens; 0 from all. min_p: only from those whose probability is at least this fraction of
    the likeliest's. repetition_penalty: divides the positive logits of tokens in the prompt's text and in the answer, and multiplies the
    negative ones; 1 is off. presence_penalty: subtracted from the logits of tokens in the answer; frequency_penalty: once per occurrence.
    logit_bias: (id, number added to its logit). stop_token_ids: end the answer, to which they belong. ignore_eos: the model's end
    token does not end the answer. guide: a constraint on the answer's text; the answer ends when nothing can follow it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    guide: Guide | None = None

    @property
    def penalises(self) -> bool:
        """Whether tokens written so far change the logits of the next."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class EngineImage:
    """What an engine keeps of an image in place of its pixels, which take a hundred times as much memory.

    size: (width, height) of the image in pixels. content: what the engine answers from. num_bytes: size of the content. seconds: that
    preparing it took.
    """

    size: tuple[int, int]
    content: Any
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate.

    request_id: names it in logs and errors. messages: turns as `llava.messages.normalise_turns` takes them; or
    `prompt`: a finished prompt with one `<image>` per image (LLaVA's protocol); exactly one of the two. images: from `prepare_image` of
    the same engine.
    """

    request_id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    images: tuple[EngineImage, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingRequest = field(default_factory=RoutingRequest)


@dataclass(frozen=True)
class ImageReport:
    """What one image costs, and why, as plain numbers.

    granularity: tokens per view chosen. visual_tokens: spent on it; full_visual_tokens: what the finest would have cost.
    tokens_per_level: cost at each granularity. logits, probabilities: the router's, coarse to fine; empty where it did not choose.
    cached: whether its features were cached; `None` where that is not reported.
    grid: where its tokens lie on the image, from `llava.visualize.grid_of`, for pages that draw
    them; `None` where that is unknown.
    """

    granularity: int
    visual_tokens: int
    full_visual_tokens: int
    tokens_per_level: dict[int, int]
    logits: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    cached: bool | None = None
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class Started:
    """The prompt was prefilled; the first token follows. milliseconds: queue, views, vision, router, splice, prefill, their sum `ttft`."""

    prompt_tokens: int
    images: tuple[ImageReport, ...]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class TokenScore:
    """One token with its log probability, and the likeliest alternatives as (text, log probability).

    Texts are as they stand in the answer, a leading space included. A token may be a part of a character: such bytes are written as
    Python's `surrogateescape` does, and `token_bytes` gives them back.
    """

    text: str
    log_probability: float
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def data(self) -> bytes:
        """The token's bytes."""
        return token_bytes(self.text)


def token_bytes(text: str) -> bytes:
    """The bytes that a token's text stands for."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # another server's text, with a lone surrogate that stands for no byte
        return text.encode("utf-8", "replace")


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text; `scores` only where log probabilities were requested. Either may be empty."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end.

    finish_reason: `stop` or `length`. completion_tokens: new tokens. milliseconds: those of `Started`, `decode` and `total`.
    visual_tokens: of all images together, where their sum is known and nothing of each.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    images: tuple[ImageReport, ...]
    milliseconds: dict[str, float]
    visual_tokens: int = 0


Event = Started | Piece | Finished


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model would read it.

    ids: of its text, with one `IMAGE_TOKEN_INDEX` per image. texts: of each id. visual_tokens: of each image, the fewest and the most that
    may replace its id; equal where the request leaves the router no choice.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    visual_tokens: tuple[tuple[int, int], ...] = ()

    @property
    def most_positions(self) -> int:
        """The most positions that it may take."""
        return len(self.ids) - len(self.visual_tokens) + sum(most for _, most in self.visual_tokens)


@dataclass(frozen=True)
class ModelCard:
    """A served model.

    granularities: tokens per view, coarse to fine; empty where the backend has none to choose from. description: for its users.
    """

    name: str
    context_length: int
    granularities: tuple[int, ...]
    has_router: bool
    takes_images: bool
    max_images: int
    description: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """An engine's counts: requests waiting and running, entries, bytes and hits of the feature cache.

    failed: why the engine has closed itself for good, if it has; only a new process can work again.
    """

    waiting: int
    running: int
    cache_entries: int = 0
    cache_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    failed: ErrorKind | None = None
