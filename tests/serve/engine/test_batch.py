"""Rows of the running batch, and how many there may be when memory is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from llava.messages import Message
from llava.serve.engine.batch import Batch, check_attention
from llava.serve.engine.caches import TensorCache
from llava.serve.engine.sampling import random_number
from llava.serve.engine.task import Encoded, Task
from llava.serve.protocol import GenerationRequest, Sampling

MODEL = SimpleNamespace(device=torch.device("cpu"))


def batch(rows: int = 4) -> Batch:
    return Batch(MODEL, TensorCache(1000), rows, 1000)


def joined(running: Batch, count: int) -> list[Task]:
    nobody = cast(Any, None)
    tasks = [Task(nobody, nobody, 0.0, nobody, nobody, 0) for _ in range(count)]
    for task in tasks:
        running.join(task)
    running.slots.lengths = [1] * count
    return tasks


def test_the_last_one_takes_the_row_of_one_that_leaves():
    running = batch()
    first, second, third = joined(running, 3)
    running.leave(first)
    running.leave(first)  # it is not in any more
    assert running.tasks == [third, second]
    assert [task.slot for task in (first, second, third)] == [-1, 1, 0]
    running.empty()
    assert running.tasks == [] and {second.slot, third.slot} == {-1}


def test_fewer_are_answered_at_once_when_memory_runs_out_and_more_again_later():
    running = batch(rows=5)
    assert [running.make_room() for _ in range(3)] == [True, True, False]  # alone: room for 2, then 1, then there is nothing to give up
    assert running.rows_allowed == 1
    for _ in range(9):
        running.grow()
    assert running.rows_allowed == 5
    joined(running, 3)
    assert not running.make_room()  # beside others it has to wait
    assert running.rows_allowed == 3


def test_the_storage_is_given_back_once_after_memory_was_short(monkeypatch):
    running, freed = batch(), []
    monkeypatch.setattr(running, "free_memory", lambda: freed.append(True))
    running.relax()
    assert not freed
    running.clean_up(out_of_memory=True)
    running.clean_up(out_of_memory=False)
    running.relax()
    running.relax()
    assert freed == [True]


def test_what_a_step_cannot_do_together_it_does_in_halves(monkeypatch):
    running = batch(rows=8)
    tasks = joined(running, 4)
    taken: list[tuple[int, int]] = []

    def decode(first: int, some: list[Task]) -> list[Any]:
        taken.append((first, len(some)))
        if len(some) > 2:
            raise MemoryError
        if tasks[1] in some:
            raise RuntimeError("odd")
        return ["token"] * len(some)

    monkeypatch.setattr(running, "decode", decode)
    outcomes = running.step()
    assert [task for task, _ in outcomes] == tasks
    assert [outcome if outcome == "token" else type(outcome) for _, outcome in outcomes] == ["token", RuntimeError, "token", "token"]
    assert taken == [(0, 4), (0, 2), (0, 1), (1, 1), (2, 2)]
    assert running.rows_allowed == 2


def test_the_youngest_is_preempted_and_takes_its_storage_along():
    running = batch(rows=8)
    old, young, middle = joined(running, 3)
    old.submitted, young.submitted, middle.submitted = 1.0, 3.0, 2.0
    running.slots._keys, running.slots._values, running.slots.capacity = [torch.ones(8, 2, 64, 3)], [torch.ones(8, 2, 64, 3)], (8, 64)
    assert running.preempt() is young
    assert (running.tasks, young.slot, running.rows_allowed) == ([old, middle], -1, 2)
    assert running.slots.capacity == (2, 64)
    assert running.preempt() is middle
    assert running.preempt() is None and running.tasks == [old]
    assert not running.shrink()  # it has all there is


def test_storage_that_cannot_be_copied_is_smaller_all_the_same(monkeypatch):
    running = batch()
    joined(running, 1)
    running.slots.capacity = (4, 64)

    def short() -> bool:
        raise MemoryError

    monkeypatch.setattr(running.slots, "shrink", short)
    assert running.shrink()


def test_a_prefix_that_is_cached_is_not_copied_again():
    running = batch()
    [task] = joined(running, 1)
    task.was_encoded(Encoded(9, 1, (), (("key", 5), ("shorter", 3)), {}), cast(Any, None))
    running.slots._keys = running.slots._values = [torch.ones(1, 2, 8, 3)]
    running.keep_prefix(task)
    running.keep_prefix(task)
    kept = running.prefixes.get("key")
    assert kept is not None and [tensor.shape for tensor in kept] == [(2, 5, 3)] * 2
    assert "shorter" not in running.prefixes


class Uniform(torch.nn.Module):
    """A language model whose hidden states are its inputs, and whose logits are its hidden states."""

    device = torch.device("cpu")
    answer_logits = torch.nn.Identity()
    generation_config = SimpleNamespace(eos_token_id=3)

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.embed, self.error, self.read = torch.nn.Embedding(4, 4), error, list[Any]()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_model(self) -> Any:
        return self

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> Any:
        self.read.append((tuple(inputs_embeds.shape), use_cache))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def drawing(sampling: Sampling, written: list[int], seed: int = 0) -> Task:
    nobody = cast(Any, None)
    request = GenerationRequest("r", (Message("user", "?"),), sampling=sampling)
    task = Task(request, nobody, 0.0, cast(Any, SimpleNamespace(ids=written)), nobody, seed)
    task.text_ids = torch.tensor([2])
    return task


def test_each_row_is_picked_by_its_own_parameters_answer_and_prompt():
    """The likeliest; not the end while more is wanted; not what is in the answer, nor in the prompt, when that is punished."""
    running = Batch(Uniform(), TensorCache(1000), 4, 1000)
    hidden = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1)
    asked = [
        drawing(Sampling(), [0]),
        drawing(Sampling(min_new_tokens=2), [0]),
        drawing(Sampling(min_new_tokens=2, presence_penalty=2.0), [2]),
        drawing(Sampling(min_new_tokens=2, repetition_penalty=4.0), [0]),
    ]
    assert [picked.token for picked in running.pick(hidden, asked)] == [3, 2, 1, 1]


def test_a_row_draws_with_its_own_number_for_each_place_of_its_answer():
    running, even = Batch(Uniform(), TensorCache(1000), 1, 1000), torch.zeros(1, 4)
    for seed, length in ((0, 0), (0, 1), (0, 2), (7, 0), (7, 1), (9, 5)):
        task = drawing(Sampling(temperature=1.0), [0] * length, seed)
        assert [picked.token for picked in running.pick(even, [task])] == [int(4 * random_number(seed, length))]


@pytest.mark.parametrize(("error", "works"), [(None, True), (MemoryError(), True), (RuntimeError("device-side assert"), False)])
def test_a_model_works_if_it_reads_one_position_or_only_lacks_memory(error, works):
    model = Uniform(error)
    assert Batch(model, TensorCache(1000), 1, 1000).works() is works
    assert model.read == [((1, 1, 4), False)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "is flash_attention_2, but"),
        ({"_attn_implementation": "sdpa", "sliding_window": 100}, "window of 100 of its 4096 positions"),
    ],
)
def test_an_attention_that_cannot_do_rows_of_different_lengths_is_refused(config, sentence):
    text = SimpleNamespace(**config)
    with pytest.raises(ValueError, match=sentence):
        check_attention(SimpleNamespace(get_text_config=lambda: text, context_length=4096))
