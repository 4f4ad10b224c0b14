"""What an exception in the engine means to the one who asked; no other library's text is passed on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

_OURS = (ErrorKind.INTERNAL, ErrorKind.OUT_OF_MEMORY, ErrorKind.NOT_FINITE)
"""Failures that are not the request's fault; the log has what the caller is not told."""

FAILED_TURNS = 8
"""Turns of the engine in a row that may fail, without a token in between, before it is asked whether anything works any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no class of its own for this.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def as_serve_error(error: Exception) -> ServeError:
    """The typed failure behind an exception."""
    if isinstance(error, ServeError):
        return error
    if is_out_of_memory(error):
        return ServeError(ErrorKind.OUT_OF_MEMORY)
    if isinstance(error, FloatingPointError):
        return ServeError(ErrorKind.NOT_FINITE)
    return ServeError(ErrorKind.INTERNAL)


def explain(request_id: str, error: Exception) -> ServeError:
    """What the caller is told; the log gets the rest."""
    failure = as_serve_error(error)
    if failure.kind in _OURS:
        logger.error("request %s failed: %s", request_id, failure.kind.value, exc_info=error)
    return failure


class Health:
    """Whether turning the crank still gets anywhere.

    An accelerator that has failed for good fails at everything, for as long as the process lives; only another process can use it again.
    Failures of requests alone do not prove that, since they may be to blame themselves, one after the other: so then one position is read.
    """

    def __init__(self) -> None:
        self._failed_turns = 0
        self._wrote = self._failed = self._failed_outside = False

    def wrote(self) -> None:
        """A token was written."""
        self._wrote = True

    def failed(self, error: Exception, outside: bool = False) -> None:
        """A pass failed, or something outside of any request. What a request is told of itself, and missing memory, are no failures."""
        if outside or not (isinstance(error, ServeError) or is_out_of_memory(error)):
            self._failed, self._failed_outside = True, self._failed_outside or outside

    def is_lost(self, works: Callable[[], bool]) -> bool:
        """Asked once per turn. works: whether the model can still be computed; asked after `FAILED_TURNS` failed ones."""
        if self._wrote:
            self._failed_turns, self._failed_outside = 0, False
        elif self._failed:
            self._failed_turns += 1
        self._wrote = self._failed = False
        if self._failed_turns < FAILED_TURNS:
            return False
        self._failed_turns = 0
        return self._failed_outside or not works()
