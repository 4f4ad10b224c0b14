"""Evaluation: one question from the shell, a file of questions in LLaVA's format, and reports of accuracy against cost."""

from __future__ import annotations

import sys

from llava.interrupts import hush_imports

if sys.argv[:1] == ["-m"]:  # Python's own name while it looks for the program of `python -m llava.eval...`; whoever imports us has another
    hush_imports()
