"""How long each part of an answer took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Adds up wall milliseconds per named stage.

    Args:
        device: the device the stages run on; an accelerator is waited for, so that a stage pays for its own work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (self._now() - start)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
