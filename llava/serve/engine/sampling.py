"""From a batch of logits to one token per row, each row under its own sampling parameters.

Temperature first, then `min_p`, `top_k` and `top_p`, in vLLM's order. A row's draw depends on its own logits, parameters and random number
alone: neither its place nor its neighbours change it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.serve.protocol import Sampling


@dataclass(frozen=True)
class Picked:
    """One row's token.

    token: id, or `None` where the row's logits are not finite. log_probability: of it, at temperature 1, where asked for.
    alternatives: (id, log probability) of the likeliest tokens, where asked for.
    """

    token: int | None
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def random_number(seed: int | str, place: int) -> float:
    """A number in [0, 1) for the token at a place of an answer: the same whenever, and however often, that token is computed."""
    return random.Random(f"{seed}/{place}").random()


def pick(logits: Tensor, sampling: Sequence[Sampling], uniform: Sequence[float], adjusted: Tensor | None = None) -> list[Picked]:
    """Pick the next token of every row.

    Args:
        logits: (B, V) of the model; log probabilities are theirs. sampling: B parameters. uniform: B random numbers in [0, 1); a greedy
            row does not look at its own. adjusted: (B, V) that tokens are drawn from, where they differ.

    Returns:
        B picks.
    """
    logits = logits.float()
    adjusted = logits if adjusted is None else adjusted
    best, tokens = adjusted.max(-1)
    # Masked tokens are -inf on purpose; a row of nothing else, or with nan or +inf, has broken down: whichever it is wins the maximum.
    usable = best.isfinite() if adjusted is logits else best.isfinite() & logits.amax(-1).isfinite()
    works = usable.tolist()
    drawn = [row for row, wish in enumerate(sampling) if wish.temperature > 0 and works[row]]
    if drawn:
        tokens[drawn] = _draw(adjusted[drawn], [sampling[row] for row in drawn], [uniform[row] for row in drawn])
    chosen = tokens.tolist()
    scores = _scores(logits, chosen, sampling)
    return [Picked(None) if not works[row] else Picked(token, *scores.get(row, ())) for row, token in enumerate(chosen)]


def _draw(logits: Tensor, sampling: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """(B,) tokens by inverting each row's cumulative distribution, cut to the likeliest that `min_p`, `top_k` and `top_p` leave, at its own
    random number."""
    temperature = logits.new_tensor([wish.temperature for wish in sampling])
    # Taking the maximum away first keeps tiny temperatures finite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    cumulative = probabilities.cumsum(-1)
    least, share = _least(probabilities, sampling), logits.new_tensor([wish.top_p for wish in sampling])[:, None]
    if least is None:
        kept = (cumulative - probabilities) < share  # always the likeliest
    else:  # the share is one of what is left
        left = probabilities >= least
        share = torch.where(least > 0, share * (probabilities * left).sum(-1, keepdim=True), share)
        kept = left & ((cumulative - probabilities) < share)
    mass = (probabilities * kept).sum(-1, keepdim=True)
    target = logits.new_tensor(uniform)[:, None] * mass
    places = torch.searchsorted(cumulative, target, right=True).clamp(max=kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, places)[:, 0]


def _least(probabilities: Tensor, sampling: Sequence[Sampling]) -> Tensor | None:
    """(B, 1): the smallest probability that `min_p` and `top_k` leave of each row of (B, V), the likeliest first; `None` if all leave all.

    Tokens as likely as the last of the `top_k` stay too, as in transformers and vLLM.
    """
    if not any(wish.top_k or wish.min_p for wish in sampling):
        return None
    last = probabilities.shape[-1] - 1
    place = torch.tensor([min(wish.top_k - 1, last) if wish.top_k else last for wish in sampling], device=probabilities.device)
    of_k = probabilities.gather(-1, place[:, None])
    of_k = torch.where(place[:, None] == last, 0.0, of_k)
    return torch.maximum(of_k, probabilities.new_tensor([wish.min_p for wish in sampling])[:, None] * probabilities[:, :1])


def _scores(logits: Tensor, chosen: Sequence[int], sampling: Sequence[Sampling]) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log probability and alternatives of the rows that ask for them."""
    rows = [row for row, wish in enumerate(sampling) if wish.logprobs is not None]
    if not rows:
        return {}
    log_probabilities = logits[rows].log_softmax(-1)
    scores = {}
    for own, row in zip(log_probabilities, rows, strict=True):
        values, ids = own.topk(sampling[row].logprobs or 0)
        scores[row] = (float(own[chosen[row]]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
    return scores
