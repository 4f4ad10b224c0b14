"""`python -m llava.serve.model_worker`: serve one model, with or without a controller.

LLaVA's flags and short forms. The worker speaks LLaVA's protocol and the OpenAI API, and needs no controller to be useful.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llava.flags import OneValue, Parser, add_ignored, add_model_flags
from llava.interrupts import run_program
from llava.serve.http.flag_checks import too_small
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import check_address
from llava.serve.protocol import DEFAULT_CONCURRENCY, ErrorKind
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
    from llava.serve.protocol import Engine
    from llava.serve.split.engine import SplitEngine

logger = logging.getLogger("llava.serve.model_worker")  # also when run as a program

PROG = "python -m llava.serve.model_worker"
FIRST = (
    *("--model-path", "--model-base", "--host", "--port", "--controller", "--worker", "--device", "--load-4bit"),
    *("--max-batch-rows", "--api-key-file"),
)
ENGINES = {"embedded": DEFAULT_CONCURRENCY, "vllm": 128}
"""What may compute the language model, and how many requests it answers at once unless a flag says otherwise."""
PREFIX_CACHE_MB = 256.0
FLAGS_OF = {
    "embedded": ("max_batch_tokens", "prefix_cache_mb", "attn_implementation", "load_8bit", "load_4bit", "model_base"),
    "vllm": ("vllm", "vllm_api_key_file", "vllm_python", "vllm_args", "vllm_timeout"),
}
"""Flags that mean something to one engine only."""
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
    rows = ", ".join(f"{count} with {engine}" for engine, count in ENGINES.items())
    batching.add_argument("--max-batch-rows", "--limit-model-concurrency", dest="max_batch_rows", action=OneValue, type=int, metavar="N",
                          help=f"requests answered at once (default: {rows})")  # fmt: skip
    batching.add_argument("--max-batch-tokens", type=int, metavar="N", help="positions held for all of them (default: four full contexts)")
    batching.add_argument("--cache-mb", type=float, default=256.0, metavar="MB", help="memory for features of images seen before")
    batching.add_argument("--prefix-cache-mb", type=float, metavar="MB",
                          help="memory for prompts prefilled up to the end of their images, for the next question about them "
                               f"(default: {PREFIX_CACHE_MB:g})")  # fmt: skip
    add_stream_interval(batching, "tokens")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", default="embedded", choices=tuple(ENGINES),
                        help="what computes the language model: this process, or a vLLM that gets encoded images")  # fmt: skip
    engine.add_argument("--vllm", metavar="URL", help="a vLLM that takes image_embeds, or a router before several (default: starts one)")
    engine.add_argument("--vllm-api-key-file", metavar="FILE", help="key that it asks for")
    engine.add_argument("--vllm-python", metavar="PATH", help="Python that starts it (default: the one of scripts/setup_vllm.sh)")
    engine.add_argument("--vllm-args", metavar="FLAGS", help="further flags that it is started with, in one argument")
    engine.add_argument("--vllm-timeout", type=float, metavar="SECONDS", help="how long it may be silent (default: 120)")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that cannot work.

    Raises:
        ValueError: naming all of them.
    """
    found = too_small(args, dict.fromkeys(("max_batch_rows", "max_batch_tokens", "stream_interval"), 1))
    found += too_small(args, {"cache_mb": 0, "prefix_cache_mb": 0, "vllm_timeout": 0.001})
    for engine in FLAGS_OF.keys() - {args.engine}:
        given = ", ".join(_spelled(name) for name in FLAGS_OF[engine] if getattr(args, name) not in (None, False))
        found += [f"{given}: of --engine {engine}, but --engine is {args.engine}"] if given else []
    started = ", ".join(_spelled(name) for name in ("vllm_python", "vllm_args") if getattr(args, name) is not None)
    if args.vllm is not None and started:
        found.append(f"{started}: for a vLLM that is started here, but --vllm names one that runs")
    if args.vllm is None and args.vllm_api_key_file is not None:
        found.append("--vllm-api-key-file: for a vLLM that runs, but no --vllm names one")
    if found:
        raise ValueError("The flags cannot work: " + "; ".join(found) + ".")


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def batch_rows(args: argparse.Namespace) -> int:
    """Requests answered at once."""
    return ENGINES[args.engine] if args.max_batch_rows is None else int(args.max_batch_rows)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the engine, as arguments of `create_worker_app`."""
    not_ready = {"embedded": ErrorKind.OVERLOADED, "vllm": ErrorKind.BACKEND_UNREACHABLE}
    return {"concurrency": batch_rows(args), "not_ready": not_ready[args.engine]}


def load_engine(args: argparse.Namespace) -> Engine:
    """Load the model that the flags name, or its front, and make its engine.

    Raises:
        ValueError: a checkpoint or flags that cannot work. OSError: files that cannot be read.
    """
    from llava.inference import micro_model_path
    from llava.mm_utils import get_model_name_from_path

    path = args.model_path or micro_model_path()
    name = args.model_name or get_model_name_from_path(path)
    logger.info("loading %s as %r", path, name)
    make: dict[str, Callable[[argparse.Namespace, str, str], Engine]] = {"embedded": _embedded_engine, "vllm": _split_engine}
    return make[args.engine](args, path, name)


def _embedded_engine(args: argparse.Namespace, path: str, name: str) -> EmbeddedEngine:
    from llava.inference import Assistant
    from llava.serve.engine.embedded import EmbeddedEngine

    options: dict[str, Any] = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit, "device": args.device, "dtype": args.dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    return EmbeddedEngine(
        Assistant.load(path, args.model_base, **options),
        name,
        max_batch_rows=batch_rows(args),
        max_batch_tokens=args.max_batch_tokens,
        max_queue=args.max_queue,
        cache_bytes=int(1e6 * args.cache_mb),
        prefix_cache_bytes=int(1e6 * (PREFIX_CACHE_MB if args.prefix_cache_mb is None else args.prefix_cache_mb)),
        max_images=args.max_images,
    )


def _split_engine(args: argparse.Namespace, path: str, name: str) -> SplitEngine:
    from llava.inference import Assistant
    from llava.serve.backend.openai_server import Backend
    from llava.serve.http.client import Timeouts
    from llava.serve.split.child import ChildServer, ServerCommand, vllm_python
    from llava.serve.split.engine import SplitEngine

    python = vllm_python(args.vllm_python) if args.vllm is None else ""  # before the model is loaded
    keys = read_secrets([], args.vllm_api_key_file)
    if len(keys) > 1:
        raise ValueError(f"--vllm-api-key-file {args.vllm_api_key_file!r} holds {len(keys)} keys, expected one.")
    assistant = Assistant.load(path, device=args.device, dtype=args.dtype, front_only=True)
    rows, seconds = batch_rows(args), args.vllm_timeout or 120.0
    backend = Backend(
        url=args.vllm or "",
        model="",
        api_key=keys[0] if keys else None,
        max_images=args.max_images,
        concurrency=rows,
        max_queue=args.max_queue,
        timeouts=Timeouts(connect=3.0, headers=seconds, read=seconds, total=30 * seconds),
        poll_seconds=1.0,
    )
    child = None
    if args.vllm is None:
        dtype, context = str(assistant.model.dtype).removeprefix("torch."), assistant.model.config.context_length
        command = ServerCommand(python, path, name, dtype, context, rows, args.vllm_args or "")
        child = ChildServer(command.arguments, command.environment)
        backend = replace(backend, url=command.url, api_key=command.api_key)
    try:
        _ = backend.endpoint
    except ValueError as error:
        raise ValueError(f"--vllm is {args.vllm!r}, expected http(s)://host:port, with or without /v1.") from error
    return SplitEngine(assistant, name, backend, child, cache_bytes=int(1e6 * args.cache_mb))


def build_app(args: argparse.Namespace) -> FastAPI:
    """The worker's app, its model loaded; everything that can be wrong with the flags is found before that."""
    from llava.serve.api.worker_app import create_worker_app

    check_arguments(args)
    options, registration = read_worker_options(args), read_registration(args)
    check_address(args.host, args.port)
    if args.no_register and args.controller_address:
        logger.info("--no-register: this worker does not register with the controller %s", args.controller_address)
    return create_worker_app(load_engine(args), registration=registration, **engine_options(args), **options)


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
