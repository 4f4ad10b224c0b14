"""`python -m llava.serve.model_worker`: serve one model, with or without a controller.

LLaVA's flags and short forms. The worker speaks LLaVA's protocol and the OpenAI API, and needs no controller to be useful.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from fastapi import FastAPI

from llava.inference import Assistant, micro_model_path
from llava.mm_utils import get_model_name_from_path
from llava.serve.api.worker_app import DEFAULT_CONCURRENCY, create_worker_app, run_worker
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.http.flag_checks import too_small
from llava.serve.http.listen_address import check_address
from llava.serve.http.server import run_program
from llava.serve.worker_flags import add_guard_flags, add_network_flags, read_api_keys, read_limits, read_registration, start_logging

logger = logging.getLogger("llava.serve.model_worker")  # also when run as a program

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager")


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.model_worker", description="Serve one model over LLaVA's worker protocol and the OpenAI API."
    )
    add_network_flags(parser)
    add_model_flags(parser)
    add_batch_flags(parser)
    add_guard_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model is loaded, and how."""
    group = parser.add_argument_group("model")
    group.add_argument("--model-path", help="checkpoint folder or hub id; the shipped micro model when missing")
    group.add_argument("--model-base", help="language model of a projector-only or adapter folder")
    group.add_argument("--model-name", help="what clients call it (default: the last part of the path)")
    group.add_argument("--device", help="cuda, mps or cpu; the best that is there when missing; CUDA_VISIBLE_DEVICES chooses GPUs")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto is the checkpoint's (default)")
    group.add_argument("--attn-implementation", choices=ATTENTIONS, help="attention of the language model (default: sdpa)")
    group.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    group.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")
    group.add_argument("--use-flash-attn", action="store_true", help="refused: the batching engine needs sdpa or eager attention")
    group.add_argument("--multi-modal", action="store_true", help="LLaVA's old flag: says that it changes nothing, the config decides")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """How many requests are answered together."""
    group = parser.add_argument_group("batching")
    group.add_argument("--max-batch-rows", type=int, help=f"requests answered at once (default: {DEFAULT_CONCURRENCY})")
    group.add_argument("--limit-model-concurrency", type=int, metavar="N", help="LLaVA's name of --max-batch-rows")
    group.add_argument("--max-batch-tokens", type=int, help="positions held for all of them (default: four full contexts)")
    group.add_argument("--cache-mb", type=float, default=256.0, help="memory for features of pictures seen before (default: %(default)g)")
    group.add_argument(
        "--prefix-cache-mb",
        type=float,
        default=256.0,
        help="memory for prompts read up to the end of their pictures, for the next question about them (default: %(default)g)",
    )
    group.add_argument("--stream-interval", type=int, default=1, help="tokens between two parts of a stream (default: %(default)s)")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that contradict one another or cannot work.

    Raises:
        ValueError: naming all of them.
    """
    found = []
    if args.use_flash_attn:
        found.append("--use-flash-attn is given, but the batching engine needs attention masks; use --attn-implementation sdpa")
    if None not in (args.max_batch_rows, args.limit_model_concurrency) and args.max_batch_rows != args.limit_model_concurrency:
        found.append(
            f"--max-batch-rows is {args.max_batch_rows} and --limit-model-concurrency {args.limit_model_concurrency}; they mean the same"
        )
    found += too_small(args, dict.fromkeys(("max_batch_rows", "limit_model_concurrency", "max_batch_tokens", "stream_interval"), 1))
    found += too_small(args, {"cache_mb": 0, "prefix_cache_mb": 0})
    if found:
        raise ValueError("The flags cannot work: " + "; ".join(found) + ".")


def load_engine(args: argparse.Namespace) -> EmbeddedEngine:
    """Load the model that the flags name, and start its engine.

    Raises:
        ValueError: a checkpoint or flags that cannot work. OSError: files that cannot be read.
    """
    path = args.model_path or micro_model_path()
    options: dict[str, Any] = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit, "device": args.device, "dtype": args.dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    name = args.model_name or get_model_name_from_path(path)
    logger.info("loading %s as %r", path, name)
    return EmbeddedEngine(
        Assistant.load(path, args.model_base, **options),
        name,
        max_batch_rows=batch_rows(args),
        max_batch_tokens=args.max_batch_tokens,
        max_queue=args.max_queue,
        cache_bytes=int(1e6 * args.cache_mb),
        prefix_cache_bytes=int(1e6 * args.prefix_cache_mb),
        max_images=args.max_images,
    )


def batch_rows(args: argparse.Namespace) -> int:
    """How many requests are answered at once."""
    return int(args.max_batch_rows or args.limit_model_concurrency or DEFAULT_CONCURRENCY)


def build_app(args: argparse.Namespace) -> FastAPI:
    """The worker's app, its model loaded; everything that can be wrong with the flags is found before that."""
    check_arguments(args)
    limits, keys, registration = read_limits(args), read_api_keys(args), read_registration(args)
    check_address(args.host, args.port)
    if args.multi_modal:
        logger.warning("--multi-modal changes nothing: whether a model takes pictures is read from its config")
    if args.no_register and args.controller_address:
        logger.info("--no-register: the controller %s is not told of this worker", args.controller_address)
    return create_worker_app(
        load_engine(args),
        limits,
        api_keys=keys,
        allowed_origins=args.allowed_origins,
        registration=registration,
        concurrency=batch_rows(args),
        stream_interval=args.stream_interval,
        report_cache_hits=args.report_cache_hits,
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    try:
        start_logging(args)
        app = build_app(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_worker(app, args.host, args.port, log_level=args.log_level)


if __name__ == "__main__":
    sys.exit(run_program(main))
