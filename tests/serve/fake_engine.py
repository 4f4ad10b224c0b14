"""An engine without a model: it says what it is told to, as slowly as it is told to, and fails where it is told to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from llava.serve.protocol import (
    EngineImage,
    EngineStats,
    ErrorKind,
    Event,
    Finished,
    GenerationRequest,
    ImageReport,
    ModelCard,
    Piece,
    PromptTokens,
    ServeError,
    Started,
    TokenScore,
)

CARD = ModelCard(
    name="fake", context_length=4096, granularities=(36, 144, 576), has_router=True, takes_images=True, max_images=8,
    description="It repeats what it is asked.",
)


def echo_of(request: GenerationRequest) -> tuple[str, ...]:
    """The last text of a request, word by word, and the sizes of its pictures: an answer that tells requests apart."""
    text = request.prompt if request.prompt is not None else request.messages[-1].text
    words = [f"{word} " for word in text.split()]
    return (*words, *(f"[{image.size[0]}x{image.size[1]}]" for image in request.images))


def report_of(request: GenerationRequest) -> tuple[ImageReport, ...]:
    """One report per picture, at the granularity that was asked for, else the middle one."""
    chosen = request.routing.granularity if isinstance(request.routing.granularity, int) else 144
    per_level = {36: 48, 144: 180, 576: 600}
    report = ImageReport(chosen, per_level.get(chosen, 600), 600, per_level, (0.0, 1.0, 0.5), (0.2, 0.5, 0.3))
    return (report,) * len(request.images)


@dataclass
class FakeEngine:
    """Answers like `llava.serve.protocol.Engine` does.

    pieces: from a request to the answer's pieces. start_delay, piece_delay: seconds before `Started` and before each piece.
    failure: raised before `Started` where `fail_after` is `None`, else after so many pieces. refuse: raised by `submit`.
    rows, queue: places; a request beyond both is refused as overloaded.
    requests: those submitted. cancelled: ids of those that were cancelled before their end. served: ids of those that ended.
    """

    pieces: Callable[[GenerationRequest], tuple[str, ...]] = echo_of
    start_delay: float = 0.0
    piece_delay: float = 0.0
    failure: BaseException | None = None
    fail_after: int | None = None
    fails: Callable[[GenerationRequest], bool] = lambda request: True
    refuse: ServeError | None = None
    rows: int = 1000
    queue: int = 0
    card: ModelCard = CARD
    ready: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    active: int = 0
    started: bool = False
    drained: bool = False
    closed: bool = False

    def start(self) -> None:
        self.started = True

    def prepare_image(self, image: Image.Image) -> EngineImage:
        return EngineImage(image.size, image.tobytes(), image.width * image.height)

    def submit(self, request: GenerationRequest) -> FakeGeneration:
        if self.refuse is not None:
            raise self.refuse
        if self.drained:
            raise ServeError(ErrorKind.DRAINING)
        if self.active >= self.rows + self.queue:
            raise ServeError(ErrorKind.OVERLOADED)
        self.requests.append(request)
        self.active += 1
        return FakeGeneration(self, request)

    def stats(self) -> EngineStats:
        running = min(self.active, self.rows)
        return EngineStats(self.active - running, running, 3, 1000, 5, 7)

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        """A token per letter of the prompt or of the last turn, 1 in front, -200 for an image."""
        text = request.prompt if request.prompt is not None else request.messages[-1].text
        letters = [letter for part in re.split("(<image>)", text) for letter in ([part] if part == "<image>" else part)]
        ids = [*([1] if special else []), *(-200 if letter == "<image>" else ord(letter) for letter in letters)]
        visual = [(min(report.tokens_per_level.values()), report.full_visual_tokens) for report in report_of(request)]
        return PromptTokens(tuple(ids), (*(["<s>"] if special else []), *letters), tuple(visual))

    async def detokenize(self, ids: Sequence[int]) -> str:
        if any(not 0 <= number < 55296 for number in ids):
            raise ServeError(ErrorKind.INVALID_REQUEST, "There is no such token.", "tokens[0]")
        return "".join(map(chr, ids))

    async def drain(self) -> None:
        self.drained = True
        while self.active:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closed = True


class FakeGeneration:
    """One answer of a `FakeEngine`."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest) -> None:
        self.engine, self.request = engine, request
        self.ended = False
        self.stopped = asyncio.Event()

    def cancel(self) -> None:
        self._end(self.engine.cancelled)

    def _end(self, book: list[str]) -> None:
        if not self.ended:
            self.ended = True
            self.engine.active -= 1
            book.append(self.request.request_id)
            self.stopped.set()

    async def _pause(self, seconds: float) -> None:
        if seconds:
            try:
                await asyncio.wait_for(self.stopped.wait(), seconds)
            except asyncio.TimeoutError:
                return
        if self.ended:
            raise ServeError(ErrorKind.CANCELLED)

    def _fail_if_told(self, count: int | None) -> None:
        if self.engine.failure is not None and self.engine.fail_after == count and self.engine.fails(self.request):
            self._end(self.engine.served)
            raise self.engine.failure

    async def __aiter__(self) -> AsyncIterator[Event]:
        engine, request = self.engine, self.request
        try:
            await self._pause(engine.start_delay)
            self._fail_if_told(None)
            reports = report_of(request)
            prompt = 10 + sum(report.visual_tokens for report in reports)
            yield Started(prompt, reports, {"queue": 0.5, "vision": 2.0, "prefill": 3.0, "ttft": 5.5})
            texts = engine.pieces(request)
            shown = texts[: request.sampling.max_new_tokens]
            for count, text in enumerate(shown):
                self._fail_if_told(count)
                await self._pause(engine.piece_delay)
                wanted = request.sampling.logprobs
                scores = () if wanted is None else (TokenScore(text, -0.5, (("other", -1.5),) * wanted),)
                yield Piece(text, scores)
            self._fail_if_told(len(shown))
            self._end(engine.served)
            times = {"queue": 0.5, "vision": 2.0, "prefill": 3.0, "ttft": 5.5, "decode": 10.0, "total": 15.5}
            yield Finished("stop" if len(shown) == len(texts) else "length", prompt, len(shown), reports, times)
        finally:
            self._end(engine.cancelled)
