"""Ctrl-C in the programs that write results: one line that says what is kept, and the status that shells know.

    def main() -> int:
        return run_program(work)            # around everything that the command does

    with keeping(lambda: "3 of 7 parts are kept in parts/; the same command goes on"):
        ...                                 # around the work whose results stay

Programs whose imports take seconds call `hush_imports` before them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended: 128 and the signal's number, as shells count."""


class InterruptedWorkError(KeyboardInterrupt):
    """Ctrl-C within `keeping`; its text says what is kept."""


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Say what is kept where Ctrl-C ends the block; the innermost block's sentence is the one that is said.

    Args:
        kept: gives the sentence, without a full stop, at the moment of the interrupt.

    Raises:
        InterruptedWorkError: Ctrl-C was pressed.
    """
    try:
        yield
    except InterruptedWorkError:
        raise
    except KeyboardInterrupt as error:
        raise InterruptedWorkError(kept()) from error


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's `main`.

    Returns:
        Its status, 0 for `None`; `INTERRUPTED` after Ctrl-C, when one line has been written to standard error, in a distributed run by the
        first process alone. A second Ctrl-C ends the process at once.
    """
    try:
        return main() or 0
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _say(str(error) or "nothing was written")
        return INTERRUPTED


def hush_imports() -> None:
    """Let Ctrl-C while a program is still importing end it with one line and by the signal itself, as a shell expects."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _say(str(error) or "nothing was begun")
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _say(kept: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        end_of_progress_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{end_of_progress_bar}interrupted: {kept}.", file=sys.stderr, flush=True)
