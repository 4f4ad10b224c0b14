"""`python -m llava.train.dataset`: a door to the program in `llava.train.check`."""

from __future__ import annotations

from llava.train.check import main

if __name__ == "__main__":
    main()
