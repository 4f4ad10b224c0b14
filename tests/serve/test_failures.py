"""What went wrong is typed for the caller and written down in full for the operator."""

from __future__ import annotations

import logging

import pytest
import torch

from llava.serve.failures import as_serve_error, explain, is_out_of_memory
from llava.serve.protocol import ErrorKind, ServeError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("/secret/path 0x7f"), ErrorKind.INTERNAL),
        (ValueError("secret"), ErrorKind.INTERNAL),
        (FloatingPointError("secret"), ErrorKind.NOT_FINITE),
        (MemoryError("secret"), ErrorKind.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("secret"), ErrorKind.OUT_OF_MEMORY),
    ],
)
def test_errors_of_other_libraries_are_never_passed_on(error, kind):
    failure = as_serve_error(error)
    assert (failure.kind, str(failure)) == (kind, kind.fault.text)


def test_memory_that_ran_out_is_told_from_other_failures():
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_log_has_what_the_caller_is_not_told(caplog):
    with caplog.at_level(logging.ERROR):
        assert str(explain("r1", RuntimeError("at 0x7f"))) == ErrorKind.INTERNAL.fault.text
        explain("r2", ServeError(ErrorKind.INVALID_REQUEST, "The prompt is empty."))
    [record] = caplog.records
    assert "r1" in record.getMessage() and record.exc_info is not None and "0x7f" in str(record.exc_info[1])
