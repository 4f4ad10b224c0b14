"""Processes that train together: how they meet, and what is said when one of them is lost.

torchrun, deepspeed and SLURM start the processes and end the rest when one ends. What is left for us is what none of them does:
DeepSpeed on a CPU must be told its backend before the model is made, and the process that notices a loss should say so in words.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket Timeout|Timed out waiting|remote process exited|"
    r"NCCL.*(remote error|timed out|timeout)|Watchdog caught collective operation timeout",
    re.IGNORECASE,
)
"""What Gloo, NCCL and the store say when the process at the other end is gone."""


def meet(args: TrainingArguments) -> None:
    """Let the processes of a DeepSpeed run on CPUs meet over Gloo; everything else meets by itself.

    Called when the flags are read and before anything is made: DeepSpeed takes itself for the only process until it was
    initialised, even where torch has a process group. On GPUs transformers initialises it in time.
    """
    if not args.deepspeed:
        return
    # DeepSpeed calls collectives by names that torch 2.13 renames, and each call of each step would say so.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not args.use_cpu:
        return
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Inside this block every process reads whole weights, also under ZeRO-3, which shards them when training starts.

    Left to itself transformers would create each parameter sharded. Whatever then looks at a parameter finds an empty one:
    initialisation, a projector that is read from its own file, new tokens, adapters, the digest of the weights that scores belong
    to. The price is host memory, once: 14 GB a process for a 7B model in bf16. GPUs never hold more than their share.
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


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective operation means that another process, or its host, is gone."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, (dist.DistNetworkError, torch.distributed.DistBackendError)) or bool(_LOST.search(str(error)))


def lost_process_sentence(error: BaseException) -> str:
    """What to tell the user about an error for which `is_lost_process` holds."""
    finding = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0])[:200]
    return (
        f"another process of this run ended, or its host cannot be reached ({finding}); look for the first error in its log, then "
        "go on from the newest checkpoint with --resume_from_checkpoint True."
    )
