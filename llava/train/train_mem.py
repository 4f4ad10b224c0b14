"""LLaVA's name for the training program; attention kernels are chosen with `--attn_implementation`."""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main(prog="python llava/train/train_mem.py"))
