"""Batches whose failures are their own questions' alone: what fails together is tried again one by one."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Failure:
    """What was raised, as text: `reason` in one line, `details` with the traceback.

    The exception itself is not kept, since its traceback holds every tensor of the batch that failed.
    """

    reason: str
    details: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def attempt(
    work: Callable[[Sequence[Item]], Sequence[Outcome]], items: Sequence[Item]
) -> tuple[list[Outcome | None], dict[int, Failure]]:
    """Do a batch; where that fails, do its items one by one, so that one bad item does not take its neighbours along.

    Args:
        work: one outcome per item. Whatever `Exception` it raises is a failure.

    Returns:
        Outcomes in the order of the items, `None` where one failed, and the failures by index.
    """
    try:
        return list(work(items)), {}
    except Exception as error:  # whatever a picture, a prompt or a model may raise: noted, and the others are still asked
        failure = Failure.of(error)
    # Only here, behind the except block, the error and with it the batch's memory are gone: what failed for lack of it may now succeed.
    if len(items) == 1:
        return [None], {0: failure}
    logger.warning("a batch of %d failed and is asked one by one: %s", len(items), failure.reason)
    outcomes: list[Outcome | None] = []
    failures: dict[int, Failure] = {}
    for index, item in enumerate(items):
        (outcome,), failed = attempt(work, [item])
        outcomes.append(outcome)
        if failed:
            failures[index] = failed[0]
    return outcomes, failures
