"""`build_vision_projector` under LLaVA's name."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.model.projector import build_projector


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Make a fresh projector, see `llava.model.projector.build_projector`.

    Args:
        config: any object with `mm_hidden_size`, `hidden_size` and `mm_projector_type` ("linear" where it is missing).
        delay_load, kwargs: accepted for LLaVA's callers, which there change nothing either.
    """
    return build_projector(getattr(config, "mm_projector_type", "linear"), config.mm_hidden_size, config.hidden_size)
