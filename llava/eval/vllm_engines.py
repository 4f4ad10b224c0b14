"""`--engine vllm`: a server at an address, or vLLM inside this process."""

from __future__ import annotations

import argparse
from typing import Any

from llava.eval.answerers import Answerer
from llava.eval.chat_server import ChatServer, sampling_fields
from llava.eval.engines import describe_model
from llava.eval.offline_vllm import Offline
from llava.eval.served import Served
from llava.inference import micro_model_path
from llava.messages import Options
from llava.mm_utils import get_model_name_from_path

IN_FLIGHT = 256
"""Questions at once where `--batch-size` does not say: as many sequences as vLLM runs at once by default."""


class ServerEngine:
    """A server at an address, which has its model already."""

    def __init__(self, args: argparse.Namespace, options: Options) -> None:
        check_vllm_flags(args, options)
        self.served = Served(ChatServer(args.vllm, args.model_path), options, args.image_folder, args.batch_size or IN_FLIGHT)

    def description(self) -> dict[str, Any]:
        self.served.connect()
        server = self.served.server
        return {"engine": "vllm", "model": f"{server.model} ({server.root})" if server.root else server.model}

    def start(self) -> Answerer:
        return self.served


class OfflineEngine:
    """A checkpoint for vLLM to load."""

    def __init__(self, args: argparse.Namespace, options: Options) -> None:
        check_vllm_flags(args, options)
        self.args, self.options = args, options
        self.model_path = args.model_path or micro_model_path()

    def description(self) -> dict[str, Any]:
        return {"engine": "vllm", "model": describe_model(self.model_path)}

    def start(self) -> Answerer:
        """Load the model.

        Raises:
            ImportError: this environment has no vLLM.
        """
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{error.name} is not installed here; give --vllm the address of a server, or run this command in the environment that "
                "scripts/setup_vllm.sh makes."
            ) from error
        in_flight = self.args.batch_size or IN_FLIGHT
        llm, name = LLM(self.model_path, max_num_seqs=in_flight), get_model_name_from_path(self.model_path)
        return Offline(llm, self.options, self.args.image_folder, in_flight, name)


def check_vllm_flags(args: argparse.Namespace, options: Options) -> None:
    """Check that vLLM can be asked what the flags say.

    Raises:
        ValueError: it cannot, with the flag.
    """
    sampling_fields(options)
    for flag in ("model_base", "device", "load_8bit", "load_4bit"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} is given, but with --engine vllm it is vLLM that loads the model; leave it out, and see the "
                "flags of `vllm serve`."
            )
