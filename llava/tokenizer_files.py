"""What the files of a tokenizer may hold, judged before transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.checkpoint_files import MOST_INDEX_BYTES, read_object, stored_file
from llava.rules import Anything, Choice, Either, Flag, Integer, ListOf, Mapped, Number, Rule, Text, faults, optional, refuse

TOKEN = optional(Either(Text(), Anything()))
"""A special token: its text, or an object that holds it under `content`."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

CONFIG_RULES: dict[str, Rule] = {
    **dict.fromkeys(SPECIAL_TOKENS, TOKEN),
    "model_max_length": optional(Number(1, 1e31)),
    "padding_side": optional(Choice(("left", "right"))),
    "truncation_side": optional(Choice(("left", "right"))),
    "tokenizer_class": optional(Text()),
    "processor_class": optional(Text()),
    "legacy": optional(Flag()),
    "add_bos_token": optional(Flag()),
    "add_eos_token": optional(Flag()),
    "add_prefix_space": optional(Flag()),
    "clean_up_tokenization_spaces": optional(Flag()),
    "split_special_tokens": optional(Flag()),
    "use_default_system_prompt": optional(Flag()),
    "chat_template": optional(Either(Text(longest=2**20), Either(Anything(), ListOf(Anything())))),
    "added_tokens_decoder": optional(Mapped(Anything())),
    "additional_special_tokens": optional(ListOf(Either(Text(), Anything()))),
    "extra_special_tokens": optional(Either(Mapped(Either(Text(), Anything())), ListOf(Either(Text(), Anything())))),
    "sp_model_kwargs": optional(Anything()),
    "auto_map": optional(Either(Anything(), ListOf(optional(Text())))),
    "backend": optional(Text()),
}
"""Fields of tokenizer_config.json; special_tokens_map.json has the tokens among them."""

BACKEND_RULES: dict[str, Rule] = {
    "version": Text(),
    "model": Anything(),
    "added_tokens": ListOf(Anything(), 0, 2**20),
    "truncation": optional(Anything()),
    "padding": optional(Anything()),
    "normalizer": optional(Anything()),
    "pre_tokenizer": optional(Anything()),
    "post_processor": optional(Anything()),
    "decoder": optional(Anything()),
}
"""Fields of tokenizer.json."""

SCORED = ListOf(ListOf(Either(Text(), Number(-1e9, 1e9)), 2, 2), 1, 2**24)
MODEL_RULES: dict[str, Rule] = {"vocab": Either(Mapped(Integer(), 2**24), SCORED)}
"""Fields of the model in tokenizer.json: pieces and ids, or, of a unigram model, pieces and scores."""


def check_tokenizer_files(path: Any, hub: Mapping[str, Any]) -> None:
    """Refuse files that no tokenizer can be made of.

    Args:
        path: a folder or hub id. hub: transformers' options for it.

    Raises:
        ValueError: naming the file and every such field.
    """
    for name, rules in (("tokenizer_config.json", CONFIG_RULES), ("special_tokens_map.json", CONFIG_RULES)):
        if (file := stored_file(path, name, hub)) is not None:
            stored = read_object(file)
            found = faults(stored, rules)
            refuse(file, found or _contents(stored))
    if (file := stored_file(path, "tokenizer.json", hub)) is not None:
        _check_backend(file)


def _contents(stored: Mapping[str, Any]) -> list[str]:
    """Faults of tokens that are written as objects, and of the ids of added ones."""
    found = []
    for name, token in stored.items():
        if name in SPECIAL_TOKENS and isinstance(token, Mapping):
            found += faults({"content": token.get("content")}, {"content": Text()}, name)
    for number, token in (stored.get("added_tokens_decoder") or {}).items():
        if not (number.isascii() and number.isdecimal() and len(number) < 9):
            found.append(f"added_tokens_decoder has the id {number[:40]!r}, expected a whole number")
        found += faults({"content": token.get("content")}, {"content": Text()}, f"added_tokens_decoder.{number[:40]}")
    return found


def _check_backend(file: Path) -> None:
    stored = read_object(file, MOST_INDEX_BYTES)
    found = faults(stored, BACKEND_RULES) if "model" in stored else ["it has no model"]
    if not found:
        found = faults(stored["model"], MODEL_RULES, "model")
        for token in stored.get("added_tokens", ()):
            needed: dict[str, Rule] = {"id": Integer(0, 2**26), "content": Text()}
            found += faults({name: token.get(name) for name in needed}, needed, "added_tokens")
    refuse(file, found)
