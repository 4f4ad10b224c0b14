"""LLaVA's name for the training program; attention kernels are chosen with `--attn_implementation`."""

from __future__ import annotations

from llava.interrupts import hush_imports

hush_imports()

from llava.train.train import main  # noqa: E402  (importing takes seconds)

if __name__ == "__main__":
    main()
