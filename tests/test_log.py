"""Logging by rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_llavas_logger_writes_each_record_to_its_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LOGDIR", str(tmp_path / "logs"))
    streams = sys.stdout, sys.stderr
    logger = log.build_logger("test_llavas_logger", "worker.log")
    assert log.build_logger("test_llavas_logger", "worker.log") is logger and len(logger.handlers) == 1
    logger.info("hello %d", 7)
    assert (tmp_path / "logs" / "worker.log").read_text().count("| INFO | test_llavas_logger | hello 7\n") == 1
    assert (sys.stdout, sys.stderr) == streams
    logger.handlers.pop().close()
