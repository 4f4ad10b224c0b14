"""Training: four stages from a language model and a vision tower to a model that chooses its visual granularity."""

from __future__ import annotations

import sys

from llava.interrupts import hush_imports

if sys.argv[:1] == ["-m"]:  # Python's own name while it looks for the program of `python -m llava.train...`; whoever imports us has another
    hush_imports()
