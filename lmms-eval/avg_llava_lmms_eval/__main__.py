"""The harness's command, with this package's tasks included and an exit code that reports whether it worked.

    python -m avg_llava_lmms_eval --model avg_llava --model_args pretrained=DIR --tasks playground --output_path out

Every flag is the harness's own. Three things differ from `python -m lmms_eval`: the tasks of this package are found without
`--include_path`, and also where a folder has a task's name; a run that failed (a task that does not exist, data that cannot be read,
results that could not be written) exits with 1, where the harness prints the error, or nothing, and exits with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avg_llava_lmms_eval import TASKS
from avg_llava_lmms_eval.saved import look_after_saving


def with_tasks(argv: list[str]) -> list[str]:
    """The command line with this package's tasks, unless it names a folder of its own."""
    named = any(word == "--include_path" or word.startswith("--include_path=") for word in argv)
    return argv if named else [*argv, "--include_path", str(TASKS)]


def past_folders(argv: list[str]) -> list[str]:
    """The command line where a task of this package is meant although a folder has its name.

    The harness takes `--tasks playground` for a folder of tasks wherever there is a folder `playground`, as in the repository; a name
    that is given twice is never read as a folder, and is run once.
    """
    own = {path.stem for path in TASKS.glob("*/*.yaml")}

    def written(name: str) -> str:
        return f"{name},{name}" if name in own and Path(name).is_dir() else name

    words = list(argv)
    for place, word in enumerate(argv):
        if word.startswith("--tasks="):
            words[place] = "--tasks=" + written(word.removeprefix("--tasks="))
        elif place and argv[place - 1] == "--tasks":
            words[place] = written(word)
    return words


def remembering(function: Callable[..., Any], failures: list[Exception]) -> Callable[..., Any]:
    """The function, with what it raises noted on the way."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            failures.append(error)
            raise

    return wrapped


def main() -> int:
    """Run the harness; 0, or 1 if any of its evaluations raised."""
    sys.argv = [sys.argv[0], *with_tasks(past_folders(sys.argv[1:]))]
    from lmms_eval import __main__ as harness
    from lmms_eval.loggers import EvaluationTracker

    failures: list[Exception] = []
    harness.cli_evaluate_single = remembering(harness.cli_evaluate_single, failures)
    look_after_saving(EvaluationTracker, failures)
    if not any(word.split("=")[0] in ("--tasks", "--config", "--help", "-h") for word in sys.argv):
        print("error: no task was named; give --tasks, or --tasks list to see what there is.", file=sys.stderr)
        return 1
    harness.cli_evaluate()
    for error in failures:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
