"""LLaVA's `disable_torch_init`, and the device to run on."""

from __future__ import annotations

import torch


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
