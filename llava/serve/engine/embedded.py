"""The embedded engine: many requests, one model, one scheduler thread.

    submit() ─> prepare (threads: ids, costs) ─> waiting ─> encode and route (batched) ─> ready ─> prefill (batched) ─> running
                                                                                                                          │
    events to the caller's event loop <────────────── one decoding step after another, for all running requests <─────────┘

Requests join and leave between any two steps. An answer does not depend on its neighbours: rows of a batch never see each other, and each
row has its own random numbers. A pass over a batch that fails is repeated over parts of it, so that only the request at fault fails. When
memory runs out, parts fit where the whole did not, fewer requests run at a time, and one that cannot join beside others waits until they
are done; where not even parts fit, the youngest request is preempted: it leaves the batch, keeps its answer so far, and is prepared,
encoded and prefilled again when there is room. An engine for which everything fails closes, see `failures.Health`.

This module ties the parts together. The stages are in `prepare.py`, `encode.py` and `batch.py`, what they hand on is in
`task.py`, who joins when in `scheduling.py`, and the way back to the callers in `outbox.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

import torch
from PIL import Image

from llava.inference import Assistant, end_ids, template_stops
from llava.serve.engine.batch import Batch, check_attention
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.encode import Encoder
from llava.serve.engine.failures import Health, explain, is_out_of_memory
from llava.serve.engine.guides import Guides
from llava.serve.engine.outbox import Delivery, EngineGeneration, Outbox, deliver_now
from llava.serve.engine.prepare import Preparer
from llava.serve.engine.sampling import Picked
from llava.serve.engine.scheduling import BatchingDelay, admit, of_similar_length
from llava.serve.engine.scores import ScoreStream, TokenTexts
from llava.serve.engine.task import Encoded, PendingPrefill, Task
from llava.serve.protocol import (
    EngineImage,
    EngineStats,
    ErrorKind,
    Finished,
    GenerationRequest,
    ModelCard,
    Piece,
    PromptTokens,
    ServeError,
    Started,
    TokenScore,
)
from llava.text_stream import TextStream

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class EmbeddedEngine:
    """Answers requests with a model in this process; see `protocol.Engine`.

    Args:
        assistant: the loaded model.
        name: what clients call it.
        max_batch_rows: requests answered at the same time.
        max_batch_tokens: positions (rows times the longest row) of the key-value storage; by default four full contexts.
        max_queue: requests that may wait beside the running ones.
        cache_bytes: size of the cache of image features.
        prefix_cache_bytes: size of the cache of keys and values of prompts up to the end of their images, for the next question about them.
        revision: of the weights, for the caches' keys.
        max_images: per request, for the model card.
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
        self.assistant, self.model = assistant, assistant.model
        config = self.model.config
        self.max_batch_rows, self.max_queue = max_batch_rows, max_queue
        self.max_batch_tokens = max_batch_tokens or 4 * config.context_length
        check_attention(config)
        self._check_sizes()
        self.features = TensorCache(cache_bytes)
        self.prefixes = TensorCache(prefix_cache_bytes)
        self._card = card_of(assistant, name, max_images)
        # The stages, in order.
        weights, longest_row = f"{name}@{revision or id(self.model)}", min(config.context_length, self.max_batch_tokens)
        self.preparer = Preparer(assistant, self.features, weights, longest_row)
        self.encoder = Encoder(assistant, self.features, self.prefixes, weights, longest_row)
        self.guides = Guides(assistant.tokenizer, config.vocab_size, end_ids(self.model))
        self._token_texts = TokenTexts(assistant.tokenizer)
        self.batch = Batch(self.model, self.prefixes, max_batch_rows, self.max_batch_tokens)
        self.batching_delay = BatchingDelay()
        self.health = Health()
        # All requests in the engine, and those between two stages.
        self._live: set[Task] = set()  # accepted, and neither finished nor failed, in whatever stage
        self._waiting: deque[Task] = deque()
        self._ready: deque[Task] = deque()
        self._draining = self._closed = False
        self._end_kind = ErrorKind.CANCELLED  # the error of requests that are left at the end
        self._changed = threading.Condition(threading.RLock())  # guards what other threads than the scheduler's touch
        self._outbox = Outbox()
        self._preparers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
        # Compiling a grammar may take seconds: these requests wait for one another, and no others for them.
        self._guiding = ThreadPoolExecutor(max_workers=2, thread_name_prefix="guide")
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def _check_sizes(self) -> None:
        if self.max_batch_rows < 1 or self.max_queue < 0:
            raise ValueError(f"max_batch_rows is {self.max_batch_rows} and max_queue {self.max_queue}; expected at least 1 and 0.")
        if self.max_batch_tokens < 2:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}; expected 2 or more: room for a prompt and an answer.")

    # ---- callers' threads ----------------------------------------------------------------------------------------------------

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._draining and not self._closed

    def start(self) -> None:
        """Nothing is left to begin: the scheduler's thread runs since the engine was made."""

    def stats(self) -> EngineStats:
        kept, running = self.features, len(self.batch.tasks)
        failed = None if self._end_kind is ErrorKind.CANCELLED else self._end_kind
        return EngineStats(max(0, len(self._live) - running), running, len(kept), kept.bytes, kept.hits, kept.misses, failed)

    def prepare_image(self, image: Image.Image) -> EngineImage:
        return self.preparer.prepare_image(image)

    def submit(self, request: GenerationRequest) -> EngineGeneration:
        generation = EngineGeneration(self._wake)
        stops = (*template_stops(self.model.config.conv_version), *request.sampling.stop)
        seed = random.getrandbits(63) if request.sampling.seed is None else request.sampling.seed
        stream, scores = TextStream(self.assistant.tokenizer, stops), ScoreStream(self._token_texts)
        begun = monotonic() - sum(image.seconds for image in request.images)  # the time that its images took counts
        task = Task(request, generation, begun, stream, scores, seed)
        with self._changed:  # until its preparation is submitted, so that `close` comes before or after
            self._check_open()
            self._live.add(task)
            try:
                (self._preparers if request.sampling.guide is None else self._guiding).submit(self._prepare, task)
            except RuntimeError as error:  # the system has no more threads, or the interpreter is exiting
                self._release(task)
                raise ServeError(ErrorKind.OVERLOADED) from error
        return generation

    def _check_open(self) -> None:
        if self._draining or self._closed:
            raise ServeError(ErrorKind.DRAINING if self._end_kind is ErrorKind.CANCELLED else self._end_kind)
        if len(self._live) >= self.max_batch_rows + self.max_queue:
            raise ServeError(ErrorKind.OVERLOADED)

    async def tokenize(self, request: GenerationRequest, special: bool = True) -> PromptTokens:
        return await asyncio.to_thread(self.preparer.tokens, request, special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self.preparer.text_of, ids)

    async def drain(self) -> None:
        with self._changed:
            self._draining = True
        while self._live:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify()
        # Off the event loop, since it waits for images that are being decoded. What is prepared from now on fails.
        await asyncio.to_thread(self._guiding.shutdown)
        await asyncio.to_thread(self._preparers.shutdown)
        await asyncio.to_thread(self._thread.join)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- preparing threads ---------------------------------------------------------------------------------------------------

    def _prepare(self, task: Task) -> None:
        start = monotonic()
        failure: Exception | None = ServeError(self._end_kind)
        if not task.generation.cancelled and not self._closed:
            try:
                guide = task.request.sampling.guide
                if guide is not None and task.guide is None:
                    task.guide = self.guides.begin(guide, task.name)
                task.was_prepared(self.preparer.prepare(task.request))
                failure = None
            except Exception as error:
                failure = error
        if not task.begun:
            task.milliseconds["views"] = 1000 * (monotonic() - start + sum(image.seconds for image in task.request.images))
        with self._changed:
            if task not in self._live:  # it has failed in the meantime
                return
            if failure is None:
                self._queue([task], self._waiting)
                self._changed.notify()
        if failure is not None and self._release(task):
            deliver_now(task.generation, explain(task.name, failure))

    # ---- the scheduler thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._run_until_closed()
        except BaseException:
            logger.critical("the scheduler thread has died; all requests are refused from now on", exc_info=True)
            self._end_kind = ErrorKind.INTERNAL
        finally:
            with self._changed:
                self._closed = True
            self._fail_all(self._end_kind)

    def _run_until_closed(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self.batch.tasks or self._ready or self._waiting):
                    self._changed.wait()
                if self._closed:
                    return
            try:
                self._iterate()
            except Exception as error:
                logger.exception("the engine failed outside of any request; all requests in it fail")
                self.health.failed(error, outside=True)
                self._fail_all(ErrorKind.INTERNAL)
            self._outbox.deliver()
            if self.health.is_lost(self.batch.works):
                raise RuntimeError("Every iteration fails; nothing can be computed in this process any more.")

    def _iterate(self) -> None:
        """One iteration of the scheduler: drop cancelled requests, encode and prefill waiting ones, and take one decoding step."""
        self._drop_cancelled()
        running = self.batch.tasks
        free = self.batch.rows_allowed - len(running) - len(self._ready)
        if free > 0 and self.batching_delay.is_over(len(self._waiting), len(running), free):
            self._encode_waiting(free)
        for joining in of_similar_length(admit(self._ready, running, self.batch.rows_allowed, self.max_batch_tokens)):
            for task, picked in self._isolate_failures(self._prefill, joining, self._ready):
                self._accept(task, picked)
            self._outbox.deliver()
        if self.batch.tasks:
            self._step()
        else:
            self.batch.relax()

    def _step(self) -> None:
        """The next token of every running request; where one lacks memory even by itself, the youngest is preempted."""
        failed: list[tuple[Task, Exception]] = []
        for task, outcome in self.batch.step():
            if isinstance(outcome, Exception) and is_out_of_memory(outcome):
                failed.append((task, outcome))
            else:
                self._accept(task, outcome)
        if not failed:
            return
        if (youngest := self.batch.preempt()) is not None:
            self._resume(youngest)
        elif not self.batch.shrink():  # it runs alone and has all memory
            for task, error in failed:
                self._accept(task, error)

    def _resume(self, task: Task) -> None:
        """Prepare a preempted request again; its answer continues where it was."""
        logger.warning("request %s is preempted after %d tokens for lack of memory", task.name, len(task.stream.ids))
        try:
            self._preparers.submit(self._prepare, task)
        except RuntimeError:  # the system has no more threads, or the engine is closing
            self._fail(task, ServeError(self._end_kind if self._closed else ErrorKind.OUT_OF_MEMORY))

    def _encode_waiting(self, count: int) -> None:
        with self._changed:
            tasks = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        for task, (encoded, pending) in self._isolate_failures(self._encode, tasks, self._waiting):
            task.was_encoded(encoded, pending)
            self._ready.append(task)

    def _encode(self, tasks: list[Task]) -> list[tuple[Encoded, PendingPrefill]]:
        new = [task for task in tasks if not task.begun]
        encoded = self.encoder.encode([task.request for task in new], [task.prepared for task in new]) if new else []
        found = dict(zip(new, encoded, strict=True))
        return [found[task] if task in found else (task.encoded, self._reencode(task)) for task in tasks]

    def _reencode(self, task: Task) -> PendingPrefill:
        return self.encoder.reencode(task.request, task.prepared, task.encoded, task.stream.ids)

    def _prefill(self, tasks: list[Task]) -> list[Picked]:
        """Prefill the prompts, sample their first tokens, join the running batch."""
        start = monotonic()
        picks = self.batch.prefill(tasks)
        now = monotonic()
        for task, picked in zip(tasks, picks, strict=True):
            self.batch.join(task)
            begun = task.begun
            task.was_prefilled(now, now - start)
            if not begun:
                self._send(task, Started(task.encoded.length, task.encoded.reports, dict(task.milliseconds)))
            if picked.token is not None:
                self.batch.keep_prefix(task)
        return picks

    # ---- failures of a batch -------------------------------------------------------------------------------------------------

    def _isolate_failures(
        self, work: Callable[[list[Task]], list[_Result]], tasks: list[Task], queue: deque[Task]
    ) -> list[tuple[Task, _Result]]:
        """Do work on tasks together; if that fails, one by one, so that a bad one fails alone. Returns those that succeeded.

        Args:
            queue: where the tasks came from; one that does not fit into memory beside the running ones returns to it.
        """
        try:
            return list(zip(tasks, work(tasks), strict=True))
        except Exception as error:
            again = self._after_failure(tasks, error, queue)
        # Only here, where the exception is gone, and with it the tensors in its traceback.
        self.batch.free_memory()
        return [done for task in tasks for done in self._isolate_failures(work, [task], queue)] if again else []

    def _queue(self, tasks: list[Task], queue: deque[Task]) -> None:
        """Insert tasks by their age; called with the lock held."""
        ordered = sorted([*tasks, *queue], key=lambda task: task.submitted)
        queue.clear()
        queue.extend(ordered)

    def _after_failure(self, tasks: list[Task], error: Exception, queue: deque[Task]) -> bool:
        """Whether to retry the tasks one by one; a single one that is not retried has failed, or waits again."""
        out_of_memory = is_out_of_memory(error)
        self.health.failed(error)
        self.batch.clean_up(out_of_memory)
        if len(tasks) > 1:
            logger.warning("a batch of %d requests failed (%s); they are retried one by one", len(tasks), type(error).__name__)
            return True
        if out_of_memory and self.batch.make_room():
            return True
        if out_of_memory and self.batch.tasks:
            with self._changed:
                self._queue(tasks, queue)
        else:
            self._fail(tasks[0], error)
        return False

    # ---- tokens --------------------------------------------------------------------------------------------------------------

    def _accept(self, task: Task, outcome: Picked | Exception) -> None:
        """Record a task's next token, send the text that is certain, and release the task when it is done or has failed."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if outcome.token is None:
                raise ServeError(ErrorKind.NOT_FINITE)
            self.health.wrote()
            self._record(task, outcome.token, outcome)
        except Exception as error:
            self.health.failed(error)
            self.batch.leave(task, wipe=True)
            self._fail(task, error)

    def _record(self, task: Task, token: int, picked: Picked) -> None:
        text = task.stream.add(token)
        task.scores.add(token, picked)
        self._send_piece(task, text, task.scores.sent(text))
        if task.guide is not None:
            task.guide.take(token)
        if task.stream.stopped or self._ends(token, task):
            self._finish(task, "stop")
        elif len(task.stream.ids) >= task.encoded.max_new_tokens:
            self._finish(task, "length")

    def _ends(self, token: int, task: Task) -> bool:
        """Whether an answer ends with this token."""
        params = task.request.sampling
        if token in params.stop_token_ids or (task.guide is not None and task.guide.finished):
            return True
        return not params.ignore_eos and token in end_ids(self.model)

    def _send_piece(self, task: Task, text: str, scores: tuple[TokenScore, ...]) -> None:
        if text or scores:
            self._send(task, Piece(text, scores))

    # ---- ends ----------------------------------------------------------------------------------------------------------------

    def _finish(self, task: Task, reason: str) -> None:
        rest = task.stream.end()
        self.batch.leave(task)
        self._send_piece(task, rest, task.scores.end(rest, task.stream.stopped))
        reason, known = "stop" if task.stream.stopped else reason, task.encoded
        self._send(task, Finished(reason, known.length, len(task.stream.ids), known.reports, task.all_milliseconds(monotonic())))
        self._send(task, None)
        self._release(task)
        self.batch.grow()

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.batch.tasks if task.generation.cancelled]:
            self.batch.leave(task)
            self._fail(task, ServeError(ErrorKind.CANCELLED))
        with self._changed:
            for queue in (self._waiting, self._ready):
                for task in [task for task in queue if task.generation.cancelled]:
                    queue.remove(task)
                    self._fail(task, ServeError(ErrorKind.CANCELLED))

    def _fail_all(self, kind: ErrorKind) -> None:
        """Fail all requests in whatever stage: also those being prepared, and those that a failed iteration had popped."""
        with self._changed:
            tasks = list(self._live)
            self._ready.clear()
            self._waiting.clear()
        # The callers first: freeing memory may fail on an accelerator that has failed.
        for task in tasks:
            self._fail(task, ServeError(kind))
        self._outbox.deliver()
        self.batch.empty()

    def _fail(self, task: Task, error: Exception) -> None:
        if self._release(task):
            self._send(task, explain(task.name, error))

    def _release(self, task: Task) -> bool:
        """Remove a request that has ended; returns whether it was still in the engine."""
        with self._changed:
            was_live = task in self._live
            self._live.discard(task)
            return was_live

    def _send(self, task: Task, delivery: Delivery) -> None:
        self._outbox.put(task.generation, delivery)


def card_of(assistant: Assistant, name: str, max_images: int) -> ModelCard:
    """What a loaded model, or its front, is to clients.

    Args:
        name: that they call it. max_images: per request.
    """
    model = assistant.model
    has_tower = model.get_model().vision_tower is not None
    granularities = tuple(level.tokens for level in model.levels) if has_tower else ()
    has_router = model.get_model().router is not None
    return ModelCard(
        name, model.config.context_length, granularities, has_router, has_tower, max_images if has_tower else 0, model.config.description
    )
