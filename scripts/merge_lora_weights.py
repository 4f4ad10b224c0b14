"""Merge an adapter folder (LoRA or QLoRA) into the model underneath and write a full checkpoint: `llava.tools`.

    python scripts/merge_lora_weights.py --model-path avg-lora --model-base vicuna-7b --save-model-path avg-merged
"""

from __future__ import annotations

import sys

from llava.tools.merge_lora_weights import main

if __name__ == "__main__":
    sys.exit(main())
