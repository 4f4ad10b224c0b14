"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.constants import MICRO_MODEL
from tests.micro import llava_micro_folder


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of the recorded reference numbers; its README says what each file holds."""
    return Path(__file__).parent / "oracle"


@pytest.fixture(scope="session")
def native_micro() -> Path:
    """The shipped micro model, in the native layout."""
    return MICRO_MODEL


@pytest.fixture(scope="session")
def llava_micro() -> Path:
    """The same in LLaVA's layout."""
    return llava_micro_folder()


@pytest.fixture(autouse=True)
def _programs_leave_no_log_handler() -> Iterator[None]:
    """A program that a test runs in this process logs to the standard error of that test, which is closed afterwards."""
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in map(logging.getLogger, ("llava", "uvicorn"))]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Takes Ctrl-C, also where these tests run in the background, and puts back the handler that a program gives up after its first."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
