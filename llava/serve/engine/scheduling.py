"""Which requests join the running ones, when, and with whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llava.serve.engine.task import Task

_PREFILL_POSITIONS = 8192
"""Positions, padding included, that one prefill works on at most, so that running answers do not wait long for it."""
_STEPS_FOR_COMPANY = 2
_PADDING_SHARE, _PADDING = 0.15, 32
"""Padding that one prefill may add: this share of its prompts' own positions, and a few."""


class Company:
    """When waiting requests are taken in.

    A request waits for company for at most two steps of the running ones; for none where nothing runs, or where as many wait as run or as
    there are free places. The reason: encoding and prefill hold the running ones up for one request as long as for several.
    """

    def __init__(self) -> None:
        self._passed_over = 0  # steps since the first of those that wait came

    def enough(self, waiting: int, running: int, free: int) -> bool:
        """Whether to take requests in before the next step; asked once per step."""
        if not waiting:
            return False
        self._passed_over += 1
        if running and waiting < min(free, running) and self._passed_over <= _STEPS_FOR_COMPANY:
            return False
        self._passed_over = 0
        return True


def admit(ready: deque[Task], running: Sequence[Task], max_rows: int, max_positions: int) -> list[Task]:
    """Take those out of the ready requests that fit beside the running ones, first come first served.

    Args:
        max_rows: requests at the same time. max_positions: rows times the longest row; one request alone may have more.
    """
    joining: list[Task] = []
    longest = max((task.encoded.positions for task in running), default=0)
    unread = 0
    while ready:
        task = ready[0]
        others = len(running) + len(joining)
        longest, unread = max(longest, task.encoded.positions), max(unread, task.unread.row.length)
        rows = others + 1
        if rows > max_rows or (others and rows * longest > max_positions):
            break
        if joining and (len(joining) + 1) * unread > _PREFILL_POSITIONS:
            break
        joining.append(ready.popleft())
    return joining


def of_similar_length(tasks: Sequence[Task]) -> list[list[Task]]:
    """Groups of requests whose unread prompts can be padded to one length at little cost, shortest first, the known ones apart."""
    groups: list[list[Task]] = []
    used = 0
    for task in sorted(tasks, key=lambda task: (bool(task.unread.known), task.unread.row.length)):
        length = task.unread.row.length
        alike = bool(groups) and bool(groups[-1][0].unread.known) == bool(task.unread.known)
        if alike and (len(groups[-1]) + 1) * length <= (1 + _PADDING_SHARE) * (used + length) + _PADDING:
            groups[-1].append(task)
            used += length
        else:
            groups.append([task])
            used = length
    return groups
