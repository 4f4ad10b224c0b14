"""What an exception in the engine means to the caller; no text of other libraries is passed on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

_OURS = (ErrorKind.INTERNAL, ErrorKind.OUT_OF_MEMORY, ErrorKind.NOT_FINITE)
"""Failures that are not the request's fault; their cause is logged and not sent."""

FAILED_ITERATIONS = 8
"""Failed iterations of the scheduler in a row, without a token in between, after which the model itself is probed."""


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
    """The error that the caller gets; the log gets the rest."""
    failure = as_serve_error(error)
    if failure.kind in _OURS:
        logger.error("request %s failed: %s", request_id, failure.kind.value, exc_info=error)
    return failure


class Health:
    """Whether the engine still makes progress.

    An accelerator that has failed for good fails every operation for as long as the process lives; only another process can use it again.
    Failing requests alone do not prove that, since each may fail by its own fault: after enough of them the model is probed with one
    position.
    """

    def __init__(self) -> None:
        self._failed_iterations = 0
        self._wrote = self._failed = self._failed_outside = False

    def wrote(self) -> None:
        """A token was written."""
        self._wrote = True

    def failed(self, error: Exception, outside: bool = False) -> None:
        """A pass failed, or something outside of any request did. Errors that are the request's own, and missing memory, do not count."""
        if outside or not (isinstance(error, ServeError) or is_out_of_memory(error)):
            self._failed, self._failed_outside = True, self._failed_outside or outside

    def is_lost(self, works: Callable[[], bool]) -> bool:
        """Whether the engine has to close; asked once per iteration. works: probes the model, after `FAILED_ITERATIONS` failed ones."""
        if self._wrote:
            self._failed_iterations, self._failed_outside = 0, False
        elif self._failed:
            self._failed_iterations += 1
        self._wrote = self._failed = False
        if self._failed_iterations < FAILED_ITERATIONS:
            return False
        self._failed_iterations = 0
        return self._failed_outside or not works()
