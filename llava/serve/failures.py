"""What an exception in the engine means to the one who asked; no other library's text is passed on."""

from __future__ import annotations

import logging

import torch

from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

_OURS = (ErrorKind.INTERNAL, ErrorKind.OUT_OF_MEMORY, ErrorKind.NOT_FINITE)
"""Failures that are not the request's fault; the log has what the caller is not told."""


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
