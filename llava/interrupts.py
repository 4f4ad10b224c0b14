"""How programs end: one sentence about an error, one line after Ctrl-C that says what is kept, and the status that shells know.

    def main(argv=None, prog=PROG) -> int:
        args = build_parser(prog).parse_args(argv)
        return run_program(lambda: work(args))   # around everything that the command does, its imports included

    with keeping(lambda: "3 of 7 parts are kept in parts/; the same command goes on"):
        ...                                      # around the work whose results stay
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended: 128 and the signal's number, as shells count."""
EXTRA_MODULES = {
    "serve": (
        *("fastapi", "starlette", "pydantic", "anyio", "uvicorn", "h11", "gradio", "httpx", "httpx_sse", "prometheus_client"),
        "llguidance",
    ),
    "train": ("deepspeed", "peft", "bitsandbytes", "pyarrow", "yaml", "matplotlib", "tensorboard"),
    "vllm": ("vllm",),
    "eval": ("httpx", "easy_vqa", "matplotlib"),
    "playground": ("easy_vqa", "sklearn", "matplotlib", "pyarrow", "yaml"),
}
"""Extra of pyproject.toml -> the modules that it brings."""

_IN_WORKER = re.compile(r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\n.*\n(?:\w+\.)*(?P=kind): (?P<text>.*?)\s*\Z", re.DOTALL)
"""The text that torch gives an error of a data loader's worker: its traceback, whose last error is the one."""


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


def run_program(
    work: Callable[[], int | None],
    errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
    nothing_kept: str = "nothing was written",
) -> int:
    """Run what a program does.

    Args:
        work: returns the exit status, `None` for 0.
        errors: what is reported as one sentence, not as a traceback.
        nothing_kept: what is said after Ctrl-C outside of `keeping`.

    Returns:
        The status: 1 after an error, `INTERRUPTED` after Ctrl-C, either with one line on standard error; in a distributed run the first
        process alone writes that of Ctrl-C. A second Ctrl-C ends the process at once.
    """
    try:
        return work() or 0
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _say(str(error) or nothing_kept)
        return INTERRUPTED
    except errors as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1


def _say(kept: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        end_of_progress_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{end_of_progress_bar}interrupted: {kept}.", file=sys.stderr, flush=True)


def sentence_of(error: Exception) -> str:
    """What a person has to read about an error; of a missing package, the extras that bring it; of one from a data loader's worker, which
    arrives with that process's traceback as its text, the text that it had there."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else None
    extras = [extra for extra, modules in EXTRA_MODULES.items() if missing in modules]
    if not extras:
        in_worker = _IN_WORKER.match(str(error))
        return in_worker["text"] if in_worker else str(error)
    commands = " or ".join(f'pip install -e ".[{extra}]"' for extra in extras)
    return f"{missing} is not installed; install the {' or '.join(extras)} extra: {commands}"
