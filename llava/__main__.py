"""`avg-llava COMMAND [flags]`, also `python -m llava`: one entry point to all programs. Each is the same as with `python -m`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from llava import __version__

COMMANDS = {
    "answer": ("llava.eval.run_llava", "ask a model about images, once"),
    "chat": ("llava.serve.cli", "chat with a model in the terminal"),
    "serve": ("llava.serve.__main__", "serve a model: its OpenAI API and the web page, in one process"),
    "worker": ("llava.serve.model_worker", "serve one model over LLaVA's protocol and the OpenAI API"),
    "bridge": ("llava.serve.sglang_worker", "serve both APIs for a model that SGLang, vLLM or another OpenAI server runs"),
    "controller": ("llava.serve.controller", "forward requests to many workers from one address"),
    "page": ("llava.serve.gradio_web_server", "serve a web page for chatting with the models of a controller or worker"),
    "questions": ("llava.eval.model_vqa", "answer a file of questions"),
    "train": ("llava.train.train", "train one stage"),
    "check": ("llava.train.check", "read every row as training does, and say what is broken"),
    "estimate": ("llava.train.estimate", "estimate parameters, operations and memory of a training run"),
    "score": ("llava.train.score_granularities", "score every row at every granularity, for the router's stage"),
    "convert": ("llava.convert", "convert a checkpoint to another layout: native, LLaVA's or transformers' LLaVA-NeXT"),
    "memory": ("llava.tools.memory", "compute what a model's weights and cache take at every granularity"),
    "merge": ("llava.tools.merge_lora_weights", "merge an adapter and its base model into one checkpoint"),
    "report": ("llava.eval.granularity_report", "report accuracy and cost of every policy for choosing a granularity"),
}
"""Command -> the module of its program, which has `main(argv, prog)`, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    """The command's name, and nothing of what follows it."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="avg-llava",
        usage="avg-llava COMMAND [flags]",
        description=f"commands:\n{commands}\n\navg-llava COMMAND --help shows a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = build_parser().parse_args(arguments[:1]).command
    status: int = importlib.import_module(COMMANDS[command][0]).main(arguments[1:], prog=f"avg-llava {command}")
    return status


if __name__ == "__main__":
    sys.exit(main())
