"""The running batch: which request is in which slot, and the passes through the language model."""

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
        model: the multimodal language model.
        prefixes: cache of keys and values of prompts up to the end of their images.
        max_rows: requests at the same time. max_positions: rows times positions of the key-value storage.

    Attributes:
        tasks: by slot. rows_allowed: requests at the same time for now; it falls when memory runs out, and grows back.
    """

    def __init__(self, model: Any, prefixes: TensorCache, max_rows: int, max_positions: int) -> None:
        self.model, self.prefixes, self.max_rows = model, prefixes, max_rows
        self.slots = SlotCache(max_rows, max_positions)
        self.tasks: list[Task] = []
        self.rows_allowed = max_rows
        self._short_of_memory = False

    # ---- prefill -------------------------------------------------------------------------------------------------------------

    def prefill(self, tasks: Sequence[Task]) -> list[Picked]:
        """Prefill prompts into the slots behind the running ones; the first token of each. They join with `join`."""
        rows = [task.pending.row for task in tasks]
        first, prefixes = len(self.tasks), [task.pending.prefix_length for task in tasks]
        embeds = pad_rows(rows, "right").inputs_embeds
        needed = max(task.encoded.positions for task in (*self.tasks, *tasks))
        self.slots.reserve(first + len(tasks), max(needed, max(prefixes) + embeds.shape[1]), self.rows_allowed)
        for row, task in enumerate(tasks, start=first):
            if task.pending.prefix:
                self.slots.load_prefix(row, task.pending.prefix)
        positions, mask = self.slots.begin(first, prefixes, embeds.shape[1], embeds)
        hidden = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        last = torch.tensor([row.length - 1 for row in rows], device=hidden.device)
        picks = self.pick(hidden[torch.arange(len(rows), device=hidden.device), last], tasks)
        self.slots.end([task.length for task in tasks])
        return picks

    def join(self, task: Task) -> None:
        """Take in the next of the requests that were prefilled."""
        task.slot = len(self.tasks)
        self.tasks.append(task)

    def keep_prefix(self, task: Task) -> None:
        """Cache the keys and values up to the end of the last image, for the next question about it."""
        prefixes = task.encoded.prefixes
        if not prefixes or prefixes[0][0] in self.prefixes:
            return
        key, length = prefixes[0]
        try:
            self.prefixes.put(key, *self.slots.prefix(task.slot, length))
        except Exception as error:  # most likely out of memory; the request itself is fine
            logger.warning("the prefix of request %s is not cached (%s)", task.name, type(error).__name__)

    # ---- decode --------------------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Task, Picked | Exception]]:
        """One decoding step: the next token of every running request, or its error for one that fails by itself."""
        return self._step(0, list(self.tasks))

    def _step(self, first: int, tasks: list[Task]) -> list[tuple[Task, Picked | Exception]]:
        """The same for the rows from `first` on. A pass that fails is repeated over its two halves."""
        try:
            return list(zip(tasks, self.decode(first, tasks), strict=True))
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            self._short_of_memory |= out_of_memory
            if len(tasks) == 1:
                # Without its traceback, whose frames hold tensors: memory is about to be freed.
                return [(tasks[0], error.with_traceback(None) if out_of_memory else error)]
            logger.warning("a decoding step of %d requests failed (%s); it is repeated in halves", len(tasks), type(error).__name__)
        half = len(tasks) // 2
        if out_of_memory:
            self.rows_allowed = max(half, 1)
        self.free_memory()
        return [*self._step(first, tasks[:half]), *self._step(first + half, tasks[half:])]

    def decode(self, first: int, tasks: Sequence[Task]) -> list[Picked]:
        tokens = torch.tensor([[task.stream.ids[-1]] for task in tasks], device=self.model.device)
        embedded = self.model.get_input_embeddings()(tokens)  # (B, 1, D)
        lengths = self.slots.lengths[first : first + len(tasks)]
        positions, mask = self.slots.begin(first, lengths, 1, embedded)
        hidden = self.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
        picks = self.pick(hidden[:, -1], tasks)
        self.slots.end([length + 1 for length in lengths])
        return picks

    # ---- both ----------------------------------------------------------------------------------------------------------------

    def language_model(self, **inputs: Any) -> Tensor:
        """Hidden states (B, L, D) after the last layer; vocabulary logits are left to `pick`, for the positions that need them."""
        hidden: Tensor = self.model.get_model()(use_cache=True, past_key_values=self.slots, **inputs).last_hidden_state
        return hidden

    def pick(self, hidden: Tensor, tasks: Sequence[Task]) -> list[Picked]:
        """The next token of each row, from its last hidden state: (B, D)."""
        logits = self.model.answer_logits(hidden).float()
        sampling = [task.request.sampling for task in tasks]
        rows = [Row(task.request.sampling, task.stream.ids, task.text_ids, task.guide) for task in tasks]
        uniform = [random_number(task.seed, len(task.stream.ids)) if task.request.sampling.temperature else 0.0 for task in tasks]
        return pick(logits, sampling, uniform, adjusted(logits, rows, end_ids(self.model)))

    def works(self) -> bool:
        """Whether the model can still compute a single position; running out of memory does not count against it."""
        try:
            embedded = self.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
            self.model.answer_logits(self.model.get_model()(inputs_embeds=embedded, use_cache=False).last_hidden_state).sum().item()
        except Exception as error:
            logger.exception("the model can no longer be computed")
            return is_out_of_memory(error)
        return True

    # ---- leave ---------------------------------------------------------------------------------------------------------------

    def leave(self, task: Task, wipe: bool = False) -> None:
        """Take a task out, if it is in; the last one moves into its slot. wipe: see `SlotCache.leave`."""
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
        """Take all tasks out, and free the storage."""
        for task in self.tasks:
            task.slot = -1
        self.tasks = []
        self.slots.clear()
        self._short_of_memory = False
        self.free_memory()

    # ---- memory --------------------------------------------------------------------------------------------------------------

    def clean_up(self, out_of_memory: bool) -> None:
        """After work for requests about to join failed. out_of_memory: for lack of memory."""
        self.slots.wipe_unused()
        self._short_of_memory |= out_of_memory

    def preempt(self) -> Task | None:
        """After memory ran out in a step of a single request: take the youngest out, so that the others go on; `None` where one runs
        alone."""
        if len(self.tasks) < 2:
            return None
        youngest = max(self.tasks, key=lambda task: task.submitted)
        self.leave(youngest, wipe=True)
        self.rows_allowed = len(self.tasks)
        self.shrink()
        return youngest

    def shrink(self) -> bool:
        """Free the storage of unused rows. Returns whether there was any."""
        try:
            return self.slots.shrink()
        except Exception as error:  # a copy did not fit; what was copied before it is smaller all the same
            logger.warning("not all of the storage could be made smaller (%s)", type(error).__name__)
            return True
        finally:
            self.free_memory()

    def make_room(self) -> bool:
        """After memory ran out for a request that was to join alone: allow fewer rows. Returns whether to retry at once; beside running
        requests it has to wait for them."""
        if self.tasks:
            self.rows_allowed = len(self.tasks)
            return False
        if self.rows_allowed == 1:
            return False
        self.rows_allowed //= 2
        self.slots.clear()
        return True

    def grow(self) -> None:
        """After a finished answer: allow one more row."""
        self.rows_allowed = min(self.max_rows, self.rows_allowed + 1)

    def relax(self) -> None:
        """When nothing runs: free the storage if memory was short."""
        if self._short_of_memory:
            self.empty()

    def free_memory(self) -> None:
        if self.model.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # an accelerator that has failed fails here too; requests fail by their own passes
            logger.exception("the accelerator's cached memory cannot be freed")


def check_attention(config: Any) -> None:
    """
    Args:
        config: the model's configuration.

    Raises:
        ValueError: the model's attention does not support rows of different lengths.
    """
    text = config.get_text_config()
    attention = text._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"The attention implementation is {attention}, but this engine's batches need sdpa or eager; choose one.")
    window = getattr(text, "sliding_window", None)
    if window and window < config.context_length:
        raise ValueError(
            f"This model attends to a window of {window} of its {config.context_length} positions, which this engine's batches cannot do; "
            "serve it with another engine behind llava.serve.sglang_worker."
        )
