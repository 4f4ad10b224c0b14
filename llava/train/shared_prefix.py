"""Scores rows about the same images behind one reading of what they have in common.

Questions about an image begin alike: the system text, the image, perhaps more. The language model reads that once per granularity and keeps
its keys and values; what follows in each row is then read in one sequence, in which every row sees the beginning and itself. Rows of a few
words behind an image of thousands of visual tokens cost little more than one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from llava.constants import IGNORE_INDEX
from llava.model.memory import has_known_cache
from llava.model.splice import check_context, prompt_rows

POSITIONS_AT_ONCE = 1024
"""Positions behind the shared beginning that are read together, if they are several rows'; their attention mask has this many lines."""


def shared_prefix(batch: dict[str, Any]) -> int:
    """How many ids the rows of a batch have in common, all of their images and no supervised id among them; 0 if that cannot be.

    Args:
        batch: from `llava.train.data.Collator`.
    """
    rows = prompt_rows(batch["input_ids"], batch["attention_mask"], batch["labels"])
    per_row, keys = batch["images_per_row"], batch["image_keys"]
    of_first = keys[: per_row[0]]
    if len(rows) < 2 or not of_first or keys != of_first * len(rows):
        return 0
    shortest = min(len(row.ids) for row in rows)
    ids, labels = (torch.stack([tensor[:shortest] for tensor in tensors]) for tensors in ([r.ids for r in rows], [r.labels for r in rows]))
    ends = ((ids != ids[0]) | (labels != IGNORE_INDEX)).any(dim=0).nonzero()
    count = int(ends[0]) if len(ends) else shortest
    return count if rows[0].is_image[:count].sum() == len(of_first) else 0


def reads_behind_a_prefix(model: Any, length: int) -> bool:
    """Whether a model's attention can be told what each position sees, in rows of this length: flash attention takes no mask, and one
    that is given takes the place of a sliding window's. Layers without keys and values cannot be told."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return has_known_cache(text) and not is_flash_attention_requested(config=model.config) and (window is None or length <= window)


def hidden_states_behind_a_prefix(
    model: Any, batch: dict[str, Any], features: Sequence[Tensor], levels: Sequence[int], prefix: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The last hidden states that predict the supervised ids of each row at each granularity.

    Args:
        features: (C, P, D) of the first row's images, or of all rows' in their order.
        levels: visual tokens per view of the granularities.
        prefix: from `shared_prefix`.

    Yields:
        (row, index of the level, (T, D) hidden states, (T,) ids).

    Raises:
        ContextLengthError: a row longer than the context.
    """
    rows = prompt_rows(batch["input_ids"], batch["attention_mask"], batch["labels"])
    images = batch["images_per_row"][0]
    first = rows[0]
    spliced = model.splice_levels(
        first.ids[None, :prefix], None, first.labels[None, :prefix], features[:images], batch["image_sizes"][:images], levels
    )
    for column, (beginning,) in enumerate(spliced):
        lengths = [beginning.length + len(row.ids) - prefix for row in rows]
        check_context([row.num_text_tokens for row in rows], lengths, model.config.context_length)
        # The last shared position is read again with each row, because it predicts the row's own first id.
        shared, last = beginning.inputs_embeds[:-1], beginning.inputs_embeds[-1:]
        cache = model.model(inputs_embeds=shared[None], use_cache=True).past_key_values
        for numbers in _groups([len(row.ids) - prefix for row in rows]):
            own = [rows[number] for number in numbers]
            embeds = [torch.cat([last, model.embed_text(row.ids[prefix:]).to(last.dtype)]) for row in own]
            hidden = _read(model, embeds, cache, len(shared))
            cache.crop(len(shared) - cache.get_seq_length())
            for number, row, states in zip(numbers, own, hidden, strict=True):
                ids = row.labels[prefix:]
                asked = ids != IGNORE_INDEX
                yield number, column, states[:-1][asked], ids[asked]


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows to read together, in their order."""
    group: list[int] = []
    for number, length in enumerate(lengths):
        if group and sum(lengths[each] for each in group) + length > POSITIONS_AT_ONCE:
            yield group
            group = []
        group.append(number)
    yield group


def _read(model: Any, rows: Sequence[Tensor], cache: Any, start: int) -> Sequence[Tensor]:
    """Hidden states (L, D) of each of some rows (L, D), which follow `start` cached positions and do not see each other."""
    embeds = torch.cat(list(rows))
    device, lengths = embeds.device, torch.tensor([len(row) for row in rows])
    owner = torch.arange(len(rows)).repeat_interleave(lengths).to(device)
    within = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
    sees = (owner[:, None] == owner) & (within[:, None] >= within)
    hidden_from = torch.zeros(len(embeds), start + len(embeds), dtype=embeds.dtype, device=device)
    hidden_from[:, start:].masked_fill_(~sees, torch.finfo(embeds.dtype).min)
    states = model.model(
        inputs_embeds=embeds[None],
        attention_mask=hidden_from[None, None],
        position_ids=(start + within)[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[0]
    return states.split(lengths.tolist())
