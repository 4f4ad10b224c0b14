"""What went wrong is typed for the caller and written down in full for the operator."""

from __future__ import annotations

import logging

import pytest
import torch

from llava.serve.engine.failures import FAILED_ITERATIONS, Health, as_serve_error, explain, is_out_of_memory
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


def turns(health: Health, *errors: Exception | None, works: bool = False, outside: bool = False) -> list[bool]:
    """Whether all is lost after each of these turns; `None` is one that writes a token."""
    found = []
    for error in errors:
        if error is None:
            health.wrote()
        else:
            health.failed(error, outside)
        found.append(health.is_lost(lambda: works))
    return found


def test_all_is_lost_after_so_many_failed_iterations_in_a_row():
    odd = RuntimeError("odd")
    assert turns(Health(), *[odd] * FAILED_ITERATIONS) == [*[False] * (FAILED_ITERATIONS - 1), True]
    assert not any(turns(Health(), *[odd] * (FAILED_ITERATIONS - 1), None, *[odd] * (FAILED_ITERATIONS - 1)))


def test_failures_that_only_requests_have_are_no_proof():
    odd = RuntimeError("odd")
    assert not any(turns(Health(), *[odd] * 30, works=True))
    assert any(turns(Health(), *[odd] * FAILED_ITERATIONS, works=True, outside=True))
    for no_failure in (MemoryError(), ServeError(ErrorKind.CONTEXT_LENGTH)):
        assert not any(turns(Health(), *[no_failure] * 30))


def test_a_turn_without_anything_counts_as_none():
    health = Health()
    turns(health, *[RuntimeError("odd")] * (FAILED_ITERATIONS - 1))
    assert not any(health.is_lost(lambda: False) for _ in range(5))
    assert turns(health, RuntimeError("odd")) == [True]
