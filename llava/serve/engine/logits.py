"""What requests ask to be changed of the model's logits before a token is drawn, for all rows of a batch at once.

In vLLM's order (`vllm/v1/sample/sampler.py`): what a guide forbids, `logit_bias`, the penalties, then ends are held back that come too
early. Temperature, `min_p`, `top_k` and `top_p` follow in `sampling.py`. A row that asks for nothing keeps its logits to the bit, and a
batch in which nobody asks costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.serve.engine.guides import AnswerGuide, allowed
from llava.serve.protocol import Sampling


@dataclass(frozen=True)
class Row:
    """What is known of an answer when its next token is drawn.

    sampling: what was asked. written: ids of the answer so far. prompt: (L,) ids of the prompt's text, placeholders left out. guide: what
    the answer has to be, where it has to be something.
    """

    sampling: Sampling
    written: Sequence[int]
    prompt: Tensor
    guide: AnswerGuide | None = None


def adjusted(logits: Tensor, rows: Sequence[Row], ends: Sequence[int]) -> Tensor:
    """The logits that tokens are drawn from.

    Args:
        logits: (B, V) in float32, of the model; left as they are. rows: B of them. ends: ids that are the model's own end.

    Returns:
        (B, V); `logits` itself where nothing is asked for.
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
    in OpenAI's API. Only the logits of tokens that are there are touched."""
    asking = [place for place, row in enumerate(rows) if row.sampling.penalises]
    if not asking:
        return logits
    size, device = logits.shape[-1], logits.device
    written = _places({place: torch.tensor(rows[place].written, dtype=torch.long) for place in asking}, size, device)
    prompts = _places({place: rows[place].prompt for place in asking}, size, device)
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


def _places(ids: Mapping[int, Tensor], size: int, device: torch.device) -> Tensor:
    """Where the tokens of rows stand in (B, V) laid out flat, from the ids by row."""
    return torch.cat([own.to(device) + row * size for row, own in ids.items()])


def _hold_back_ends(logits: Tensor, rows: Sequence[Row], ends: Sequence[int]) -> Tensor:
    """Without the ends of answers that are to be longer, as long as they can go on with something else."""
    places = [place for place, row in enumerate(rows) if len(row.written) < row.sampling.min_new_tokens]
    held = [(index, end) for index, place in enumerate(places) for end in (*ends, *rows[place].sampling.stop_token_ids)]
    if not held:
        return logits
    own = logits[places]
    where = torch.tensor(held, device=logits.device)
    without = own.index_put((where[:, 0], where[:, 1]), own.new_tensor(float("-inf")))
    goes_on = without.amax(-1, keepdim=True) > float("-inf")
    return logits.index_put((torch.tensor(places, device=logits.device),), torch.where(goes_on, without, own))
