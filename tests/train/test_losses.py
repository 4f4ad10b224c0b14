"""The losses, by record and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.train import losses as L

ORACLE = Path(__file__).parents[1] / "oracle"
RANK_CASES = json.loads((ORACLE / "rank_loss.json").read_text())["cases"]


@pytest.mark.parametrize("case", RANK_CASES)
def test_recorded_ranking_loss(case: dict[str, Any]) -> None:
    logits = torch.tensor(case["sorted_router_logits"], requires_grad=True)
    loss = L.ranking_losses(logits, torch.tensor(case["sorted_llm_losses"]), case["margin"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(case["grad_wrt_logits"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", ["script_settings", "code_defaults"])
def test_recorded_router_loss(settings: str, training_records: dict[str, Any]) -> None:
    weights = {"script_settings": (1.0, 1.0, 0.1), "code_defaults": (0.1, 1.0, 1.0)}[settings]
    for name, record in training_records["stage4"][settings]["batches"].items():
        inputs = training_records["stage4"]["script_settings"]["batches"][name]
        if record["loss"] == "nan":
            continue
        answer_losses = torch.tensor(inputs["llm_loss_rows_samples_cols_granularities"])
        result = L.rglf_losses(torch.tensor(inputs["router_logits"]), answer_losses, *weights)
        assert result.total.mean().item() == pytest.approx(record["loss"], rel=1e-5)
        assert result.ranking.mean().item() == pytest.approx(record["rank_part"], rel=1e-5)
        assert result.cross_entropy.mean().item() == pytest.approx(record["ce_part"], rel=1e-5)
        assert result.best.tolist() == inputs["router_labels"]


def test_ties_go_to_the_coarsest() -> None:
    assert L.rglf_losses(torch.randn(3, 5), torch.ones(3, 5), 1.0).best.tolist() == [0, 0, 0]


def test_cost_by_hand() -> None:
    losses = torch.tensor([[1.0, 0.98, 0.5]])
    tokens = torch.tensor([[10, 20, 40]])
    torch.testing.assert_close(L.cost_adjusted(losses, tokens, 0.1), torch.tensor([[1.0, 1.08, 0.7]]))
    assert L.cost_adjusted(losses, tokens, 0.0) is losses
    assert L.cost_adjusted(losses, tokens, 0.3).argmin(1).item() == 0


def test_cost_is_of_each_samples_own_fewest_tokens() -> None:
    losses = torch.zeros(2, 3, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2], [3, 6, 10]])  # no tokens count as one
    expected = 0.5 * torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, math.log2(10 / 3)]], dtype=torch.float64)
    torch.testing.assert_close(L.cost_adjusted(losses, tokens, 0.5), expected, atol=1e-12, rtol=0)


def test_each_sample_has_its_own_losses_and_the_published_weights_by_default() -> None:
    logits, answers = torch.randn(3, 5), torch.rand(3, 5)
    together = L.rglf_losses(logits, answers, 1.0)
    alone = [L.rglf_losses(logits[row : row + 1], answers[row : row + 1], 1.0) for row in range(3)]
    for name in ("total", "ranking", "cross_entropy", "best"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    torch.testing.assert_close(together.total, together.ranking + 0.1 * together.cross_entropy)


def test_targets_follow_the_logits_to_their_device() -> None:
    assert L.token_losses(torch.zeros(3, 9, device="meta"), torch.tensor([3, 4, 6])).device.type == "meta"


def test_token_losses_and_means_by_hand() -> None:
    logits, targets = torch.randn(3, 9), torch.tensor([3, 4, 6])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(L.token_losses(logits.to(torch.bfloat16).float(), targets), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(L.token_losses(logits, targets), expected)
    assert L.mean_over(torch.tensor(12.0), 3).item() == 4.0 and L.mean_over(torch.tensor(12.0), 0).item() == 0.0
    assert L.mean_over(torch.tensor(12.0), 0.5).item() == 24.0  # fewer things than processes: each counts by their number


class _Largest(TorchDispatchMode):
    """Notes how many rows of width V any tensor that is computed has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.width,):
            self.rows = max(self.rows, result.shape[:-1].numel())
        return result


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 11])
def test_losses_in_chunks_equal_those_at_once_and_never_hold_more_logits(count: int) -> None:
    head = torch.nn.Linear(3, 33, bias=False)
    hidden, targets = torch.randn(count, 3, requires_grad=True), torch.randint(33, (count,))
    weights = torch.rand(count)

    def gradients(losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((losses * weights).sum(), (hidden, head.weight))

    expected = L.token_losses(head(hidden), targets)
    wanted = gradients(expected)
    with _Largest(33) as seen:
        losses = L.token_losses_in_chunks(head, hidden, targets, 4)
        found = gradients(losses)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert seen.rows <= 4


def test_a_chunk_of_logits_fits_into_its_bytes() -> None:
    assert L.tokens_at_once(32_000) == 524 and L.tokens_at_once(2**30) == 1


def test_nothing_to_learn_gives_zero_with_a_gradient() -> None:
    weight = torch.ones(4, 2, requires_grad=True)
    losses = L.token_losses(torch.zeros(0, 4) @ weight, torch.zeros(0, dtype=torch.long))
    loss = L.mean_over(losses.sum(), 0)
    loss.backward()
    assert loss.item() == 0.0 and weight.grad.abs().sum() == 0
    assert L.mean_over(L.rglf_losses(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5), 1.0).total.sum(), 0).item() == 0.0


def test_feedback_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 1.0]])
    losses = torch.tensor([[0.5, 0.9, 0.4], [0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.4, 0.4, 0.4]])
    feedback = L.router_feedback(logits, losses, torch.tensor([[1, 2, 4], [3, 6, 12], [3, 6, 12], [1, 2, 4]]))
    assert feedback.rows == 4 and feedback.chosen == (2, 2, 0) and feedback.agreements == 3
    assert feedback.regret == pytest.approx(0.5) and feedback.visual_tokens == 12
