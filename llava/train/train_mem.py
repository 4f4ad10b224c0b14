"""LLaVA's name for the training program; attention kernels are chosen with `--attn_implementation`."""

from __future__ import annotations

from llava.train.train import main

if __name__ == "__main__":
    main()
