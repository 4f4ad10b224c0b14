"""Logging that knows its rank. Needs no torch."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from llava.constants import LOGDIR

_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


class RankFilter(logging.Filter):
    """Let only the first process of a distributed run speak below WARNING, and name the rank of the others.

    The rank is read from `RANK`, which torchrun, deepspeed and accelerate set, when a record is made: a process may
    learn its rank after logging was set up.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is written by this process."""
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0:
            return True
        if record.levelno < logging.WARNING:
            return False
        record.msg = f"[rank {rank}] {record.msg}"
        return True


def setup_logging(level: int | str = logging.INFO) -> None:
    """Send the package's log records to standard error, once, however often it is called.

    Programs call this; library code only asks for `logging.getLogger(__name__)`.

    Args:
        level: lowest level that is written, as a number or a name such as "DEBUG".
    """
    root = logging.getLogger("llava")
    root.setLevel(level)
    if any(isinstance(handler_filter, RankFilter) for handler in root.handlers for handler_filter in handler.filters):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(RankFilter())
    root.addHandler(handler)
    root.propagate = False


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that also writes to a file, begun anew at midnight UTC (LLaVA's name; here the standard streams stay as they are).

    Args:
        logger_filename: file in `llava.constants.LOGDIR`, which is made where it is missing.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    file = Path(LOGDIR, logger_filename).absolute()
    if all(getattr(handler, "baseFilename", None) != str(file) for handler in logger.handlers):
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.TimedRotatingFileHandler(file, when="D", utc=True, encoding="utf-8")
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
    return logger
