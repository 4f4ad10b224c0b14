"""Which engine answers, from the flags: `--engine embedded`, or `--engine vllm` at an address or inside this process.

An engine says what its answers depend on before it is started, so that a run that cannot resume, or that has nothing left to ask, loads
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import cached_file

from llava.conversation import get_template
from llava.eval.answerers import Answerer, Embedded
from llava.inference import Assistant, micro_model_path
from llava.messages import Options
from llava.mm_utils import get_model_name_from_path
from llava.utils import pick_device

WEIGHTS = (".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Place:
    """Which of a run's processes this one is."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def here(cls) -> Place:
        """As set by `torchrun`, `accelerate launch` or `deepspeed`; a single process without them."""
        return cls(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


class Engine(Protocol):
    """What answers, not yet started."""

    def description(self) -> dict[str, Any]:
        """What its answers depend on: model and state.

        Raises:
            ValueError: there is no such model. OSError: there is no such server.
        """

    def start(self) -> Answerer:
        """Load the model, or use the connection.

        Raises:
            ValueError: a model that cannot be loaded.
        """


def choose_engine(args: argparse.Namespace, options: Options, place: Place) -> Engine:
    """The engine of the flags.

    Raises:
        ValueError: flags that contradict each other.
    """
    if args.engine == "embedded":
        return EmbeddedEngine(args, options, place)
    from llava.eval.vllm_engines import OfflineEngine, ServerEngine  # with what a client of HTTP needs

    return OfflineEngine(args, options) if args.vllm is None else ServerEngine(args, options)


class EmbeddedEngine:
    """The model in this process, on this process's device."""

    def __init__(self, args: argparse.Namespace, options: Options, place: Place) -> None:
        if args.vllm is not None:
            raise ValueError(f"--vllm is {args.vllm!r}, but --engine embedded asks no server; give --engine vllm, or leave out --vllm.")
        if options.conv_mode is not None:
            get_template(options.conv_mode)
        batch_size = 1 if args.batch_size is None else args.batch_size
        if batch_size > 1 and options.temperature > 0:
            raise ValueError(
                f"--batch-size is {batch_size} and --temperature {options.temperature}, but a sampled answer depends on its batch; use 1."
            )
        if args.load_4bit and args.load_8bit:
            raise ValueError("--load-4bit and --load-8bit are both on; choose one.")
        self.args, self.options, self.place, self.batch_size = args, options, place, batch_size
        self.model_path = args.model_path or micro_model_path()

    def description(self) -> dict[str, Any]:
        args = self.args
        return {
            "model": describe_model(self.model_path),
            "model base": None if args.model_base is None else describe_model(args.model_base),
            "quantised": "4 bit" if args.load_4bit else "8 bit" if args.load_8bit else None,
        }

    def start(self) -> Answerer:
        args = self.args
        device = device_of(args.device, self.place)
        assistant = Assistant.load(self.model_path, args.model_base, load_8bit=args.load_8bit, load_4bit=args.load_4bit, device=device)
        return Embedded(assistant, self.options, args.image_folder, self.batch_size, get_model_name_from_path(self.model_path))


def device_of(wanted: str | None, place: Place) -> str:
    """A device; the GPUs of a machine are shared out among its processes."""
    device = wanted or pick_device()
    return f"cuda:{place.local_rank}" if device == "cuda" and place.world_size > 1 else device


def describe_model(model: str) -> str:
    """A model and its state: the commit of a hub id; names, sizes and times of the weights in a folder.

    Raises:
        ValueError: there is no such folder, and no such model on the hub or in its cache.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            config = cached_file(model, "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"The model {model!r} is neither a folder nor available from the hub: {error}") from error
        return f"{model}@{Path(str(config)).parent.name}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix in WEIGHTS:
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return f"{folder.resolve()}@{digest.hexdigest()[:16]}"
