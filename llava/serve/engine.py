"""The embedded engine: many requests, one model, one thread that turns the crank.

    submit() ─> prepare (threads: ids, views) ─> waiting ─> encode and route (batched) ─> ready ─> prefill (batched) ─> running
                                                                                                                          │
    events to the caller's event loop <─────────── one decoding step for all running requests, again and again <──────────┘

Between any two steps requests join and leave. A request's answer does not depend on its neighbours: rows of a batch never see each
other, and each row draws from its own random numbers. When a pass over a batch fails, it is taken over parts of it, so that only the
request that is to blame fails; when memory runs out, parts fit where the whole did not, fewer requests are taken in at a time, and one that
cannot join beside others waits until they are done.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.images import ImageError
from llava.inference import Assistant, end_ids, template_stops
from llava.mm_utils import tokenizer_image_token
from llava.model.llava_arch import EncodedRow, RoutingPlan
from llava.model.routing import RoutingReport
from llava.model.splice import PromptRow, SplicedRow, pad_rows, prompt_rows
from llava.serve.caches import TensorCache, picture_key, prefix_key
from llava.serve.protocol import (
    EngineStats,
    ErrorKind,
    Event,
    Finished,
    GenerationRequest,
    ImageReport,
    ModelCard,
    Piece,
    ServeError,
    Started,
    TokenScore,
)
from llava.serve.sampling import Picked, pick, random_number
from llava.serve.slots import SlotCache
from llava.serve.text_stream import TextStream
from llava.timing import StageTimer
from llava.visualize import grid_of

logger = logging.getLogger(__name__)

_END = None
_PREFILL_POSITIONS = 8192
"""Positions, padding included, that one prefill works on at most, so that running answers do not wait long for it."""
_STEPS_FOR_COMPANY = 2
"""Steps of the running requests that a waiting one may be passed over to be taken in together with others."""
_PADDING_SHARE, _PADDING = 0.15, 32
"""Padding that one prefill may add: this share of its prompts' own positions, and a few."""


class EngineGeneration:
    """One answer on its way from the engine's thread to the caller's event loop; see `protocol.Generation`."""

    def __init__(self, wake_engine: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self._wake_engine = wake_engine
        self._events: asyncio.Queue[Event | ServeError | None] = asyncio.Queue()

    def put(self, event: Event | ServeError | None) -> None:
        """Called in the event loop."""
        self._events.put_nowait(event)

    def cancel(self) -> None:
        self.cancelled = True
        self._wake_engine()

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (event := await self._events.get()) is not _END:
                if isinstance(event, ServeError):
                    raise event
                yield event
        finally:
            self.cancel()


@dataclass(eq=False)
class _Task:
    """A request and how far it has come.

    keys, pictures: of its pictures: features (C, P, D) where the cache had them, else views (C, 3, S, S) and `cached` false. row: its
    encoded prompt. stream, seed: of its answer. picked: its first token. slot: its row of the running batch. beginnings: key and length of
    what another question about the same pictures may share, longest first; known: keys and values of the longest one that was read before.
    ended: it has got its last event.
    """

    request: GenerationRequest
    generation: EngineGeneration
    submitted: float
    stream: TextStream
    seed: int
    prompt: PromptRow | None = None
    keys: list[str] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    cached: list[bool] = field(default_factory=list)
    row: SplicedRow | None = None
    reports: tuple[ImageReport, ...] = ()
    max_new_tokens: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)
    first_token: float | None = None
    beginnings: list[tuple[str, int]] = field(default_factory=list)
    known: tuple[Tensor, ...] = ()
    picked: Picked | None = None
    slot: int = -1
    ended: bool = False

    @property
    def prompt_row(self) -> PromptRow:
        assert self.prompt is not None, "the request was not prepared yet"
        return self.prompt

    @property
    def encoded(self) -> SplicedRow:
        assert self.row is not None, "the request was not encoded yet"
        return self.row

    @property
    def positions(self) -> int:
        """Positions it may come to need."""
        return self.encoded.length + self.max_new_tokens

    @property
    def num_known(self) -> int:
        """Positions that need not be read again."""
        return self.known[0].shape[1] if self.known else 0

    @property
    def num_unread(self) -> int:
        """Positions that its prefill reads."""
        return self.encoded.length - self.num_known


class EmbeddedEngine:
    """Answers requests with a model in this process; see `protocol.Engine`.

    Args:
        assistant: the loaded model.
        name: what clients call it.
        max_batch_rows: requests answered at the same time.
        max_batch_tokens: positions (rows times the longest row) that keys and values are kept for; by default four full contexts.
        max_queue: requests that may wait beside those being answered.
        cache_bytes: encoded pictures that are kept.
        prefix_cache_bytes: keys and values that are kept of prompts up to the end of their pictures, for the next question about them.
        revision: names the weights in the cache's keys.
        max_images: what the model card says.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        *,
        max_batch_rows: int = 16,
        max_batch_tokens: int | None = None,
        max_queue: int = 64,
        cache_bytes: int = 256_000_000,
        prefix_cache_bytes: int = 256_000_000,
        revision: str = "",
        max_images: int = 8,
    ) -> None:
        self.assistant = assistant
        self.model = assistant.model
        config = self.model.config
        self.max_batch_rows = max_batch_rows
        self.max_batch_tokens = max_batch_tokens or 4 * config.context_length
        self.max_queue = max_queue
        self._check()
        self.cache = TensorCache(cache_bytes)
        self.prefixes = TensorCache(prefix_cache_bytes)
        self.revision = f"{name}@{revision or id(self.model)}"
        has_tower = self.model.get_model().vision_tower is not None
        self._card = ModelCard(
            name,
            config.context_length,
            tuple(level.tokens for level in self.model.levels) if has_tower else (),
            self.model.get_model().router is not None,
            has_tower,
            max_images if has_tower else 0,
        )
        self._slots = SlotCache(self.max_batch_rows, self.max_batch_tokens)
        self._rows_allowed = self.max_batch_rows  # falls when memory runs out, and grows back
        self._short_of_memory = False  # the storage is given back as soon as nothing runs
        self._running: list[_Task] = []  # by slot
        self._ready: deque[_Task] = deque()
        self._waiting: deque[_Task] = deque()
        self._passed_over = 0  # steps since the first waiting request came
        self._outstanding = 0  # requests taken and neither finished nor failed
        self._finished = 0
        self._draining = self._closed = False
        self._end_kind = ErrorKind.CANCELLED  # what those are told that are left at the end
        self._changed = threading.Condition(threading.RLock())
        self._tokenizing = threading.Lock()
        self._outbox: list[tuple[EngineGeneration, Event | ServeError | None]] = []
        self._preparers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        config = self.model.config
        attention = config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"The attention implementation is {attention}, but this engine's batches need sdpa or eager; choose one.")
        window = getattr(config, "sliding_window", None)
        if window and window < config.context_length:
            raise ValueError(
                f"This model attends to a window of {window} of its {config.context_length} positions, which this engine's batches cannot "
                "do; serve it with another engine behind llava.serve.sglang_worker."
            )
        if self.max_batch_rows < 1 or self.max_queue < 0:
            raise ValueError(f"max_batch_rows is {self.max_batch_rows} and max_queue {self.max_queue}; expected at least 1 and 0.")
        if self.max_batch_tokens < 2:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}; expected room for a prompt and an answer.")

    # ---- the caller's side ---------------------------------------------------------------------------------------------------

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._draining and not self._closed

    def stats(self) -> EngineStats:
        cache = self.cache
        running = len(self._running)
        waiting = max(0, self._outstanding - running)
        return EngineStats(waiting, running, self._finished, len(cache), cache.bytes, cache.hits, cache.misses)

    def submit(self, request: GenerationRequest) -> EngineGeneration:
        with self._changed:
            if self._draining or self._closed:
                raise ServeError(ErrorKind.DRAINING if self._end_kind is ErrorKind.CANCELLED else self._end_kind)
            if self._outstanding >= self.max_batch_rows + self.max_queue:
                raise ServeError(ErrorKind.OVERLOADED)
            self._outstanding += 1
        generation = EngineGeneration(self._wake)
        template = self.model.config.conv_version
        stops = (*template_stops(template), *request.sampling.stop)
        seed = random.getrandbits(63) if request.sampling.seed is None else request.sampling.seed
        task = _Task(request, generation, monotonic(), TextStream(self.assistant.tokenizer, stops), seed)
        self._preparers.submit(self._prepare, task)
        return generation

    async def drain(self) -> None:
        with self._changed:
            self._draining = True
        while self._outstanding > 0:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify()
        # Off the event loop: a picture that is being decoded is waited for. What is prepared from now on is told that it is too late.
        await asyncio.to_thread(self._preparers.shutdown)
        await asyncio.to_thread(self._thread.join)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- prepare: in threads of their own ------------------------------------------------------------------------------------

    def _prepare(self, task: _Task) -> None:
        """Ids and views of one request, and every check that needs no computation by the model."""
        start = monotonic()
        failure: Exception | None = ServeError(self._end_kind)
        if not task.generation.cancelled and not self._closed:
            try:
                self._prepare_inputs(task)
                failure = None
            except Exception as error:
                failure = error
        task.milliseconds["views"] = 1000 * (monotonic() - start)
        with self._changed:
            if failure is None and self._closed:
                failure = ServeError(self._end_kind)
            if failure is None:
                self._waiting.append(task)
                self._changed.notify()
        if failure is not None:
            self._let_go(task)
            _post(task.generation.loop, [(task.generation, self._failure(task, failure))])

    def _prepare_inputs(self, task: _Task) -> None:
        request = task.request
        if request.images and not self._card.takes_images:
            raise ServeError(ErrorKind.INVALID_REQUEST, "This model takes no pictures.")
        try:
            task.prompt = prompt_rows(self._ids(request)[None].to(self.model.device), None, None)[0]
        except ValueError as error:  # the sentence is this package's own and holds counts and roles only
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
        task.keys = [picture_key(image, self.revision) for image in request.images]
        for key, image in zip(task.keys, request.images, strict=True):
            kept = self.cache.get(key) if key in self.cache else None
            task.cached.append(kept is not None)
            task.pictures.append(self._views(image) if kept is None else kept[0])
        try:
            plan = self._plan([task], [len(picture) for picture in task.pictures])
        except ValueError as error:  # as above: a granularity, a budget or a count of placeholders
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
        cheapest = sum(min(costs[level] for level in plan.allowed[0]) for costs in plan.costs(0))
        if len(task.prompt.ids) - len(task.keys) + cheapest >= self._longest_row:
            raise self._too_long()

    def _ids(self, request: GenerationRequest) -> Tensor:
        with self._tokenizing:
            if request.prompt is None:
                return self.assistant.prompt_ids(request.messages, len(request.images))
            if not request.prompt.strip():
                raise ValueError("The prompt is empty; give a question.")
            return torch.as_tensor(tokenizer_image_token(request.prompt, self.assistant.tokenizer))

    def _views(self, image: Image.Image) -> Tensor:
        try:
            return self.model.prepare_views([self.assistant.views(image)])[0]
        except ImageError as error:
            raise ServeError(ErrorKind.INVALID_IMAGE) from error

    def _plan(self, tasks: Sequence[_Task], num_views: Sequence[int]) -> RoutingPlan:
        sizes = [image.size for task in tasks for image in task.request.images]
        rows, wishes = [task.prompt_row for task in tasks], [task.request.routing for task in tasks]
        return self.model.plan(rows, num_views, sizes, wishes, self.assistant.merge_type)

    @property
    def _longest_row(self) -> int:
        """Positions that one request may take, its answer included."""
        return min(self.model.config.context_length, self.max_batch_tokens)

    def _too_long(self) -> ServeError:
        return ServeError(
            ErrorKind.CONTEXT_LENGTH,
            f"With its pictures the prompt leaves no room for an answer within {self._longest_row} positions; shorten it or choose a "
            "coarser granularity.",
        )

    # ---- the engine's thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                self._turn_until_closed()
        except BaseException:
            logger.critical("the engine's thread has died; every request from now on is refused", exc_info=True)
            self._end_kind = ErrorKind.INTERNAL
        finally:
            with self._changed:
                self._closed = True
            self._give_up(self._end_kind)

    def _turn_until_closed(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._running or self._ready or self._waiting):
                    self._changed.wait()
                if self._closed:
                    return
            try:
                self._turn()
            except Exception:
                logger.exception("the engine failed outside of any request; everything in it is given up")
                self._give_up(ErrorKind.INTERNAL)
            self._deliver()

    def _turn(self) -> None:
        """One turn of the crank: let cancelled requests go, encode and admit waiting ones, and take one step with the running ones."""
        self._drop_cancelled()
        free = self._rows_allowed - len(self._running) - len(self._ready)
        if free > 0 and self._enough_waiting(free):
            with self._changed:
                tasks = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._ready.extend(self._isolating(self._encode, tasks, self._waiting))
        for joining in of_similar_length(self._admitted()):
            for task in self._isolating(self._prefill, joining, self._ready):
                assert task.picked is not None, "a prefill picks the first token"
                self._accept(task, task.picked)
            self._deliver()
        if self._running:
            for stepped, outcome in self._step(0, list(self._running)):
                self._accept(stepped, outcome)
        elif self._short_of_memory:
            self._empty_batch()

    def _enough_waiting(self, free: int) -> bool:
        """Whether to take waiting requests in now: encoding and prefill cost the running ones as much for one as for several, so the first
        to come waits a few steps for company."""
        waiting = len(self._waiting)
        if not waiting:
            return False
        self._passed_over += 1
        if self._running and waiting < min(free, len(self._running)) and self._passed_over <= _STEPS_FOR_COMPANY:
            return False
        self._passed_over = 0
        return True

    def _isolating(self, work: Callable[[list[_Task]], None], tasks: list[_Task], queue: deque[_Task]) -> list[_Task]:
        """Do work on tasks together; if that fails, one by one, so that a bad one fails alone. Returns those that went through.

        Args:
            queue: where the tasks came from; one that does not fit into memory beside the running ones goes back there.
        """
        try:
            work(tasks)
            return tasks
        except Exception as error:
            again = self._after_failure(tasks, error, queue)
        # Only here, where the exception and the tensors in its traceback are gone.
        self._free_memory()
        return [task for one in tasks for task in self._isolating(work, [one], queue)] if again else []

    def _after_failure(self, tasks: list[_Task], error: Exception, queue: deque[_Task]) -> bool:
        """Whether to try the tasks again, one by one; a single one that is not tried again has failed or waits."""
        self._slots.wipe_unused()
        short = is_out_of_memory(error)
        self._short_of_memory |= short
        if len(tasks) > 1:
            logger.warning("a batch of %d requests failed (%s); they are tried one by one", len(tasks), type(error).__name__)
            return True
        if short and self._running:
            self._rows_allowed = len(self._running)
            with self._changed:
                ordered = sorted([*tasks, *queue], key=lambda task: task.submitted)
                queue.clear()
                queue.extend(ordered)
            return False
        if short and self._rows_allowed > 1:
            self._rows_allowed //= 2
            self._slots.clear()
            return True
        self._fail(tasks[0], error)
        return False

    # ---- encode and route ----------------------------------------------------------------------------------------------------

    def _encode(self, tasks: list[_Task]) -> None:
        """Pictures and prompts become rows; each picture is encoded once, whoever asks about it."""
        timer = StageTimer(self.model.device)
        features = self._features(tasks, timer)
        plan = self._plan(tasks, [len(each) for each in features])
        try:
            encoded = self.model.encode_rows([task.prompt_row for task in tasks], features, plan, timer)
        except ValueError as error:  # a row that is longer than the context at the granularity the router chose
            raise self._too_long() from error
        for task, row in zip(tasks, encoded, strict=True):
            task.milliseconds |= timer.milliseconds
            self._accept_row(task, row)

    def _features(self, tasks: Sequence[_Task], timer: StageTimer) -> list[Tensor]:
        """Features (C, P, D) of the tasks' pictures, in order."""
        known: dict[str, Tensor] = {}
        missing: dict[str, Tensor] = {}
        for task in tasks:
            for place, key in enumerate(task.keys):
                if not task.cached[place] and key not in missing and (kept := self.cache.get(key)) is not None:
                    task.pictures[place], task.cached[place] = kept[0], True  # another request brought it in the meantime
                if task.cached[place]:
                    known[key] = task.pictures[place]
                else:
                    missing[key] = task.pictures[place]
        with timer("vision"):
            for key, features in zip(missing, self.model.encode_views(list(missing.values())), strict=True):
                known[key] = features
                if features.isfinite().all():  # what broke down once is not remembered
                    self.cache.put(key, features)
        return [known[key] for task in tasks for key in task.keys]

    def _accept_row(self, task: _Task, encoded: EncodedRow) -> None:
        room = self._longest_row - encoded.row.length
        if room < 1:
            raise self._too_long()
        task.row = encoded.row
        task.reports = tuple(
            self._plain(report, cached, image.size)
            for report, cached, image in zip(encoded.reports, task.cached, task.request.images, strict=True)
        )
        task.max_new_tokens = min(task.request.sampling.max_new_tokens, room)
        task.beginnings = self._beginnings(task)
        task.known = next((kept for key, _ in task.beginnings if key in self.prefixes and (kept := self.prefixes.get(key))), ())

    def _plain(self, report: RoutingReport, cached: bool, size: tuple[int, int]) -> ImageReport:
        return ImageReport(
            granularity=report.granularity,
            visual_tokens=report.num_visual_tokens,
            full_visual_tokens=report.full_visual_tokens,
            tokens_per_level=report.tokens_per_level,
            logits=() if report.logits is None else tuple(report.logits.tolist()),
            probabilities=() if report.probabilities is None else tuple(report.probabilities.tolist()),
            cached=cached,
            grid=grid_of(size, report.granularity, self.model.config),
        )

    def _beginnings(self, task: _Task) -> list[tuple[str, int]]:
        """Key and length of the prompt up to the end of each of its pictures, longest first."""
        ids = task.prompt_row.ids.tolist()
        pictures = [(key, report.granularity) for key, report in zip(task.keys, task.reports, strict=True)]
        places = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        found, visual = [], 0
        for count, (place, report) in enumerate(zip(places, task.reports, strict=True), start=1):
            visual += report.visual_tokens
            found.append((prefix_key(ids[: place + 1], pictures[:count], self.revision), place + 1 - count + visual))
        # The last position has to be read in any case: it says what comes first.
        return [(key, length) for key, length in reversed(found) if length < task.encoded.length]

    # ---- join: prefill -------------------------------------------------------------------------------------------------------

    def _admitted(self) -> list[_Task]:
        """The ready requests that fit beside the running ones, first come first served."""
        joining: list[_Task] = []
        longest = max((task.positions for task in self._running), default=0)
        prompt = 0
        while self._ready:
            task = self._ready[0]
            others = len(self._running) + len(joining)
            longest, prompt = max(longest, task.positions), max(prompt, task.num_unread)
            rows = others + 1
            if rows > self._rows_allowed or (others and rows * longest > self.max_batch_tokens):
                break
            if joining and (len(joining) + 1) * prompt > _PREFILL_POSITIONS:
                break
            joining.append(self._ready.popleft())
        return joining

    def _prefill(self, tasks: list[_Task]) -> None:
        """Read the prompts, pick each first token, join the running batch."""
        start = monotonic()
        rows = [self._unread(task) for task in tasks]
        hidden = self._read(rows, tasks)
        last = torch.tensor([row.length - 1 for row in rows], device=hidden.device)
        picks = self._pick(hidden[torch.arange(len(rows), device=hidden.device), last], tasks)
        self._slots.end([task.encoded.length for task in tasks])
        now = monotonic()
        for task, picked in zip(tasks, picks, strict=True):
            task.pictures, task.picked, task.known, task.first_token = [], picked, (), now
            task.slot = len(self._running)
            self._running.append(task)
            parts, ttft = {**task.milliseconds, "prefill": 1000 * (now - start)}, 1000 * (now - task.submitted)
            task.milliseconds = {"queue": ttft - sum(parts.values()), **parts, "ttft": ttft}
            self._send(task, Started(task.encoded.length, task.reports, dict(task.milliseconds)))
            if picked.token is not None:
                self._keep_beginning(task)

    def _read(self, rows: Sequence[SplicedRow], tasks: Sequence[_Task]) -> Tensor:
        """Hidden states (B, L, D) of what is unread, padded on the right; keys and values go behind the running rows."""
        embeds = pad_rows(rows, "right").inputs_embeds
        first, known = len(self._running), [task.num_known for task in tasks]
        needed = max(task.positions for task in (*self._running, *tasks))
        self._slots.reserve(first + len(tasks), max(needed, max(known) + embeds.shape[1]), self._rows_allowed)
        for row, task in enumerate(tasks, start=first):
            if task.known:
                self._slots.recall(row, task.known)
        positions, mask = self._slots.begin(first, known, embeds.shape[1], embeds)
        return self._language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)

    def _keep_beginning(self, task: _Task) -> None:
        """Keep the keys and values up to the end of the last picture, for the next question about it."""
        if not task.beginnings or task.beginnings[0][0] in self.prefixes:
            return
        key, length = task.beginnings[0]
        try:
            self.prefixes.put(key, *self._slots.beginning(task.slot, length))
        except Exception as error:  # most likely there is no memory for it; the request itself went well
            logger.warning("the beginning of request %s is not kept (%s)", task.request.request_id, type(error).__name__)

    def _unread(self, task: _Task) -> SplicedRow:
        """What the prefill of a request reads: its prompt without the beginning that is known."""
        return SplicedRow(task.encoded.inputs_embeds[task.num_known :], task.encoded.labels[task.num_known :])

    # ---- one step of all running requests ------------------------------------------------------------------------------------

    def _step(self, first: int, tasks: list[_Task]) -> list[tuple[_Task, Picked | Exception]]:
        """The next token of the running tasks from row `first` on, or for a task that fails alone, why.

        A pass that fails is taken again over its two halves.
        """
        try:
            return list(zip(tasks, self._next_tokens(first, tasks), strict=True))
        except Exception as error:
            short = is_out_of_memory(error)
            self._short_of_memory |= short
            if len(tasks) == 1:
                return [(tasks[0], error)]
            logger.warning("a step of %d requests failed (%s); it is taken in halves", len(tasks), type(error).__name__)
        half = len(tasks) // 2
        if short:
            self._rows_allowed = max(half, 1)
        self._free_memory()
        return [*self._step(first, tasks[:half]), *self._step(first + half, tasks[half:])]

    def _next_tokens(self, first: int, tasks: Sequence[_Task]) -> list[Picked]:
        tokens = torch.tensor([[task.stream.ids[-1]] for task in tasks], device=self.model.device)
        embedded = self.model.get_input_embeddings()(tokens)  # (B, 1, D)
        lengths = self._slots.lengths[first : first + len(tasks)]
        positions, mask = self._slots.begin(first, lengths, 1, embedded)
        hidden = self._language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
        picks = self._pick(hidden[:, -1], tasks)
        self._slots.end([length + 1 for length in lengths])
        return picks

    def _language_model(self, **inputs: Any) -> Tensor:
        """Hidden states (B, L, D) after the last layer; the vocabulary is left to `_pick`, for the positions that need it."""
        return self.model.get_model()(use_cache=True, past_key_values=self._slots, **inputs).last_hidden_state

    def _pick(self, hidden: Tensor, tasks: Sequence[_Task]) -> list[Picked]:
        """The next token of each row of (B, D)."""
        logits = self.model.lm_head(hidden)
        early = [row for row, task in enumerate(tasks) if len(task.stream.ids) < task.request.sampling.min_new_tokens]
        if early and (ends := end_ids(self.model)):
            logits[torch.tensor(early, device=logits.device)[:, None], torch.tensor(ends, device=logits.device)] = float("-inf")
        sampling = [task.request.sampling for task in tasks]
        uniform = [
            random_number(task.seed, len(task.stream.ids)) if wish.temperature else 0.0 for task, wish in zip(tasks, sampling, strict=True)
        ]
        return pick(logits, sampling, uniform)

    def _accept(self, task: _Task, outcome: Picked | Exception) -> None:
        """Write down a task's next token, send the text that is certain, and let it go when it is done or has failed."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if outcome.token is None:
                raise ServeError(ErrorKind.NOT_FINITE)
            self._write_down(task, outcome)
        except Exception as error:
            self._leave(task, wipe=True)
            self._fail(task, error)

    def _write_down(self, task: _Task, picked: Picked) -> None:
        assert picked.token is not None
        text = task.stream.add(picked.token)
        scores = self._scores(picked)
        if text or scores:
            self._send(task, Piece(text, scores))
        if picked.token in end_ids(self.model) or task.stream.stopped:
            self._finish(task, "stop")
        elif len(task.stream.ids) >= task.max_new_tokens:
            self._finish(task, "length")

    def _scores(self, picked: Picked) -> tuple[TokenScore, ...]:
        if picked.log_probability is None or picked.token is None:
            return ()
        alternatives = tuple((self._token_text(token), value) for token, value in picked.alternatives)
        return (TokenScore(self._token_text(picked.token), picked.log_probability, alternatives),)

    def _token_text(self, token: int) -> str:
        return str(self.assistant.tokenizer.decode([token]))

    def _finish(self, task: _Task, reason: str) -> None:
        rest = task.stream.end()
        self._leave(task)
        if rest:
            self._send(task, Piece(rest))
        now = monotonic()
        decode = 1000 * (now - (task.first_token or now))
        milliseconds = {**task.milliseconds, "decode": decode, "total": 1000 * (now - task.submitted)}
        reason = "stop" if task.stream.stopped else reason
        self._send(task, Finished(reason, task.encoded.length, len(task.stream.ids), task.reports, milliseconds))
        self._send(task, _END)
        self._let_go(task)
        self._rows_allowed = min(self.max_batch_rows, self._rows_allowed + 1)

    # ---- leave ---------------------------------------------------------------------------------------------------------------

    def _leave(self, task: _Task, wipe: bool = False) -> None:
        """Take a task out of the running batch; the last one moves into its row."""
        if task.slot < 0:
            return
        moved = self._slots.leave(task.slot, wipe)
        last = self._running.pop()
        assert last.slot == moved, "the batch and its cache disagree about the last row"
        if last is not task:
            self._running[task.slot] = last
            last.slot = task.slot
        task.slot = -1

    def _empty_batch(self) -> None:
        for task in self._running:
            task.slot = -1
        self._running = []
        self._slots.clear()
        self._short_of_memory = False
        self._free_memory()

    def _drop_cancelled(self) -> None:
        for task in [task for task in self._running if task.generation.cancelled]:
            self._leave(task)
            self._end_cancelled(task)
        with self._changed:
            for queue in (self._waiting, self._ready):
                for task in [task for task in queue if task.generation.cancelled]:
                    queue.remove(task)
                    self._end_cancelled(task)

    def _end_cancelled(self, task: _Task) -> None:
        self._fail(task, ServeError(ErrorKind.CANCELLED))

    def _give_up(self, kind: ErrorKind) -> None:
        with self._changed:
            tasks = [*self._running, *self._ready, *self._waiting]
            self._ready.clear()
            self._waiting.clear()
        # The callers first: giving memory back is what may fail on an accelerator that has failed.
        for task in tasks:
            self._fail(task, ServeError(kind))
        self._deliver()
        self._empty_batch()

    def _fail(self, task: _Task, error: Exception) -> None:
        if not task.ended:
            self._let_go(task)
            self._send(task, self._failure(task, error))

    def _failure(self, task: _Task, error: Exception) -> ServeError:
        """What the caller is told; the log has the rest."""
        failure = as_serve_error(error)
        if failure.kind in (ErrorKind.INTERNAL, ErrorKind.OUT_OF_MEMORY, ErrorKind.NOT_FINITE):
            logger.error("request %s failed: %s", task.request.request_id, failure.kind.value, exc_info=error)
        return failure

    def _let_go(self, task: _Task) -> None:
        """One request fewer, whichever way it ended."""
        with self._changed:
            if not task.ended:
                task.ended = True
                self._outstanding -= 1
                self._finished += 1

    def _free_memory(self) -> None:
        if self.model.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # an accelerator that has failed fails at this too; requests are told by what they do there
            logger.exception("the accelerator's memory cannot be given back")

    # ---- events to the callers' loops ----------------------------------------------------------------------------------------

    def _send(self, task: _Task, event: Event | ServeError | None) -> None:
        self._outbox.append((task.generation, event))

    def _deliver(self) -> None:
        """Hand the collected events over, one call per event loop."""
        outbox, self._outbox = self._outbox, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EngineGeneration, Event | ServeError | None]]] = {}
        for generation, event in outbox:
            by_loop.setdefault(generation.loop, []).append((generation, event))
        for loop, events in by_loop.items():
            _post(loop, events)


def _post(loop: asyncio.AbstractEventLoop, events: Sequence[tuple[EngineGeneration, Event | ServeError | None]]) -> None:
    try:
        loop.call_soon_threadsafe(_put_all, events)
    except RuntimeError:  # the caller's loop was closed: nobody is left to tell
        logger.warning("%d events had no event loop to go to", len(events))


def of_similar_length(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Groups of requests whose unread prompts can be padded to one length at little cost, shortest first, the known ones apart."""
    groups: list[list[_Task]] = []
    used = 0
    for task in sorted(tasks, key=lambda task: (bool(task.known), task.num_unread)):
        length = task.num_unread
        alike = bool(groups) and bool(groups[-1][0].known) == bool(task.known)
        if alike and (len(groups[-1]) + 1) * length <= (1 + _PADDING_SHARE) * (used + length) + _PADDING:
            groups[-1].append(task)
            used += length
        else:
            groups.append([task])
            used = length
    return groups


def _put_all(events: Sequence[tuple[EngineGeneration, Event | ServeError | None]]) -> None:
    for generation, event in events:
        generation.put(event)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no class of its own for this.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def as_serve_error(error: Exception) -> ServeError:
    """The typed failure behind an exception; no other library's text is passed on."""
    if isinstance(error, ServeError):
        return error
    if is_out_of_memory(error):
        return ServeError(ErrorKind.OUT_OF_MEMORY)
    if isinstance(error, FloatingPointError):
        return ServeError(ErrorKind.NOT_FINITE)
    return ServeError(ErrorKind.INTERNAL)
