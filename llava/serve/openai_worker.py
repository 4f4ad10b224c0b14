"""`python -m llava.serve.openai_worker`: the bridge to any server with the OpenAI API, `llava.serve.sglang_worker` under another name."""

from __future__ import annotations

import sys

from llava.serve.sglang_worker import main

PROG = "python -m llava.serve.openai_worker"

if __name__ == "__main__":
    sys.exit(main(prog=PROG))
