"""LoRA and QLoRA: a few low-rank matrices learn in place of the language model's weights, which stay whole or are quantised.

LoRA: https://arxiv.org/abs/2106.09685. QLoRA: https://arxiv.org/abs/2305.14314. The matrices stand in the linear layers of the
language model only. Projector, newline vector and vision tower train as the stage says, in full. The flags have LLaVA's names;
what an adapter folder holds is said in `llava/model/adapter.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.model.adapter import LANGUAGE_LAYERS, attach_adapter, is_adapter, language_linears, load_lora, read_lora_config
from llava.model.builder import check_4bit_on_cpu
from llava.model.quantization import quantization_config
from llava.train.stages import STAGES, part_of

if TYPE_CHECKING:
    from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

PUBLISHED: dict[str, Any] = {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05}
"""LLaVA's defaults of a new adapter."""


@dataclass
class LoraFlags:
    """Flags of LoRA and QLoRA."""

    lora_enable: bool = field(default=False, metadata={"help": "Train an adapter of the language model in place of its weights."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank; 64, or that of the adapter the run starts from."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale, divided by the rank; 16, or that of the adapter the run starts from."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout in front of the matrices; 0.05, or that of the adapter the run starts from."}
    )
    lora_weight_path: str = field(default="", metadata={"help": "Adapter folder to train on, over --model_name_or_path."})
    lora_bias: str = field(default="none", metadata={"help": "none; the biases of the layers underneath do not learn."})
    bits: int = field(default=16, metadata={"help": "16, or 8 or 4: quantise the language model and train an adapter on it (QLoRA)."})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the scales of 4-bit weights too."})
    quant_type: str = field(default="nf4", metadata={"help": "4-bit numbers: nf4 or fp4."})


def lora_errors(args: TrainingArguments, model_path: str, projector_given: bool) -> list[str]:
    """What the flags of LoRA and QLoRA contradict, one sentence each.

    Args:
        args: all flags of training.
        model_path: `--model_name_or_path`.
        projector_given: whether the flags name a projector file to start from.
    """
    errors = _value_errors(args)
    if not args.lora_enable:
        given = [f"--{name}" for name in PUBLISHED if getattr(args, name) is not None]
        given += ["--lora_weight_path"] if args.lora_weight_path else []
        errors += [f"{flag} is given without --lora_enable True; add that or drop it." for flag in given]
        if args.bits in (4, 8):
            errors.append(
                f"--bits {args.bits} quantises the language model, which then learns through an adapter only; add --lora_enable True."
            )
        return errors
    stage = STAGES.get(args.stage or "")
    if stage is not None and "llm" not in stage.trains:
        errors.append(
            f"--lora_enable True adapts the language model, which stage {stage.name} does not train; drop it (an adapter folder "
            "given as --model_name_or_path is merged before the stage starts)."
        )
    if args.freeze_backbone:
        errors.append("--lora_enable True adapts the language model, which --freeze_backbone True leaves as it is; drop one of the two.")
    if args.lora_weight_path and not is_adapter(args.lora_weight_path):
        errors.append(f"--lora_weight_path is {args.lora_weight_path!r}, which is no adapter folder; give one with adapter_config.json.")
    places = {"--lora_weight_path": args.lora_weight_path, "--model_name_or_path": model_path}
    starts = [flag for flag, path in places.items() if path and is_adapter(path)]
    if len(starts) == 2:
        errors.append(f"{' and '.join(starts)} both name an adapter; give one of them, or the model underneath as --model_name_or_path.")
    if starts and projector_given:
        errors.append(f"--pretrain_mm_mlp_adapter would replace the projector that came with {starts[0]}; drop it.")
    return errors


def _value_errors(args: TrainingArguments) -> list[str]:
    errors = []
    if args.bits not in (4, 8, 16):
        errors.append(f"--bits is {args.bits}; choose 16, 8 or 4.")
    if args.quant_type not in ("nf4", "fp4"):
        errors.append(f"--quant_type is {args.quant_type!r}; choose nf4 or fp4.")
    if args.quant_type == "fp4" and args.bits != 4:
        errors.append(f"--quant_type fp4 is a kind of 4-bit numbers, but --bits is {args.bits}; give --bits 4.")
    if args.lora_bias != "none":
        errors.append(f"--lora_bias is {args.lora_bias!r}; only none can be merged back into the model.")
    if args.lora_r is not None and args.lora_r < 1:
        errors.append(f"--lora_r is {args.lora_r}; give 1 or more.")
    if args.lora_alpha is not None and args.lora_alpha <= 0:
        errors.append(f"--lora_alpha is {args.lora_alpha}; give more than 0.")
    if args.lora_dropout is not None and not 0 <= args.lora_dropout < 1:
        errors.append(f"--lora_dropout is {args.lora_dropout}; give a share from 0 to below 1.")
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if args.bits in (4, 8) and deepspeed is not None and deepspeed.is_zero3():
        errors.append(f"--bits {args.bits} packs weights in a form that ZeRO-3 cannot share out; use a ZeRO-2 configuration.")
    return errors


def quantization_options(args: TrainingArguments, path: str) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise the language model of `path`; nothing for 16 bits.

    Raises:
        ValueError: 4-bit on the CPU with widths that cannot be packed.
    """
    if args.bits == 16:
        return {}
    if args.bits == 4 and args.device.type == "cpu":
        check_4bit_on_cpu(path)
    return {
        "device_map": {"": args.device},
        "quantization_config": quantization_config(args.bits, _compute_dtype(args), args.double_quant, args.quant_type),
    }


def attach_lora(model: Any, args: TrainingArguments, base: str, adapter: str | None, dtype: torch.dtype) -> None:
    """Attach the matrices that the run trains, and hold what is frozen around them in the run's 16-bit type.

    Args:
        model: the assembled model.
        args: all flags of training.
        base: the model underneath, which the adapter will name.
        adapter: a folder to train on from; `None` starts a new adapter.
        dtype: of what trains.

    Raises:
        ValueError: flags that differ from the adapter to train on.
    """
    config = _new_config(model, args) if adapter is None else _stored_config(args, adapter)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    attach_adapter(model, config, dtype)
    if adapter is not None:
        load_lora(model, adapter)
    _shrink_language_model(model, args)


def _new_config(model: Any, args: TrainingArguments) -> Any:
    from peft import LoraConfig

    values = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in PUBLISHED.items()}
    words = "|".join(language_linears(model))
    return LoraConfig(
        r=values["lora_r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=rf"{LANGUAGE_LAYERS.replace('.', '[.]')}[0-9]+[.].*[.]({words})",
    )


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
    """Frozen weights need no float32 master copy: with --bf16 or --fp16 the language model is held in that type."""
    dtype = _compute_dtype(args)
    if args.deepspeed or args.bits != 16 or dtype == torch.float32:
        return
    for name, parameter in model.named_parameters():
        if part_of(name) == "llm":
            parameter.data = parameter.data.to(dtype)
    logger.info("the language model under the adapter is held in %s", dtype)
