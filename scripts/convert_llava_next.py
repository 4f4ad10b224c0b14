"""Convert checkpoints between transformers' `LlavaNextForConditionalGeneration` and this project's LLaVA layout: `llava.tools`.

    python scripts/convert_llava_next.py --direction to-llava --source llava-next --output avg --conv-version v1
    python scripts/convert_llava_next.py --direction to-transformers --source avg --output llava-next
"""

from __future__ import annotations

import sys

from llava.tools.convert_llava_next import main

if __name__ == "__main__":
    sys.exit(main())
