"""Flags of a training run: LLaVA's names, mapped to what today's transformers calls them.

Three dataclasses are filled from one command line. `check_arguments` looks at them together and refuses contradictions, all findings at
once; `ignored_flags` names what scripts of LLaVA pass without any effect here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from llava.model.adapter import is_adapter
from llava.train.flags import DataArguments, FlagParser, LoraFlags, ModelArguments, RouterFlags, StageFlags
from llava.train.stages import PARTS, STAGES, Stage, get_stage

PUBLISHED_WARMUP = 0.03
PUBLISHED_LORA: dict[str, Any] = {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05}
"""LLaVA's defaults of a new adapter."""


@dataclass
class TrainingArguments(StageFlags, RouterFlags, LoraFlags, transformers.TrainingArguments):  # type: ignore[misc]
    """How training runs. `None` means the stage's published value."""

    _argument_group_name = "training"

    def __post_init__(self) -> None:
        given_stage = self.stage
        self.stage = given_stage or self._inferred_stage()
        stage = STAGES.get(self.stage)
        if self.learning_rate is None:
            self.learning_rate = stage.learning_rate if stage else 5e-5
        if self.mm_vision_tower_lr is None and stage is not None:
            self.mm_vision_tower_lr = stage.mm_vision_tower_lr
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # whatever trains gets a gradient in every step, see `apply_stage` and `objectives`
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is None and not self.warmup_steps:
            self.warmup_ratio = PUBLISHED_WARMUP
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio
        super().__post_init__()

    def _inferred_stage(self) -> str:
        if self.tune_router:
            return "rglf"
        return "align" if self.tune_mm_mlp_adapter else "instruct"

    @property
    def hub_options(self) -> dict[str, Any]:
        """transformers' options for whatever the run reads from the hub."""
        return {} if self.cache_dir is None else {"cache_dir": self.cache_dir}

    @property
    def output_folder(self) -> Path:
        """Where checkpoints and the finished model go; the base class fills `output_dir` in where it is not given."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    @property
    def stage_plan(self) -> Stage:
        """The line of the stage table that this run follows."""
        return get_stage(self.stage or "")

    @property
    def frozen_parts(self) -> set[str]:
        """Parts that a flag takes out of the stage."""
        frozen = set()
        if self.freeze_mm_mlp_adapter:
            frozen |= {"projector", "newline"}
        if self.freeze_backbone:
            frozen.add("llm")
        if self.unfreeze_mm_vision_tower is False:
            frozen.add("vision_tower")
        return frozen

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of every part."""
        assert self.learning_rate is not None
        rates = dict.fromkeys(PARTS, self.learning_rate)
        if self.mm_projector_lr is not None:
            rates["projector"] = self.mm_projector_lr
        if self.mm_vision_tower_lr is not None:
            rates["vision_tower"] = self.mm_vision_tower_lr
        return rates


def whole_parser(prog: str | None = None) -> FlagParser:
    """The flags of a run, transformers' among them.

    Args:
        prog: how the program is called; `None` takes the name of the running one.
    """
    return FlagParser((ModelArguments, DataArguments, TrainingArguments), prog, "Train one stage.")


def check_arguments(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Refuse flags that contradict each other or the stage.

    Raises:
        ValueError: one sentence per contradiction, all of them at once.
    """
    errors = _stage_errors(training_args) + _data_errors(data_args) + _router_errors(training_args)
    errors += lora_errors(training_args, model_args.model_name_or_path, model_args.pretrain_mm_mlp_adapter is not None)
    for value in ("granularities", "canvases"):
        try:
            getattr(model_args if value == "granularities" else data_args, value)
        except ValueError as error:
            errors.append(str(error))
    if data_args.cache_image_features_gb and "vision_tower" in (
        training_args.stage_plan.trains - training_args.frozen_parts if training_args.stage in STAGES else ()
    ):
        errors.append(
            "--cache_image_features_gb keeps features of a vision tower that this run trains; freeze it with "
            "--unfreeze_mm_vision_tower False or drop the cache."
        )
    if data_args.cache_image_features_gb and training_args.deepspeed:
        errors.append(
            "--cache_image_features_gb lets processes call the vision tower unequally often, which DeepSpeed cannot do; drop one "
            "of the two."
        )
    if errors:
        raise ValueError("these flags cannot work together:\n- " + "\n- ".join(errors))


def ignored_flags(training_args: TrainingArguments) -> list[str]:
    """Flags of the published scripts that were given and change nothing; stage 4 trains the router alone, there as here."""
    given = {
        "--unfreeze_mm_vision_tower True": training_args.stage == "rglf" and bool(training_args.unfreeze_mm_vision_tower),
        "--mm_vision_tower_lr": training_args.stage == "rglf" and training_args.mm_vision_tower_lr is not None,
    }
    return [flag for flag, ignored in given.items() if ignored]


def _stage_errors(args: TrainingArguments) -> list[str]:
    if args.stage not in STAGES:
        return [f"--stage is {args.stage!r}; choose one of {', '.join(STAGES)}."]
    stage = STAGES[args.stage]
    errors = []
    implied = {"--tune_mm_mlp_adapter": (args.tune_mm_mlp_adapter, "align"), "--tune_router": (args.tune_router, "rglf")}
    for flag, (value, meant) in implied.items():
        if value is True and stage.name != meant:
            errors.append(f"{flag} True belongs to stage {meant}, but the stage is {stage.name}; drop one of the two.")
        if value is False and stage.name == meant:
            errors.append(f"{flag} False contradicts stage {meant}; drop one of the two.")
    if args.unfreeze_mm_vision_tower and "vision_tower" not in stage.trains and stage.name != "rglf":
        errors.append(f"--unfreeze_mm_vision_tower True, but stage {stage.name} does not train the vision tower.")
    if args.mm_projector_lr is not None and "projector" not in stage.trains - args.frozen_parts:
        errors.append(f"--mm_projector_lr is given, but stage {stage.name} with these flags does not train the projector.")
    if not stage.trains - args.frozen_parts:
        errors.append(f"stage {stage.name} trains {', '.join(sorted(stage.trains))}, and the flags freeze all of it.")
    if args.on_nonfinite_loss not in ("raise", "skip"):
        errors.append(f"--on_nonfinite_loss is {args.on_nonfinite_loss!r}; choose raise or skip.")
    if args.on_nonfinite_loss == "skip" and args.fp16:
        errors.append("--on_nonfinite_loss skip has no effect under --fp16, whose scaler skips such steps itself; drop one of the two.")
    if args.mm_vision_tower_lr is not None and "vision_tower" not in stage.trains and stage.name != "rglf":
        errors.append(f"--mm_vision_tower_lr is given, but stage {stage.name} does not train the vision tower.")
    if args.on_nonfinite_loss == "skip" and args.deepspeed:
        errors.append("--on_nonfinite_loss skip needs the gradients that DeepSpeed keeps to itself; drop one of the two.")
    if args.router_select is False and stage.name == "rglf":
        errors.append("--router_select False contradicts stage rglf, which trains the router.")
    return errors


def _router_errors(args: TrainingArguments) -> list[str]:
    errors = []
    if args.stage != "rglf":
        for flag in ("granularity_scores", "router_without_instruction", "granularity_cost_weight"):
            if getattr(args, flag):
                errors.append(f"--{flag} is read by stage rglf only, but the stage is {args.stage}.")
    for flag in ("margin", "rank_loss_weight", "ce_loss_weight", "granularity_cost_weight"):
        if getattr(args, flag) < 0:
            errors.append(f"--{flag} is {getattr(args, flag)}; give 0 or more.")
    if args.rank_loss_weight == 0 and args.ce_loss_weight == 0:
        errors.append("--rank_loss_weight and --ce_loss_weight are both 0; one must be above 0, or nothing is trained.")
    return errors


def _data_errors(args: DataArguments) -> list[str]:
    errors = []
    if args.on_bad_sample not in ("raise", "skip"):
        errors.append(f"--on_bad_sample is {args.on_bad_sample!r}; choose raise or skip.")
    if not 0 <= args.max_bad_share <= 1:
        errors.append(f"--max_bad_share is {args.max_bad_share}; give a share between 0 and 1.")
    if args.image_aspect_ratio not in (None, "square", "pad", "anyres"):
        errors.append(f"--image_aspect_ratio is {args.image_aspect_ratio!r}; choose square, pad or anyres.")
    if args.cache_image_features_gb < 0:
        errors.append(f"--cache_image_features_gb is {args.cache_image_features_gb}; give 0 or more.")
    if args.image_folder is not None and not args.is_multimodal:
        errors.append("--image_folder is given, but --is_multimodal False allows no row to have images.")
    return errors


def lora_errors(args: TrainingArguments, model_path: str, projector_given: bool) -> list[str]:
    """Contradictions among the flags of LoRA and QLoRA, one sentence each.

    Args:
        args: all flags of training.
        model_path: `--model_name_or_path`.
        projector_given: whether the flags name a projector file to start from.
    """
    errors = _lora_value_errors(args)
    if not args.lora_enable:
        given = [f"--{name}" for name in PUBLISHED_LORA if getattr(args, name) is not None]
        given += ["--lora_weight_path"] if args.lora_weight_path else []
        errors += [f"{flag} is given without --lora_enable True; add that or drop it." for flag in given]
        if args.bits in (4, 8):
            errors.append(
                f"--bits {args.bits} quantises the language model, which can then be trained with an adapter only; add --lora_enable True."
            )
        return errors
    stage = STAGES.get(args.stage or "")
    if stage is not None and "llm" not in stage.trains:
        errors.append(
            f"--lora_enable True adapts the language model, which stage {stage.name} does not train; drop it (an adapter folder "
            "given as --model_name_or_path is merged before the stage starts)."
        )
    if args.freeze_backbone:
        errors.append("--lora_enable True adapts the language model, which --freeze_backbone True freezes; drop one of the two.")
    if args.lora_weight_path and not is_adapter(args.lora_weight_path):
        errors.append(f"--lora_weight_path is {args.lora_weight_path!r}, not an adapter folder; give one with adapter_config.json.")
    places = {"--lora_weight_path": args.lora_weight_path, "--model_name_or_path": model_path}
    starts = [flag for flag, path in places.items() if path and is_adapter(path)]
    if len(starts) == 2:
        errors.append(f"{' and '.join(starts)} both name an adapter; give one of them, or its base model as --model_name_or_path.")
    if starts and projector_given:
        errors.append(f"--pretrain_mm_mlp_adapter would replace the projector that came with {starts[0]}; drop it.")
    return errors


def _lora_value_errors(args: TrainingArguments) -> list[str]:
    errors = []
    if args.bits not in (4, 8, 16):
        errors.append(f"--bits is {args.bits}; choose 16, 8 or 4.")
    if args.quant_type not in ("nf4", "fp4"):
        errors.append(f"--quant_type is {args.quant_type!r}; choose nf4 or fp4.")
    if args.quant_type == "fp4" and args.bits != 4:
        errors.append(f"--quant_type fp4 is a 4-bit format, but --bits is {args.bits}; give --bits 4.")
    if args.lora_bias != "none":
        errors.append(f"--lora_bias is {args.lora_bias!r}; only none is supported: trained biases could not be merged back into the model.")
    if args.lora_r is not None and args.lora_r < 1:
        errors.append(f"--lora_r is {args.lora_r}; give 1 or more.")
    if args.lora_alpha is not None and args.lora_alpha <= 0:
        errors.append(f"--lora_alpha is {args.lora_alpha}; give more than 0.")
    if args.lora_dropout is not None and not 0 <= args.lora_dropout < 1:
        errors.append(f"--lora_dropout is {args.lora_dropout}; give a share from 0 to below 1.")
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if args.bits in (4, 8) and deepspeed is not None and deepspeed.is_zero3():
        errors.append(f"--bits {args.bits} packs weights in a form that ZeRO-3 cannot shard; use a ZeRO-2 configuration.")
    return errors
