"""Serving: an engine, workers, a controller, a web page and a terminal chat; docs/Serving.md draws who talks to whom."""

from __future__ import annotations

import sys
from types import TracebackType

_EXTRA = ("fastapi", "starlette", "pydantic", "anyio", "uvicorn", "h11", "gradio", "httpx", "httpx_sse", "openai", "prometheus_client")
"""What the `serve` extra brings."""


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write one sentence about a missing extra, nothing about Ctrl-C, of which the exit status tells, and any other error as ever."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRA:
        print(f'error: {error.name} is not installed; install the serve extra: pip install -e ".[serve]"', file=sys.stderr)
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # Python's own name while it looks for the program of `python -m llava.serve...`; whoever imports us has another
    sys.excepthook = _explain
