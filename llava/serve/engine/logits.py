"""Logits processing before a token is sampled, for all rows of a batch at once.

In vLLM's order (`vllm/v1/sample/sampler.py`): the guide's mask, `logit_bias`, the penalties, then `min_new_tokens`. Temperature, `min_p`,
`top_k` and `top_p` follow in `sampling.py`. Rows without such parameters keep their logits bit for bit, and a batch of them costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.serve.engine.guides import AnswerGuide, allowed
from llava.serve.protocol import Sampling


@dataclass(frozen=True)
class Row:
    """An answer whose next token is to be sampled.

    sampling: its parameters. written: ids of the answer so far. prompt: (L,) ids of the prompt's text, without placeholders. guide: what
    constrains the answer, if anything.
    """

    sampling: Sampling
    written: Sequence[int]
    prompt: Tensor
    guide: AnswerGuide | None = None


def adjusted(logits: Tensor, rows: Sequence[Row], ends: Sequence[int]) -> Tensor:
    """The logits that tokens are sampled from.

    Args:
        logits: (B, V) in float32, of the model; not modified. rows: B of them. ends: the model's own end-of-sequence ids.

    Returns:
        (B, V); `logits` itself where no row asks for a change.
    """
    changed = logits
    for change in (_forbid, _add_bias, _penalise):
        changed = change(changed, rows)
    return _hold_back_ends(changed, rows, ends)


def _forbid(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    guided = {place: row.guide for place, row in enumerate(rows) if row.guide is not None}
    if not guided:
        return logits
    places = list(guided)
    own = logits[places].masked_fill(~allowed(list(guided.values()), logits.shape[-1], logits.device), float("-inf"))
    return logits.index_put((torch.tensor(places, device=logits.device),), own)


def _add_bias(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    biases = [(place, token, bias) for place, row in enumerate(rows) for token, bias in row.sampling.logit_bias]
    if not biases:
        return logits
    places, tokens, values = zip(*biases, strict=True)
    where = torch.tensor([places, tokens], device=logits.device)
    return logits.index_put((where[0], where[1]), logits.new_tensor(values), accumulate=True)


def _penalise(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Repetition as in Keskar et al. (2019), section 4.1, over the prompt's text and the answer; the other two over the answer alone, as
    in OpenAI's API. Only the logits of tokens that occurred change."""
    asking = [place for place, row in enumerate(rows) if row.sampling.penalises]
    if not asking:
        return logits
    size, device = logits.shape[-1], logits.device
    written = torch.tensor([token for place in asking for token in rows[place].written], dtype=torch.long, device=device)
    written = _flat_indices(written, asking, [len(rows[place].written) for place in asking], size)
    prompts = torch.cat([rows[place].prompt for place in asking]).to(device)
    prompts = _flat_indices(prompts, asking, [len(rows[place].prompt) for place in asking], size)
    repetition, presence, frequency = (
        logits.new_tensor([getattr(row.sampling, name) for row in rows])
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    changed = logits.flatten().clone()
    seen = torch.cat([written, prompts]).unique()
    factors, own = repetition[seen // size], changed[seen]
    changed[seen] = torch.where(own > 0, own / factors, own * factors)
    written, counts = written.unique(return_counts=True)
    changed[written] -= frequency[written // size] * counts + presence[written // size]
    return changed.view_as(logits)


def _flat_indices(ids: Tensor, rows: Sequence[int], counts: Sequence[int], size: int) -> Tensor:
    """Indices into the flattened (B, V), V = `size`, of ids (N,) that belong to some rows, a given number to each in turn."""
    starts = torch.tensor(rows, device=ids.device) * size
    return ids + starts.repeat_interleave(torch.tensor(counts, device=ids.device), output_size=len(ids))


def _hold_back_ends(logits: Tensor, rows: Sequence[Row], ends: Sequence[int]) -> Tensor:
    """Mask the ends of answers below `min_new_tokens`, unless nothing else could follow."""
    places = [place for place, row in enumerate(rows) if len(row.written) < row.sampling.min_new_tokens]
    held = [(index, end) for index, place in enumerate(places) for end in (*ends, *rows[place].sampling.stop_token_ids)]
    if not held:
        return logits
    own = logits[places]
    where = torch.tensor(held, device=logits.device)
    without = own.index_put((where[:, 0], where[:, 1]), own.new_tensor(float("-inf")))
    goes_on = without.amax(-1, keepdim=True) > float("-inf")
    return logits.index_put((torch.tensor(places, device=logits.device),), torch.where(goes_on, without, own))
