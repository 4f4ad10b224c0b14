"""What the parts of the services say to one another: requests, events, errors and limits.

Plain frozen values. Nothing here computes, loads or opens a connection; an engine takes a `GenerationRequest` and gives events, and the
HTTP side turns bodies into the one and the other into bodies.

One request's life:

    body -> GenerationRequest -> engine.submit() -> Started, Piece, Piece ..., Finished -> body
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from PIL import Image

from llava.messages import Message, RoutingRequest

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
WORKER_PATH = "/worker_generate_stream"
STATUS_PATH = "/worker_get_status"
LLAVA_PATHS = frozenset((WORKER_PATH, STATUS_PATH))
"""Where LLaVA's own protocol is spoken, and errors have its form."""


@dataclass(frozen=True)
class Fault:
    """How one kind of error looks from outside.

    status: HTTP status. type: OpenAI's error type. text: what a client reads where nothing more helpful may be said. code: LLaVA's
    `error_code`, never 0. retry_after: seconds after which trying again makes sense, or `None`.
    """

    status: int
    type: str
    text: str
    code: int
    retry_after: int | None = None


class ErrorKind(Enum):
    """Everything that can go wrong with a request, by OpenAI's error code."""

    INVALID_REQUEST = "invalid_request"
    INVALID_IMAGE = "invalid_image"
    CONTEXT_LENGTH = "context_length_exceeded"
    UNAUTHORIZED = "invalid_api_key"
    FORBIDDEN = "forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    TOO_LARGE = "request_too_large"
    ENCODED = "unsupported_encoding"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    DRAINING = "shutting_down"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "non_finite_logits"
    BACKEND_UNREACHABLE = "backend_unreachable"
    BACKEND_FAILED = "backend_failed"
    CANCELLED = "cancelled"
    INTERNAL = "internal_error"

    @property
    def fault(self) -> Fault:
        return FAULTS[self]


_CLIENT, _SERVER = "invalid_request_error", "server_error"

FAULTS: dict[ErrorKind, Fault] = {
    ErrorKind.INVALID_REQUEST: Fault(400, _CLIENT, "The request cannot be read or asks for something that does not exist here.", 10),
    ErrorKind.INVALID_IMAGE: Fault(
        400,
        _CLIENT,
        "A picture cannot be used: send a whole PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF file as a data URL, at most 20 MB and 64 "
        "megapixels, its sides at most 200-fold apart.",
        11,
    ),
    ErrorKind.CONTEXT_LENGTH: Fault(400, _CLIENT, "The prompt is longer than the model's context.", 12),
    ErrorKind.UNAUTHORIZED: Fault(401, "authentication_error", "The API key is missing or wrong.", 13),
    ErrorKind.FORBIDDEN: Fault(403, "permission_error", "This address may not do that here.", 14),
    ErrorKind.MODEL_NOT_FOUND: Fault(404, _CLIENT, "There is no model of that name here.", 15),
    ErrorKind.NOT_FOUND: Fault(404, _CLIENT, "There is nothing at this address.", 16),
    ErrorKind.TOO_LARGE: Fault(413, _CLIENT, "The request is too large.", 17),
    ErrorKind.ENCODED: Fault(415, _CLIENT, "The body is compressed (Content-Encoding); send it as it is.", 19),
    ErrorKind.TIMEOUT: Fault(408, _CLIENT, "The request took too long to arrive.", 18),
    ErrorKind.OVERLOADED: Fault(503, _SERVER, "All places are taken; try again.", 20, retry_after=1),
    ErrorKind.DRAINING: Fault(503, _SERVER, "The server is shutting down; try again.", 21, retry_after=5),
    ErrorKind.OUT_OF_MEMORY: Fault(503, _SERVER, "The answer did not fit into memory; try again or choose a coarser granularity.", 22, 1),
    ErrorKind.NOT_FINITE: Fault(500, _SERVER, "The model's numbers broke down on this request.", 23),
    ErrorKind.BACKEND_UNREACHABLE: Fault(503, _SERVER, "No server that has this model can be reached.", 24, retry_after=1),
    ErrorKind.BACKEND_FAILED: Fault(502, _SERVER, "The server that has this model broke off or answered nonsense.", 25),
    ErrorKind.CANCELLED: Fault(499, _CLIENT, "The request was cancelled.", 26),
    ErrorKind.INTERNAL: Fault(500, _SERVER, "Something failed inside; the log has the details under this request id.", 27),
}


class ServeError(Exception):
    """A typed failure of one request.

    Args:
        kind: which.
        detail: a sentence that replaces the kind's own. It goes to clients: numbers, names of fields and names of models only, never
            the text of another library's exception.
        param: the field that is to blame, as a path such as `messages[0].content`.
        least: the smallest value of that field that would do, where there is one.
    """

    def __init__(self, kind: ErrorKind, detail: str | None = None, param: str | None = None, least: int | None = None) -> None:
        self.kind, self.param, self.least = kind, param, least
        self.detail = detail or kind.fault.text
        super().__init__(self.detail)


class GuideKind(Enum):
    """In which words a guide is written, by vLLM's names."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Guide:
    """What the whole text of an answer has to be.

    kind: how `text` is to be read: a JSON schema that the answer's JSON follows; a regular expression; a JSON list of texts, one of which
    it is; a grammar in the notation of Lark or of GBNF. param: the field that asked for it, for errors.
    """

    kind: GuideKind
    text: str
    param: str = field(compare=False)


@dataclass(frozen=True)
class Sampling:
    """How the answer's tokens are drawn.

    temperature: 0 is greedy. top_p: share of the probability to draw from. max_new_tokens: at most so many; the context may end sooner.
    min_new_tokens: no end is taken before so many, neither the model's own nor one of `stop_token_ids`.
    seed: makes draws repeatable, whatever else is in the batch. stop: texts that end the answer, themselves left out; the template's own
    are added. logprobs: `None`, or how many alternatives per token to report (0: the chosen token alone); always the model's own, at
    temperature 1, before anything below is applied.
    top_k: draw from so many of the likeliest tokens; 0 from all. min_p: only from those whose probability is at least this share of the
    likeliest's. repetition_penalty: divides the positive logits of tokens in the prompt's text and in the answer, and multiplies the
    negative ones; 1 is off. presence_penalty: taken from the logits of tokens in the answer; frequency_penalty: as often as they are there.
    logit_bias: (id, number added to its logit). stop_token_ids: end the answer, to which they belong. ignore_eos: the model's own end
    does not end the answer. guide: what the answer's text has to be; the answer ends when nothing can be added to it.
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
        """Whether what was written changes what comes next."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class EngineImage:
    """What an engine keeps of an image once its pixels are gone, which take a hundred times as much.

    size: (width, height) of the image in pixels. content: whatever that engine answers from. num_bytes: that the content takes.
    seconds: that it took to make it.
    """

    size: tuple[int, int]
    content: Any
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to make.

    request_id: names it in logs and errors. messages: turns as `llava.messages.normalise_turns` takes them; or
    `prompt`: a finished prompt with one `<image>` per image (LLaVA's protocol); exactly one of the two. images: made by `prepare_image` of
    the engine that is asked.
    """

    request_id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    images: tuple[EngineImage, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingRequest = field(default_factory=RoutingRequest)


@dataclass(frozen=True)
class ImageReport:
    """How one picture's cost came about, as plain numbers.

    granularity: tokens per view chosen. visual_tokens: spent on it; full_visual_tokens: what the finest would have cost.
    tokens_per_level: cost at each granularity. logits, probabilities: the router's, coarse to fine; empty where it was not asked.
    cached: whether its features were there already; `None` where that is not told.
    grid: where its tokens lie on the picture, from `llava.visualize.grid_of`, for pages that draw
    them; `None` where nobody knows.
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
    """The prompt was read; the first token follows. milliseconds: queue, views, vision, router, splice, prefill, and `ttft`, their sum."""

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
    except UnicodeEncodeError:  # another server's text, with half a character that is no byte
        return text.encode("utf-8", "replace")


@dataclass(frozen=True)
class Piece:
    """The next stretch of the answer's text; `scores` only where log probabilities were asked for. Either may be empty."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end. finish_reason: `stop` or `length`. completion_tokens: new tokens. milliseconds: those of `Started`, `decode` and `total`."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    images: tuple[ImageReport, ...]
    milliseconds: dict[str, float]


Event = Started | Piece | Finished


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model would read it, not read yet.

    ids: of its text, with one `IMAGE_TOKEN_INDEX` per image. texts: of each id. visual_tokens: of each image, the fewest and the most that
    it may take in place of its id; both are the same where the request leaves the router no choice.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    visual_tokens: tuple[tuple[int, int], ...] = ()

    @property
    def most_positions(self) -> int:
        """Positions that it may take."""
        return len(self.ids) - len(self.visual_tokens) + sum(most for _, most in self.visual_tokens)


@dataclass(frozen=True)
class ModelCard:
    """What a served model is.

    granularities: tokens per view, coarse to fine; empty where the backend has none to choose from. description: for people who ask it.
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
    """A look inside: requests waiting for a place, requests being answered, feature cache entries, bytes and hits.

    failed: why the engine has closed by itself and for good, if it has; only another process may work again.
    """

    waiting: int
    running: int
    cache_entries: int = 0
    cache_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    failed: ErrorKind | None = None


class Generation(Protocol):
    """A running answer: iterate for `Started`, `Piece`s and `Finished`; a `ServeError` may be raised in between. Iterate once.

    Closing the iterator or calling `cancel` frees what is left of the work; both may be done at any time, more than once.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None: ...


class Engine(Protocol):
    """Whatever makes answers: the embedded engine, or a bridge to another server."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be worked on."""
        ...

    def prepare_image(self, image: Image.Image) -> EngineImage:
        """Take from an RGB image what answering needs, so that its pixels can go; called in any thread.

        Raises:
            ServeError: no image can be used, or not this one.
        """
        ...

    def submit(self, request: GenerationRequest) -> Generation:
        """Take a request; called within a running event loop, returns at once.

        Raises:
            ServeError: `OVERLOADED` or `DRAINING`; what is wrong with the request itself is raised by the iterator.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        """The tokens of a request's prompt, however long it is; nothing is generated.

        Args:
            special: whether they begin with the one that begins every text.

        Raises:
            ServeError: the request cannot work.
        """
        ...

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, special tokens included.

        Raises:
            ServeError: an id that is not in the vocabulary.
        """
        ...

    async def drain(self) -> None:
        """Take no more requests and wait until the running ones are done."""
        ...

    async def close(self) -> None:
        """Stop; what is still running is cancelled."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take. Everything beyond is refused before it costs anything.

    max_body_bytes: of a request. max_images, max_messages, max_prompt_characters, max_new_tokens, max_stop, max_n: of one request.
    max_stop_characters: of one stop text. max_logprobs: alternatives told per token. max_guide_characters: of a schema, a regular
    expression, a grammar, or choices.
    max_queue: requests that wait beside those being answered; the next gets 503.
    body_seconds: that a body may bring nothing; body_rate: bytes per second that it has to keep up beyond, see `bodies.Allowance`.
    client_uploads: bodies that one client may be sending at once; client_bodies: what they take together, in bodies of the largest size.
    send_seconds: that a client may take to read one piece of a stream before it is taken for gone.
    allow_remote_images: fetch http(s) pictures; off by default. allowed_hosts: only from these, when given.
    """

    max_body_bytes: int = 64_000_000
    max_images: int = 8
    max_messages: int = 256
    max_prompt_characters: int = 200_000
    max_new_tokens: int = 4096
    max_stop: int = 8
    max_stop_characters: int = 256
    max_n: int = 8
    max_logprobs: int = 20
    max_guide_characters: int = 32_768
    max_queue: int = 64
    body_seconds: float = 20.0
    body_rate: float = 20_000.0
    client_uploads: int = 64
    client_bodies: int = 3
    send_seconds: float = 60.0
    allow_remote_images: bool = False
    allowed_hosts: tuple[str, ...] = ()
