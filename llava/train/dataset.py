"""`python -m llava.train.dataset`: an entry point to the program in `llava.train.check`."""

from __future__ import annotations

import sys

from llava.train.check import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m llava.train.dataset"))
