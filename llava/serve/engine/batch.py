"""The running batch: who is in which row of the slots, and the passes through the language model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.inference import end_ids
from llava.model.splice import pad_rows
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.failures import is_out_of_memory
from llava.serve.engine.logits import Row, adjusted
from llava.serve.engine.sampling import Picked, pick, random_number
from llava.serve.engine.slots import SlotCache
from llava.serve.engine.task import Task

logger = logging.getLogger(__name__)


class Batch:
    """Requests that are being answered.

    Args:
        model: reads and writes.
        prefixes: keeps keys and values of prompts up to the end of their pictures.
        max_rows: requests at the same time. max_positions: rows times positions that keys and values are kept for.

    Attributes:
        tasks: by slot. rows_allowed: requests at the same time from now on; falls when memory runs out, and grows back.
    """

    def __init__(self, model: Any, prefixes: TensorCache, max_rows: int, max_positions: int) -> None:
        self.model, self.prefixes, self.max_rows = model, prefixes, max_rows
        self.slots = SlotCache(max_rows, max_positions)
        self.tasks: list[Task] = []
        self.rows_allowed = max_rows
        self._short_of_memory = False

    # ---- join ----------------------------------------------------------------------------------------------------------------

    def read(self, tasks: Sequence[Task]) -> list[Picked]:
        """Read the prompts into the rows behind the running ones; the first token of each. They join by `join`."""
        rows = [task.unread.row for task in tasks]
        first, known = len(self.tasks), [task.unread.num_known for task in tasks]
        embeds = pad_rows(rows, "right").inputs_embeds
        needed = max(task.encoded.positions for task in (*self.tasks, *tasks))
        self.slots.reserve(first + len(tasks), max(needed, max(known) + embeds.shape[1]), self.rows_allowed)
        for row, task in enumerate(tasks, start=first):
            if task.unread.known:
                self.slots.recall(row, task.unread.known)
        positions, mask = self.slots.begin(first, known, embeds.shape[1], embeds)
        hidden = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        last = torch.tensor([row.length - 1 for row in rows], device=hidden.device)
        picks = self.pick(hidden[torch.arange(len(rows), device=hidden.device), last], tasks)
        self.slots.end([task.length for task in tasks])
        return picks

    def join(self, task: Task) -> None:
        """Take the next one of those in whose prompts were read."""
        task.slot = len(self.tasks)
        self.tasks.append(task)

    def keep_beginning(self, task: Task) -> None:
        """Keep the keys and values up to the end of the last picture, for the next question about it."""
        beginnings = task.encoded.beginnings
        if not beginnings or beginnings[0][0] in self.prefixes:
            return
        key, length = beginnings[0]
        try:
            self.prefixes.put(key, *self.slots.beginning(task.slot, length))
        except Exception as error:  # most likely there is no memory for it; the request itself went well
            logger.warning("the beginning of request %s is not kept (%s)", task.name, type(error).__name__)

    # ---- one step ------------------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Task, Picked | Exception]]:
        """The next token of every running request, or for one that fails alone, why."""
        return self._step(0, list(self.tasks))

    def _step(self, first: int, tasks: list[Task]) -> list[tuple[Task, Picked | Exception]]:
        """The same for the rows from `first` on. A pass that fails is taken again over its two halves."""
        try:
            return list(zip(tasks, self.next_tokens(first, tasks), strict=True))
        except Exception as error:
            short = is_out_of_memory(error)
            self._short_of_memory |= short
            if len(tasks) == 1:
                # Without the frames of its traceback, which hold tensors: it is looked at when room is made.
                return [(tasks[0], error.with_traceback(None) if short else error)]
            logger.warning("a step of %d requests failed (%s); it is taken in halves", len(tasks), type(error).__name__)
        half = len(tasks) // 2
        if short:
            self.rows_allowed = max(half, 1)
        self.free_memory()
        return [*self._step(first, tasks[:half]), *self._step(first + half, tasks[half:])]

    def next_tokens(self, first: int, tasks: Sequence[Task]) -> list[Picked]:
        tokens = torch.tensor([[task.stream.ids[-1]] for task in tasks], device=self.model.device)
        embedded = self.model.get_input_embeddings()(tokens)  # (B, 1, D)
        lengths = self.slots.lengths[first : first + len(tasks)]
        positions, mask = self.slots.begin(first, lengths, 1, embedded)
        hidden = self.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
        picks = self.pick(hidden[:, -1], tasks)
        self.slots.end([length + 1 for length in lengths])
        return picks

    # ---- what both do --------------------------------------------------------------------------------------------------------

    def language_model(self, **inputs: Any) -> Tensor:
        """Hidden states (B, L, D) after the last layer; the vocabulary is left to `pick`, for the positions that need it."""
        hidden: Tensor = self.model.get_model()(use_cache=True, past_key_values=self.slots, **inputs).last_hidden_state
        return hidden

    def pick(self, hidden: Tensor, tasks: Sequence[Task]) -> list[Picked]:
        """The next token of each row of (B, D)."""
        logits = self.model.lm_head(hidden).float()
        sampling = [task.request.sampling for task in tasks]
        rows = [Row(wish, task.stream.ids, task.text_ids, task.guide) for task, wish in zip(tasks, sampling, strict=True)]
        uniform = [
            random_number(task.seed, len(task.stream.ids)) if wish.temperature else 0.0 for task, wish in zip(tasks, sampling, strict=True)
        ]
        return pick(logits, sampling, uniform, adjusted(logits, rows, end_ids(self.model)))

    def works(self) -> bool:
        """Whether the model still reads a single position; memory that runs out on the way is another matter."""
        try:
            embedded = self.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
            self.model.lm_head(self.model.get_model()(inputs_embeds=embedded, use_cache=False).last_hidden_state).sum().item()
        except Exception as error:
            logger.exception("the model cannot be computed any more")
            return is_out_of_memory(error)
        return True

    # ---- leave ---------------------------------------------------------------------------------------------------------------

    def leave(self, task: Task, wipe: bool = False) -> None:
        """Take a task out, if it is in; the last one moves into its row. wipe: see `SlotCache.leave`."""
        if task.slot < 0:
            return
        moved = self.slots.leave(task.slot, wipe)
        last = self.tasks.pop()
        assert last.slot == moved, "the batch and its cache disagree about the last row"
        if last is not task:
            self.tasks[task.slot] = last
            last.slot = task.slot
        task.slot = -1

    def empty(self) -> None:
        """Let all go, and the storage."""
        for task in self.tasks:
            task.slot = -1
        self.tasks = []
        self.slots.clear()
        self._short_of_memory = False
        self.free_memory()

    # ---- memory --------------------------------------------------------------------------------------------------------------

    def clean_up(self, short: bool) -> None:
        """After something failed that was done for requests about to join. short: it was memory that ran out."""
        self.slots.wipe_unused()
        self._short_of_memory |= short

    def step_back(self) -> Task | None:
        """After memory ran out in a step for one request: take the youngest out, for the others to go on; `None` where one runs alone."""
        if len(self.tasks) < 2:
            return None
        youngest = max(self.tasks, key=lambda task: task.submitted)
        self.leave(youngest, wipe=True)
        self.rows_allowed = len(self.tasks)
        self.shrink()
        return youngest

    def shrink(self) -> bool:
        """Give back what is kept for requests to come. Returns whether there was anything."""
        try:
            return self.slots.shrink()
        except Exception as error:  # the copy is what does not fit; less was kept all the same
            logger.warning("the storage cannot be made smaller everywhere (%s)", type(error).__name__)
            return True
        finally:
            self.free_memory()

    def make_room(self) -> bool:
        """After memory ran out for a request that was to join alone: answer fewer at the same time. Returns whether it may be tried again
        at once; beside others it has to wait for them."""
        if self.tasks:
            self.rows_allowed = len(self.tasks)
            return False
        if self.rows_allowed == 1:
            return False
        self.rows_allowed //= 2
        self.slots.clear()
        return True

    def grow(self) -> None:
        """An answer went well: one more request may be answered at the same time."""
        self.rows_allowed = min(self.max_rows, self.rows_allowed + 1)

    def relax(self) -> None:
        """Nothing runs: give the storage back if memory was short."""
        if self._short_of_memory:
            self.empty()

    def free_memory(self) -> None:
        if self.model.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # an accelerator that has failed fails at this too; requests are told by what they do there
            logger.exception("the accelerator's memory cannot be given back")


def check_attention(config: Any) -> None:
    """
    Raises:
        ValueError: a model whose attention cannot work on a batch whose rows have different lengths.
    """
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"The attention implementation is {attention}, but this engine's batches need sdpa or eager; choose one.")
    window = getattr(config, "sliding_window", None)
    if window and window < config.context_length:
        raise ValueError(
            f"This model attends to a window of {window} of its {config.context_length} positions, which this engine's batches cannot do; "
            "serve it with another engine behind llava.serve.sglang_worker."
        )
