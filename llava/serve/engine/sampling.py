"""From a batch of logits to one token per row, each under its own sampling parameters.

Temperature first, then `min_p`, `top_k` and `top_p`, in vLLM's order. A row's token depends on its own logits, parameters and random number
alone, never on its place or its neighbours.
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
    """The token sampled for one row.

    token: id, or `None` where the row's logits are not finite. log_probability: of that token, at temperature 1, where requested.
    alternatives: (id, log probability) of the most likely tokens, where requested.
    """

    token: int | None
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def random_number(seed: int | str, place: int) -> float:
    """The number in [0, 1) for the token at a place of an answer: the same whenever, and however often, that token is computed."""
    return random.Random(f"{seed}/{place}").random()


def pick(logits: Tensor, sampling: Sequence[Sampling], uniform: Sequence[float], adjusted: Tensor | None = None) -> list[Picked]:
    """Pick the next token of every row.

    Args:
        logits: (B, V) of the model; log probabilities are theirs. sampling: B parameters. uniform: B random numbers in [0, 1); greedy rows
            ignore theirs. adjusted: (B, V) to sample from, where it differs.

    Returns:
        B picks.
    """
    logits = logits.float()
    adjusted = logits if adjusted is None else adjusted
    best, tokens = adjusted.max(-1)
    # Masked tokens are -inf on purpose; a row of nothing else, or with nan or +inf, is broken, and its maximum shows it.
    usable = best.isfinite() if adjusted is logits else best.isfinite() & logits.amax(-1).isfinite()
    works = usable.tolist()
    drawn = [row for row, params in enumerate(sampling) if params.temperature > 0 and works[row]]
    if drawn:
        tokens[drawn] = _draw(adjusted[drawn], [sampling[row] for row in drawn], [uniform[row] for row in drawn])
    chosen = tokens.tolist()
    scores = _scores(logits, chosen, sampling)
    return [Picked(None) if not works[row] else Picked(token, *scores.get(row, ())) for row, token in enumerate(chosen)]


def _draw(logits: Tensor, sampling: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """(B,) tokens: each row's cumulative distribution, cut by `min_p`, `top_k` and `top_p`, inverted at the row's random number."""
    temperature = logits.new_tensor([params.temperature for params in sampling])
    # Subtracting the maximum first keeps tiny temperatures finite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    cumulative = probabilities.cumsum(-1)
    least, share = _least(probabilities, sampling), logits.new_tensor([params.top_p for params in sampling])[:, None]
    if least is None:
        kept = (cumulative - probabilities) < share  # always keeps the most likely token
    else:  # top_p is a share of what is left
        left = probabilities >= least
        share = torch.where(least > 0, share * (probabilities * left).sum(-1, keepdim=True), share)
        kept = left & ((cumulative - probabilities) < share)
    mass = (probabilities * kept).sum(-1, keepdim=True)
    target = logits.new_tensor(uniform)[:, None] * mass
    places = torch.searchsorted(cumulative, target, right=True).clamp(max=kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, places)[:, 0]


def _least(probabilities: Tensor, sampling: Sequence[Sampling]) -> Tensor | None:
    """(B, 1): the smallest probability that `min_p` and `top_k` keep of each row of (B, V) in descending order; `None` if all keep all.

    Tokens as likely as the last of the `top_k` are kept too, as in transformers and vLLM.
    """
    if not any(params.top_k or params.min_p for params in sampling):  # every cut made below has to be named here too
        return None
    last = probabilities.shape[-1] - 1
    place = torch.tensor([min(params.top_k - 1, last) if params.top_k else last for params in sampling], device=probabilities.device)
    of_k = probabilities.gather(-1, place[:, None])
    of_k = torch.where(place[:, None] == last, 0.0, of_k)
    return torch.maximum(of_k, probabilities.new_tensor([params.min_p for params in sampling])[:, None] * probabilities[:, :1])


def _scores(logits: Tensor, chosen: Sequence[int], sampling: Sequence[Sampling]) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log probability and alternatives, by row, where requested."""
    rows = [row for row, params in enumerate(sampling) if params.logprobs is not None]
    if not rows:
        return {}
    log_probabilities = logits[rows].log_softmax(-1)
    scores = {}
    for own, row in zip(log_probabilities, rows, strict=True):
        values, ids = own.topk(sampling[row].logprobs or 0)
        scores[row] = (float(own[chosen[row]]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
    return scores
