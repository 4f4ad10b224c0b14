"""The losses of the four stages, as pure functions of tensors.

"The paper" is arXiv 2410.02745. The model, the trainer and files are unknown here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""Vocabulary logits that exist at one time: 64 MiB in float32, 524 tokens of a vocabulary of 32,000."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of T tokens in float32, (T,), from their logits (T, V) and targets (T,)."""
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits exist at one time, for a vocabulary of this size."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def token_losses_in_chunks(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Cross-entropy of T tokens, (T,), that never holds the logits of more than `chunk` of them.

    Where a gradient is wanted, the logits of each chunk are computed again in the backward pass, so that memory does not depend on how
    long the answers of a batch are. Up to `chunk` tokens nothing is computed twice.

    Args:
        head: hidden states (t, D) to logits (t, V).
        hidden: (T, D).
        targets: (T,).
        chunk: tokens, at least 1.
    """

    def losses(states: Tensor, wanted: Tensor) -> Tensor:
        return token_losses(head(states), wanted)

    if len(hidden) <= chunk:
        return losses(hidden, targets)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(losses, states, wanted, use_reentrant=False) for states, wanted in pieces])


def mean_over(total: Tensor, count: float) -> Tensor:
    """The mean of `count` items from their sum; 0, with a gradient of 0, where there are none."""
    return total / count if count > 0 else 0.0 * total


def cost_adjusted(losses: Tensor, visual_tokens: Tensor, cost_weight: float) -> Tensor:
    """Add the price of visual tokens, `cost_weight * log2(tokens / fewest)`, to the losses that the router ranks.

    Args:
        losses: (N, G) answer loss of every sample at every granularity.
        visual_tokens: (N, G) visual tokens of every sample at every granularity.
        cost_weight: nats per doubling of the tokens; 0 is the paper.
    """
    if cost_weight == 0:
        return losses
    tokens = visual_tokens.to(losses.dtype).clamp(min=1)
    return losses + cost_weight * torch.log2(tokens / tokens.min(dim=1, keepdim=True).values)


def ranking_losses(sorted_logits: Tensor, sorted_losses: Tensor, margin: float) -> Tensor:
    """Pairwise hinge that pushes the logit of a better granularity above that of a worse one (RGLF), one value per sample.

    For ranks i < j the margin is `margin * (j - i) * (loss_j - loss_i)`. Pairs of equal distance are averaged, and
    the distances are summed.

    Args:
        sorted_logits: (N, G) router logits in the order of `sorted_losses`.
        sorted_losses: (N, G) losses, smallest first.
        margin: scale of the margins.

    Returns:
        (N,); the published loss is their mean.
    """
    total = sorted_logits.new_zeros(sorted_logits.shape[0])
    for distance in range(1, sorted_logits.shape[1]):
        wanted = margin * distance * (sorted_losses[:, distance:] - sorted_losses[:, :-distance])
        gap = sorted_logits[:, :-distance] - sorted_logits[:, distance:]
        total = total + F.relu(wanted - gap).mean(dim=1)
    return total


@dataclass(frozen=True)
class RouterLosses:
    """The stage-4 losses of N samples and their parts, with the best granularity of each; the published losses are their means.

    Attributes:
        total: (N,) weighted sum, to differentiate.
        ranking: (N,) ranking part, unweighted.
        cross_entropy: (N,) cross-entropy part, unweighted.
        best: (N,) index of the granularity ranked first.
    """

    total: Tensor
    ranking: Tensor
    cross_entropy: Tensor
    best: Tensor


def rglf_losses(
    router_logits: Tensor,
    answer_losses: Tensor,
    margin: float,
    rank_loss_weight: float = 1.0,
    ce_loss_weight: float = 0.1,
) -> RouterLosses:
    """Ranking granularity to align LMM feedback.

    Args:
        router_logits: (N, G) with a gradient.
        answer_losses: (N, G) constants to rank by; ties go to the coarser granularity.
        margin: scale of the ranking margins.
        rank_loss_weight: weight of the ranking part.
        ce_loss_weight: weight of the cross-entropy against the best granularity.
    """
    logits = router_logits.float()
    ordered, order = torch.sort(answer_losses.detach().float(), dim=1, stable=True)
    ranking = ranking_losses(logits.gather(1, order), ordered, margin)
    best = order[:, 0]
    cross_entropy = F.cross_entropy(logits, best, reduction="none")
    total = rank_loss_weight * ranking + ce_loss_weight * cross_entropy
    return RouterLosses(total, ranking.detach(), cross_entropy.detach(), best)


@dataclass(frozen=True)
class RouterFeedback:
    """How good the router's choices are, for the log: sums over `rows` samples.

    Attributes:
        rows: samples counted.
        chosen: how often each granularity was chosen, (G,).
        agreements: how often the best granularity was chosen.
        regret: loss of the choice above the loss of the best, summed (in nats).
        visual_tokens: visual tokens of the choices, summed.
    """

    rows: int
    chosen: tuple[int, ...]
    agreements: int
    regret: float
    visual_tokens: float


def router_feedback(router_logits: Tensor, ranked_losses: Tensor, visual_tokens: Tensor) -> RouterFeedback:
    """Compare the router's choices with the best granularities.

    Args:
        router_logits: (N, G).
        ranked_losses: (N, G) the losses that the router is trained to rank, the cost of tokens included.
        visual_tokens: (N, G).
    """
    choice = router_logits.detach().argmax(dim=1, keepdim=True)
    best = ranked_losses.sort(dim=1, stable=True).indices[:, :1]
    regret = ranked_losses.gather(1, choice) - ranked_losses.gather(1, best)
    counts = torch.bincount(choice.flatten(), minlength=router_logits.shape[1])
    return RouterFeedback(
        rows=router_logits.shape[0],
        chosen=tuple(int(count) for count in counts),
        agreements=int((choice == best).sum()),
        regret=float(regret.sum()),
        visual_tokens=float(visual_tokens.gather(1, choice).sum()),
    )


