"""Each row draws by its own parameters and random numbers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava.serve.engine.sampling import pick, random_number
from llava.serve.protocol import Sampling

LOGITS = torch.tensor([0.5, 2.0, 1.0, -1.0]).log_softmax(-1)


def draws(sampling: Sampling, count: int = 4000, seed: int = 0) -> Counter[int | None]:
    """How often each token is drawn."""
    source = random.Random(seed)
    numbers = [source.random() for _ in range(count)]
    return Counter(picked.token for picked in pick(LOGITS.expand(count, -1), [sampling] * count, numbers))


def test_greedy_takes_the_likeliest_whatever_the_number():
    assert [picked.token for picked in pick(LOGITS.expand(3, -1), [Sampling()] * 3, [0.0, 0.5, 0.99])] == [1, 1, 1]


def test_a_token_has_its_own_number_however_often_it_is_computed():
    assert random_number(7, 3) == random_number(7, 3)
    assert len({random_number(seed, place) for seed in range(5) for place in range(5)}) == 25
    assert 0 <= random_number("x", 0) < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    counts = draws(Sampling(temperature=temperature))
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_top_p_keeps_the_likeliest_that_reach_it():
    probabilities = LOGITS.softmax(-1)  # in order 1, 2, 0, 3
    assert set(draws(Sampling(temperature=1.0, top_p=float(probabilities[1]) - 0.01))) == {1}
    assert set(draws(Sampling(temperature=1.0, top_p=float(probabilities[1]) + 0.01))) == {1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=1.0))) == {0, 1, 2, 3}


WARPED = [
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_k=1),
    Sampling(temperature=1.0, top_k=10**6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=2.0, top_p=0.6),
    Sampling(temperature=1.5, min_p=0.05, top_k=8, top_p=0.7),
    Sampling(temperature=2.0, min_p=0.3, top_k=3, top_p=0.99),
    Sampling(temperature=0.9, top_k=4, top_p=0.5),
]


def warped(logits: torch.Tensor, params: Sampling) -> torch.Tensor:
    """(V,) probabilities as transformers' own processors leave them, in vLLM's order."""
    steps = [TemperatureLogitsWarper(params.temperature), MinPLogitsWarper(params.min_p), TopKLogitsWarper(params.top_k or 10**6)]
    scores = logits[None].clone()
    for step in (*steps, TopPLogitsWarper(params.top_p)):
        scores = step(None, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("params", WARPED)
def test_what_is_drawn_from_is_what_transformers_own_processors_leave(params):
    """Drawn at evenly spaced numbers, each token comes as often as its share of them."""
    logits = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    expected, count = warped(logits, params), 4000
    found = Counter(picked.token for picked in pick(logits.expand(count, -1), [params] * count, [(n + 0.5) / count for n in range(count)]))
    assert set((expected > 1 / count).nonzero()[:, 0].tolist()) <= set(found) <= set(expected.nonzero()[:, 0].tolist())
    for token, share in enumerate(expected.tolist()):
        assert found[token] == pytest.approx(count * share, abs=1.01)


def test_tokens_as_likely_as_the_last_of_the_top_k_stay():
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0])
    numbers = [n / 100 for n in range(100)]
    assert {picked.token for picked in pick(logits.expand(100, -1), [Sampling(1.0, top_k=2)] * 100, numbers)} == {0, 1, 2}


def test_a_batch_of_different_cuts_is_its_rows():
    all_params = [*WARPED, Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=0.3), Sampling(top_k=3, min_p=0.5)] * 3
    logits = 2 * torch.randn(len(all_params), 40, generator=torch.Generator().manual_seed(4))
    dice = random.Random(5)
    numbers = [dice.random() for _ in all_params]
    alone = [pick(own[None], [params], [number])[0] for own, params, number in zip(logits, all_params, numbers, strict=True)]
    assert pick(logits, all_params, numbers) == alone


def test_log_probabilities_stay_the_models_where_something_else_is_drawn_from():
    raw = LOGITS[None]
    changed = torch.tensor([[float("-inf"), float("-inf"), float("-inf"), 1.0]])
    [picked] = pick(raw, [Sampling(logprobs=1, top_k=1, temperature=1.0)], [0.5], changed)
    assert picked.token == 3 and picked.log_probability == pytest.approx(float(LOGITS[3]))
    assert [token for token, _ in picked.alternatives] == [1]


def test_a_broken_row_is_seen_behind_what_hides_it():
    broken = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]])
    hidden = torch.tensor([[float("-inf"), 1.0], [0.0, 1.0]])
    assert [picked.token for picked in pick(broken, [Sampling()] * 2, [0.0] * 2, hidden)] == [None, 1]


def test_a_tiny_temperature_is_greedy_and_not_a_division_by_zero():
    assert set(draws(Sampling(temperature=1e-8), 50)) == {1}


def test_a_row_does_not_depend_on_its_neighbours():
    warm, cold = Sampling(temperature=2.0, top_p=0.9, seed=5), Sampling()
    [alone] = pick(LOGITS[None], [warm], [0.8])
    crowd = pick(torch.stack([LOGITS.flip(0), LOGITS, LOGITS]), [warm, warm, cold], [0.1, 0.8, 0.8])
    assert crowd[1] == alone
    assert crowd[2].token == 1


def test_log_probabilities_are_of_temperature_one():
    wanted = [Sampling(logprobs=2, temperature=5.0), Sampling(logprobs=0), Sampling()]
    first, second, third = pick(LOGITS.expand(3, -1), wanted, [0.5] * 3)
    assert first.log_probability == pytest.approx(float(LOGITS[first.token]))
    assert [token for token, _ in first.alternatives] == [1, 2]
    assert second.log_probability == pytest.approx(float(LOGITS[1])) and second.alternatives == ()
    assert third.log_probability is None


@pytest.mark.parametrize("broken", [[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf"), float("-inf")]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_numbers_are_seen_in_their_own_row(broken, temperature):
    logits = torch.tensor([broken, [0.0, 1.0], [float("-inf"), 1.0]])
    picks = pick(logits, [Sampling(temperature=temperature)] * 3, [0.5] * 3)
    assert picks[0].token is None
    assert picks[1].token in (0, 1)
    assert picks[2].token == 1


def test_what_is_broken_is_what_three_looks_at_the_whole_row_find():
    """The maximum alone tells: nan and then +inf win it, and -inf does where there is nothing else."""
    nan, inf = float("nan"), float("inf")
    rows = list(product([nan, inf, -inf, 0.0, 3.0, -3.0, 65504.0], repeat=3))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = torch.tensor(rows, dtype=dtype)
        broken = logits.isnan().any(-1) | logits.isposinf().any(-1) | ~logits.isfinite().any(-1)
        expected = [None if bad else token for bad, token in zip(broken.tolist(), logits.float().argmax(-1).tolist(), strict=True)]
        assert [picked.token for picked in pick(logits, [Sampling()] * len(rows), [0.5] * len(rows))] == expected
    assert None in expected and {0, 1, 2} <= set(expected)
