"""Isolation of failures: a batch that fails is retried item by item."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class GoneError(OSError):
    """What answers is gone: no item can be processed any more, and trying the others is in vain."""


@dataclass(frozen=True)
class Failure:
    """What was raised, as text: `reason` in one line, `details` with the traceback.

    The exception itself is not kept: its traceback would keep every tensor of the failed batch alive.
    """

    reason: str
    details: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def attempt(
    work: Callable[[Sequence[Item]], Sequence[Outcome]], items: Sequence[Item]
) -> tuple[list[Outcome | None], dict[int, Failure]]:
    """Process a batch; if that fails, process its items one by one, so that a bad item does not fail its neighbours.

    Args:
        work: one outcome per item. Whatever `Exception` it raises is a failure, apart from `GoneError`, which ends the run.

    Returns:
        Outcomes in the order of the items, `None` where one failed, and the failures by index.
    """
    try:
        return list(work(items)), {}
    except GoneError:
        raise
    except Exception as error:  # whatever an image, a prompt or a model may raise: recorded, and the others still get their turn
        failure = Failure.of(error)
    # Only here, after the except block, the exception and the batch's memory are freed: items that ran out of memory may now succeed.
    if len(items) == 1:
        return [None], {0: failure}
    logger.warning("a batch of %d failed, its questions are tried one by one: %s", len(items), failure.reason)
    outcomes: list[Outcome | None] = []
    failures: dict[int, Failure] = {}
    for index, item in enumerate(items):
        (outcome,), failed = attempt(work, [item])
        outcomes.append(outcome)
        if failed:
            failures[index] = failed[0]
    return outcomes, failures
