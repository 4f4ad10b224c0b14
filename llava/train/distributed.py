"""What the launchers leave to us in a distributed run.

torchrun, deepspeed and SLURM start the processes and end the others when one ends. DeepSpeed on a CPU must be given its backend before the
model is created, ZeRO-3 must not shard weights before they are loaded, and a process that loses another one should explain that in its
error.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket Timeout|Timed out waiting|remote process exited|"
    r"NCCL.*(remote error|timed out|timeout)|Watchdog caught collective operation timeout",
    re.IGNORECASE,
)
"""Errors of Gloo, NCCL and the store when the process at the other end is gone."""


def init_cpu_deepspeed(args: TrainingArguments) -> None:
    """Initialise the process group of a DeepSpeed run on CPUs, over Gloo; every other run initialises its own.

    Called after the flags are parsed and before anything is created: until DeepSpeed is initialised it assumes a single process, even
    where torch has a process group. On GPUs transformers initialises it in time.
    """
    if not args.deepspeed:
        return
    # DeepSpeed calls collectives by names that torch 2.13 deprecates; each call of each step would warn.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not args.use_cpu:
        return
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def full_weights_on_load(args: TrainingArguments) -> Iterator[None]:
    """Inside this block every process loads full weights, also under ZeRO-3, which shards them when training starts.

    By default transformers creates each parameter sharded, and whatever reads a parameter then finds an empty one: initialisation, a
    projector loaded from its own file, new tokens, adapters, the fingerprint of the weights that scores belong to. The price is host
    memory, once: 14 GB per process for a 7B model in bf16. GPUs never hold more than their share.
    """
    if args.deepspeed is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside this block a call of a module runs another forward, with whatever DDP, DeepSpeed or a hook does around a call of it.

    Weights are gathered and gradients reduced there, so work with a module's weights that is not such a call would find them sharded.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def call_through(wrapper: nn.Module, bare: nn.Module, work: Callable[[], Tensor]) -> Tensor:
    """Run `work` as the forward of `bare`, called through whatever wraps it.

    Args:
        wrapper: the model as accelerate prepared it; `bare` itself in a single process.
        bare: the model inside.
        work: uses `bare` and returns the tensor to differentiate.
    """
    if wrapper is bare:
        return work()
    with forward_replaced(bare, lambda *_, **__: work()):
        return wrapper()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective operation means that another process, or its host, is gone."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, (dist.DistNetworkError, torch.distributed.DistBackendError)) or bool(_LOST.search(str(error)))


def lost_process_message(error: BaseException) -> str:
    """The error message for an error for which `is_lost_process` holds."""
    finding = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0])[:200]
    return (
        f"another process of this run ended, or its host cannot be reached ({finding}); look for the first error in its log, then "
        "resume from the newest checkpoint with --resume_from_checkpoint True."
    )
