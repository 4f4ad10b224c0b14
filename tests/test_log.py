"""Logging by rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from llava import log


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("llava")
    before = list(logger.handlers), logger.level, logger.propagate
    logger.handlers = []
    yield logger
    logger.handlers, logger.level, logger.propagate = before


def test_setting_up_twice_writes_each_record_once(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.setup_logging()
    log.setup_logging("DEBUG")
    logging.getLogger("llava.test").debug("hello %d", 7)
    assert capsys.readouterr().err.count("hello 7") == 1


def test_other_ranks_only_warn_and_say_who_they_are(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.setup_logging()
    monkeypatch.setenv("RANK", "3")
    logging.getLogger("llava.test").info("quiet")
    logging.getLogger("llava.test").warning("loud")
    written = capsys.readouterr().err
    assert "quiet" not in written
    assert "[rank 3] loud" in written
