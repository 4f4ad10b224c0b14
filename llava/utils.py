"""LLaVA's small helpers under their names, and the device to run on."""

from __future__ import annotations

import os
from typing import Any

import torch

from llava.log import build_logger

__all__ = [
    "build_logger", "disable_torch_init", "moderation_msg", "pick_device", "pretty_print_semaphore", "rank0_print", "server_error_msg",
]  # fmt: skip

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."
"""LLaVA's texts, for its callers; nothing in this package shows them."""


def rank0_print(*args: Any) -> None:
    """Print in the first process of a distributed run alone (LLaVA-NeXT's name)."""
    if os.environ.get("RANK", "0") == "0":
        print(*args)


def pretty_print_semaphore(semaphore: Any) -> str:
    """An asyncio semaphore in LLaVA's words, or "None"."""
    return "None" if semaphore is None else f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def disable_torch_init() -> None:
    """Do nothing, on purpose; LLaVA's scripts call this before they load a model.

    It used to replace the initialisers of `torch.nn.Linear` and `LayerNorm` by empty functions, to save the time of
    filling weights that a checkpoint overwrites. transformers 5 creates models without storage and fills each weight
    once, so nothing is left to save, while the patch would leave any layer made later in the process uninitialised.
    """


def pick_device() -> str:
    """Return the best device of this machine: "cuda", else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
