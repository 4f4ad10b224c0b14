"""LoRA and QLoRA: low-rank matrices are trained in place of the language model's weights, which stay frozen or are also quantised.

LoRA: https://arxiv.org/abs/2106.09685. QLoRA: https://arxiv.org/abs/2305.14314. Only linear layers of the
language model get an adapter. Projector, newline vector and vision tower are trained in full, as the stage says. `arguments.py` has the
flags; `llava/model/adapter.py` says what an adapter folder holds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from llava.model.adapter import attach_adapter, language_linears, layer_pattern, load_lora, read_lora_config
from llava.model.builder import check_4bit_on_cpu
from llava.model.quantization import quantization_config
from llava.train.arguments import PUBLISHED_LORA, TrainingArguments
from llava.train.stages import part_of

logger = logging.getLogger(__name__)

def quantization_options(args: TrainingArguments, path: str) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise the language model of `path`; nothing for 16 bits.

    Raises:
        ValueError: 4-bit on the CPU with widths that cannot be packed.
    """
    if args.bits == 16:
        return {}
    if args.bits == 4 and args.device.type == "cpu":
        check_4bit_on_cpu(path, args.hub_options)
    return {
        "device_map": {"": args.device},
        "quantization_config": quantization_config(args.bits, _compute_dtype(args), args.double_quant, args.quant_type),
    }


def attach_lora(model: Any, args: TrainingArguments, base: str, adapter: str | None, dtype: torch.dtype) -> None:
    """Attach the matrices that the run trains, and hold the frozen weights around them in the run's 16-bit type.

    Args:
        model: the assembled model.
        args: all flags of training.
        base: the base model, which the adapter's config will name.
        adapter: a folder to continue from; `None` starts a new adapter.
        dtype: of the trained parameters.

    Raises:
        ValueError: flags that differ from those of the adapter to continue from.
    """
    config = _new_config(model, args) if adapter is None else _stored_config(args, adapter)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    attach_adapter(model, config, dtype)
    if adapter is not None:
        load_lora(model, adapter)
    _shrink_language_model(model, args)


def new_lora_config(model: Any, lora_r: int, lora_alpha: int, lora_dropout: float) -> Any:
    """Peft's configuration of a new adapter on every linear layer of the language model."""
    from peft import LoraConfig

    layers = "|".join(language_linears(model))
    return LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=rf"{layer_pattern()}[0-9]+[.].*[.]({layers})",
    )


def _new_config(model: Any, args: TrainingArguments) -> Any:
    given = {name: getattr(args, name) for name in PUBLISHED_LORA if getattr(args, name) is not None}
    return new_lora_config(model, **{**PUBLISHED_LORA, **given})


def _stored_config(args: TrainingArguments, adapter: str) -> Any:
    config = read_lora_config(adapter)
    config.inference_mode = False
    for flag, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        given, stored = getattr(args, flag), getattr(config, name)
        if given is not None and given != stored:
            raise ValueError(f"--{flag} is {given}, but the adapter {adapter} has {stored}; drop the flag, or merge the adapter first.")
    if args.lora_dropout is not None:
        config.lora_dropout = args.lora_dropout
    return config


def _compute_dtype(args: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _shrink_language_model(model: Any, args: TrainingArguments) -> None:
    """Cast the frozen language model to the type of --bf16 or --fp16: it needs no float32 master copy."""
    dtype = _compute_dtype(args)
    if args.deepspeed or args.bits != 16 or dtype == torch.float32:
        return
    for name, parameter in model.named_parameters():
        if part_of(name) == "llm":
            parameter.data = parameter.data.to(dtype)
    logger.info("the language model under the adapter is held in %s", dtype)
