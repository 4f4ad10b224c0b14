"""`python -m llava.serve.model_worker`: serve one model, with or without a controller.

LLaVA's flags and short forms. The worker speaks LLaVA's protocol and the OpenAI API, and needs no controller to be useful.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.flags import OneValue, Parser, add_ignored, add_model_flags
from llava.interrupts import run_program
from llava.serve.http.flag_checks import too_small
from llava.serve.http.listen_address import check_address
from llava.serve.protocol import DEFAULT_CONCURRENCY
from llava.serve.worker_flags import (
    NOT_SERVING_YET,
    add_guard_flags,
    add_network_flags,
    add_stream_interval,
    read_registration,
    read_worker_options,
    start_logging,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llava.serve.engine.embedded import EmbeddedEngine

logger = logging.getLogger("llava.serve.model_worker")  # also when run as a program

PROG = "python -m llava.serve.model_worker"
FIRST = (
    *("--model-path", "--model-base", "--host", "--port", "--controller", "--worker", "--device", "--load-4bit"),
    *("--max-batch-rows", "--api-key-file"),
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager")
IGNORED = {
    "--use-flash-attn": "a batch of requests needs attention masks; --attn-implementation chooses among kernels that take them",
    "--multi-modal": "whether a model takes images is read from its config",
}
"""Flags of LLaVA's worker, and why they change nothing."""


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, "Serve one model over LLaVA's worker protocol and the OpenAI API.", FIRST)
    add_network_flags(parser)
    add_engine_flags(parser)
    add_guard_flags(parser)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Which model is loaded and how, and how many requests it answers together."""
    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument("--model-name", metavar="NAME", help="what clients call it (default: the last part of the path)")
    model.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto is the checkpoint's")
    model.add_argument("--attn-implementation", choices=ATTENTIONS, help="attention of the language model (default: sdpa)")
    add_ignored(model, IGNORED)
    batching = parser.add_argument_group("batching")
    batching.add_argument("--max-batch-rows", "--limit-model-concurrency", dest="max_batch_rows", action=OneValue, type=int,
                          default=DEFAULT_CONCURRENCY, metavar="N", help="requests answered at once")  # fmt: skip
    batching.add_argument("--max-batch-tokens", type=int, metavar="N", help="positions held for all of them (default: four full contexts)")
    batching.add_argument("--cache-mb", type=float, default=256.0, metavar="MB", help="memory for features of images seen before")
    batching.add_argument("--prefix-cache-mb", type=float, default=256.0, metavar="MB",
                          help="memory for prompts prefilled up to the end of their images, for the next question about them")  # fmt: skip
    add_stream_interval(batching, "tokens")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that cannot work.

    Raises:
        ValueError: naming all of them.
    """
    found = too_small(args, dict.fromkeys(("max_batch_rows", "max_batch_tokens", "stream_interval"), 1))
    found += too_small(args, {"cache_mb": 0, "prefix_cache_mb": 0})
    if found:
        raise ValueError("The flags cannot work: " + "; ".join(found) + ".")


def load_engine(args: argparse.Namespace) -> EmbeddedEngine:
    """Load the model that the flags name, and start its engine.

    Raises:
        ValueError: a checkpoint or flags that cannot work. OSError: files that cannot be read.
    """
    from llava.inference import Assistant, micro_model_path
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.engine.embedded import EmbeddedEngine

    path = args.model_path or micro_model_path()
    options: dict[str, Any] = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit, "device": args.device, "dtype": args.dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    name = args.model_name or get_model_name_from_path(path)
    logger.info("loading %s as %r", path, name)
    return EmbeddedEngine(
        Assistant.load(path, args.model_base, **options),
        name,
        max_batch_rows=args.max_batch_rows,
        max_batch_tokens=args.max_batch_tokens,
        max_queue=args.max_queue,
        cache_bytes=int(1e6 * args.cache_mb),
        prefix_cache_bytes=int(1e6 * args.prefix_cache_mb),
        max_images=args.max_images,
    )


def build_app(args: argparse.Namespace) -> FastAPI:
    """The worker's app, its model loaded; everything that can be wrong with the flags is found before that."""
    from llava.serve.api.worker_app import create_worker_app

    check_arguments(args)
    options, registration = read_worker_options(args), read_registration(args)
    check_address(args.host, args.port)
    if args.no_register and args.controller_address:
        logger.info("--no-register: this worker does not register with the controller %s", args.controller_address)
    return create_worker_app(load_engine(args), registration=registration, concurrency=args.max_batch_rows, **options)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: flags or a checkpoint that cannot work. OSError: files that cannot be read.
    """
    from llava.serve.api.worker_app import run_worker

    start_logging(args, logger)
    return run_worker(build_app(args), args.host, args.port, log_level=args.log_level)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: serve(args), nothing_kept=NOT_SERVING_YET)


if __name__ == "__main__":
    sys.exit(main())
