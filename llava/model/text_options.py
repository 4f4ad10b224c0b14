"""The text options of `AvgLlavaProcessor` (padding, truncation, tensors or lists), and how they make one batch of its prompts' ids.

The options have the names and meanings that transformers' processors give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX

_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "processor_kwargs")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "return_token_type_ids": (False,),
    "return_mm_token_type_ids": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "is_split_into_words": (False,),
    "split_special_tokens": (False,),
    "sanitize_control_tokens": (False, True),  # holds always where messages are tokenised
    "stride": (0,),
    "verbose": (False, True),
    "do_convert_rgb": (True,),
}
"""Further options of transformers' processors, each with the values that are accepted because they change nothing here; so is `None`."""


@dataclass(frozen=True)
class TextOptions:
    """How prompts of different lengths are cut, padded and returned.

    Attributes:
        return_tensors: "pt", or `None` for lists of ids.
        padding: `True` or "longest" pads the rows to one length, "max_length" to `max_length`; generation takes either side.
        padding_side: "left" or "right"; by default the tokenizer's.
        pad_to_multiple_of: the padded length is rounded up to a multiple of it.
        truncation: cut rows to `max_length` ids, the tokenizer's own length by default; an image counts as one and is never cut off.
        max_length: with `truncation` or with padding to it.
        add_special_tokens: whether a row begins with what the tokenizer puts in front of every text.
        return_attention_mask: whether the batch has one.

    Raises:
        ValueError: a value that is none of these, by name.
    """

    return_tensors: str | None = None
    padding: bool | str = False
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None
    truncation: bool | str = False
    max_length: int | None = None
    add_special_tokens: bool = True
    return_attention_mask: bool = True

    def __post_init__(self) -> None:
        choices = {
            "return_tensors": (None, "pt"),
            "padding": (True, False, "longest", "max_length", "do_not_pad"),
            "padding_side": (None, "left", "right"),
            "truncation": (True, False, "longest_first", "only_first", "do_not_truncate"),
            "add_special_tokens": (True, False),
            "return_attention_mask": (True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, allowed))}.")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1.")
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding is 'max_length', but max_length is None; give both.")


def read_options(options: Mapping[str, Any]) -> TextOptions:
    """The options of a processor's call, given one by one or by group (`text_kwargs`).

    Raises:
        ValueError: an option that is not known, or a value that `TextOptions` refuses.
    """
    alone = {name: value for name, value in options.items() if name not in _GROUPS}
    grouped = {name: value for group in _GROUPS for name, value in (options.get(group) or {}).items()}
    given = {name: value for name, value in {**alone, **grouped}.items() if value is not None}
    known = {field.name for field in fields(TextOptions)}
    unknown = sorted(name for name, value in given.items() if name not in known and value not in _NEUTRAL.get(name, ()))
    if unknown:
        raise ValueError(f"The processor cannot do what is asked for by {', '.join(unknown)}; leave it out.")
    return TextOptions(**{name: value for name, value in given.items() if name in known})


def stack_rows(rows: list[list[int]], tokenizer: Any, options: TextOptions) -> dict[str, Any]:
    """Ids and mask of the rows, as lists or as tensors (B, L).

    Args:
        rows: ids, each row with what the tokenizer puts in front of every text.

    Raises:
        ValueError: rows of different lengths for one tensor, or an image that would be cut off.
    """
    if not options.add_special_tokens:
        begin = 1 if tokenizer.bos_token_id is not None and list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id] else 0
        rows = [row[begin:] for row in rows]
    if options.truncation not in (False, "do_not_truncate"):
        rows = [_cut(row, options.max_length or tokenizer.model_max_length, tokenizer.truncation_side) for row in rows]
    lengths = [len(row) for row in rows]
    masks = [[1] * length for length in lengths]
    if options.padding not in (False, "do_not_pad"):
        side = options.padding_side or tokenizer.padding_side
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        length = _padded_length(lengths, options)
        rows, masks = [_pad(row, length, fill, side) for row in rows], [_pad(row, length, 0, side) for row in masks]
    data: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
    if options.return_tensors is not None:
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"The prompts have {lengths} tokens, which do not stack; pass padding=True.")
        data = {name: torch.tensor(values) for name, values in data.items()}
    return data if options.return_attention_mask else {"input_ids": data["input_ids"]}


def _padded_length(lengths: list[int], options: TextOptions) -> int:
    longest = max(lengths)
    if options.padding == "max_length":
        longest = max(longest, options.max_length or 0)
    step = options.pad_to_multiple_of or 1
    return math.ceil(longest / step) * step


def _pad(row: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _cut(row: list[int], length: int, side: str) -> list[int]:
    kept = row[-length:] if side == "left" else row[:length]
    if kept.count(IMAGE_TOKEN_INDEX) != row.count(IMAGE_TOKEN_INDEX):
        raise ValueError(f"A prompt has {len(row)} tokens, and cutting it to {length} would cut an image off; raise max_length.")
    return kept
