"""Each row draws by its own parameters and random numbers."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from llava.serve.protocol import Sampling
from llava.serve.sampling import pick

LOGITS = torch.tensor([0.5, 2.0, 1.0, -1.0]).log_softmax(-1)


def draws(sampling: Sampling, count: int = 4000, seed: int = 0) -> Counter[int | None]:
    """How often each token is drawn, all rows from one source of numbers."""
    source = random.Random(seed)
    return Counter(picked.token for picked in pick(LOGITS.expand(count, -1), [sampling] * count, [source] * count))


def test_greedy_takes_the_likeliest_and_no_random_number():
    source = random.Random(3)
    state = source.getstate()
    assert [picked.token for picked in pick(LOGITS.expand(3, -1), [Sampling()] * 3, [source] * 3)] == [1, 1, 1]
    assert source.getstate() == state


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


def test_a_tiny_temperature_is_greedy_and_not_a_division_by_zero():
    assert set(draws(Sampling(temperature=1e-8), 50)) == {1}


def test_a_row_does_not_depend_on_its_neighbours():
    warm, cold = Sampling(temperature=2.0, top_p=0.9, seed=5), Sampling()
    [alone] = pick(LOGITS[None], [warm], [random.Random(5)])
    crowd = pick(torch.stack([LOGITS.flip(0), LOGITS, LOGITS]), [warm, warm, cold], [random.Random(1), random.Random(5), random.Random(5)])
    assert crowd[1] == alone
    assert crowd[2].token == 1


def test_log_probabilities_are_of_temperature_one():
    wanted = [Sampling(logprobs=2, temperature=5.0), Sampling(logprobs=0), Sampling()]
    first, second, third = pick(LOGITS.expand(3, -1), wanted, [random.Random(0)] * 3)
    assert first.log_probability == pytest.approx(float(LOGITS[first.token]))
    assert [token for token, _ in first.alternatives] == [1, 2]
    assert second.log_probability == pytest.approx(float(LOGITS[1])) and second.alternatives == ()
    assert third.log_probability is None


@pytest.mark.parametrize("broken", [[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf"), float("-inf")]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_numbers_are_seen_in_their_own_row(broken, temperature):
    logits = torch.tensor([broken, [0.0, 1.0], [float("-inf"), 1.0]])
    picks = pick(logits, [Sampling(temperature=temperature)] * 3, [random.Random(0)] * 3)
    assert picks[0].token is None
    assert picks[1].token in (0, 1)
    assert picks[2].token == 1
