"""Which requests are encoded and prefilled, when, and together with which others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llava.serve.engine.task import Task

_PREFILL_POSITIONS = 8192
"""Most positions of one prefill, padding included, so that running answers do not wait long for it."""
_MAX_DELAY_STEPS = 2
_PADDING_SHARE, _PADDING = 0.15, 32
"""Padding that one prefill may add: a share of its prompts' positions, and a few positions more."""


class BatchingDelay:
    """How long waiting requests are held back so that several are encoded and prefilled together.

    At most two decoding steps; not at all where nothing runs, or where as many requests wait as run or as there are free rows. Encoding and
    prefill delay the running requests by about as much for one request as for several.
    """

    def __init__(self) -> None:
        self._steps_waited = 0  # decoding steps since the first waiting request came

    def is_over(self, waiting: int, running: int, free: int) -> bool:
        """Whether to encode waiting requests before the next decoding step; asked once per step."""
        if not waiting:
            return False
        self._steps_waited += 1
        if running and waiting < min(free, running) and self._steps_waited <= _MAX_DELAY_STEPS:
            return False
        self._steps_waited = 0
        return True


def admit(ready: deque[Task], running: Sequence[Task], max_rows: int, max_positions: int) -> list[Task]:
    """Pop the ready requests that fit beside the running ones, first come, first served.

    Args:
        max_rows: of the batch. max_positions: rows times the longest row; a request that runs alone may take more.
    """
    joining: list[Task] = []
    longest = max((task.encoded.positions for task in running), default=0)
    longest_prefill = 0
    while ready:
        task = ready[0]
        others = len(running) + len(joining)
        longest, longest_prefill = max(longest, task.encoded.positions), max(longest_prefill, task.pending.row.length)
        rows = others + 1
        if rows > max_rows or (others and rows * longest > max_positions):
            break
        if joining and (len(joining) + 1) * longest_prefill > _PREFILL_POSITIONS:
            break
        joining.append(ready.popleft())
    return joining


def of_similar_length(tasks: Sequence[Task]) -> list[list[Task]]:
    """Groups of requests whose prefills can be padded to one length at little cost, shortest first; those with a cached prefix apart."""
    groups: list[list[Task]] = []
    used = 0
    for task in sorted(tasks, key=lambda task: (bool(task.pending.prefix), task.pending.row.length)):
        length = task.pending.row.length
        alike = bool(groups) and bool(groups[-1][0].pending.prefix) == bool(task.pending.prefix)
        if alike and (len(groups[-1]) + 1) * length <= (1 + _PADDING_SHARE) * (used + length) + _PADDING:
            groups[-1].append(task)
            used += length
        else:
            groups.append([task])
            used = length
    return groups
