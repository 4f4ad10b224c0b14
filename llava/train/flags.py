"""Flags of the programs of training, by LLaVA's and transformers' names. Nothing here needs torch.

transformers' own class of flags needs it, so a run is parsed in `arguments.py`; what `--help` shows are these.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from llava.flags import GroupedHelp, HelpFormatter
from llava.train.presets import PRESETS
from llava.train.stages import STAGES

PUBLISHED_SCHEDULE = "cosine"
DTYPES = ("bf16", "fp16", "fp32")
ZERO_SETTINGS = ("0", "2", "3", "3-offload")
"""0: every GPU holds everything (plain DDP); 2, 3 and 3 with optimizer and weights in host memory: `scripts/zero*.json`."""


class FlagParser(GroupedHelp, HfArgumentParser):
    """Flags that are the fields of dataclasses, each shown once, by the name that transformers gives it.

    Args:
        fields: the dataclasses. prog: how the program is called. description: what it does. first: the flags that people use first.
    """

    def __init__(self, fields: Sequence[type], prog: str | None, description: str, first: Sequence[str] = (), **options: Any) -> None:
        super().__init__(fields, prog=prog, description=description, formatter_class=HelpFormatter, **options)  # type: ignore[arg-type]
        self.first = first
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):  # the opposite of a flag that takes True and False
                action.help = argparse.SUPPRESS


@dataclass
class ModelArguments:
    """Which model is trained and what it is made of."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Language model or AVG-LLaVA checkpoint to start from."})
    version: str | None = field(default=None, metadata={"help": "Conversation template; the stage's own by default."})
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP folder or hub id; needed unless the checkpoint holds a tower."}
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "Tower layer whose output is the feature (new models: -2)."}
    )
    mm_vision_select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch (new models: patch)."}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "Projector weights to start from: mm_projector.safetensors or a folder with it."}
    )
    allow_bin_weights: bool = field(
        default=False, metadata={"help": "Also read a projector in PyTorch's .bin format (weights only)."}
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "linear, mlpNx_gelu or identity; must be given for a new model."}
    )
    mm_patch_merge_type: str | None = field(
        default=None, metadata={"help": "flat, spatial or spatial_unpad (new models: spatial_unpad)."}
    )
    mm_use_im_start_end: bool | None = field(
        default=None, metadata={"help": "Surround each image with start and end tokens."}
    )
    mm_use_im_patch_token: bool | None = field(default=None, metadata={"help": "Add LLaVA's patch token."})
    vis_token_granularity: str | None = field(
        default=None, metadata={"help": "Tokens per view of each granularity, coarse to fine, as in 36,72,144,288,576."}
    )
    unpad_rule: str | None = field(default=None, metadata={"help": "picture (new models) or pooled_grid (released)."})
    router_attention_axis: str | None = field(default=None, metadata={"help": "views or tokens."})
    router_hidden_size: int | None = field(default=None, metadata={"help": "Width of a narrow router."})
    router_dropout: float | None = field(default=None, metadata={"help": "Dropout of the router's encoder layer."})
    filtered_text_num: int | None = field(default=None, metadata={"help": "Instruction tokens that the router sees."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel of the language model."})

    @property
    def granularities(self) -> list[int] | None:
        """The granularities as numbers, coarse to fine.

        Raises:
            ValueError: not a comma-separated list of rising numbers.
        """
        if self.vis_token_granularity is None:
            return None
        try:
            levels = [int(part) for part in self.vis_token_granularity.strip("[] ").split(",")]
        except ValueError:
            levels = []
        if not levels or levels != sorted(set(levels)) or levels[0] < 1:
            raise ValueError(
                f"--vis_token_granularity is {self.vis_token_granularity!r}; give tokens per view, coarse to fine, "
                'separated by commas, as in "36,72,144,288,576".'
            )
        return levels


@dataclass
class DataArguments:
    """Which rows and images are trained on."""

    _argument_group_name = "data"

    data_path: str = field(metadata={"help": "LLaVA's JSON or JSONL, or a mixture manifest (YAML)."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Rows for evaluation during training."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder, zip or tar that image names are relative to."})
    index_cache: str | None = field(
        default=None, metadata={"help": "Folder for the index of the rows; a hidden one beside the data by default."}
    )
    lazy_preprocess: bool = field(
        default=True, metadata={"help": "Tokenize a row when it is read; otherwise all rows before the first step."}
    )
    is_multimodal: bool = field(default=True, metadata={"help": "Whether rows may have images."})
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={"help": "square, pad or anyres; the checkpoint's by default, with a warning for any other."},
    )
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": 'Canvases of anyres, (width, height), as in "[[336, 672], [672, 336]]".'}
    )
    on_bad_sample: str = field(
        default="raise", metadata={"help": "raise, or skip: count and log a broken row and read the next instead."}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "With skip: stop when more than this share of the rows is broken."}
    )
    cache_image_features_gb: float = field(
        default=0.0, metadata={"help": "Memory for features of a frozen vision tower, so that an image is encoded once."}
    )

    @property
    def canvases(self) -> list[list[int]] | None:
        """The canvases as numbers, (width, height).

        Raises:
            ValueError: not a list of pairs.
        """
        if self.image_grid_pinpoints is None:
            return None
        try:
            canvases = [[int(width), int(height)] for width, height in ast.literal_eval(self.image_grid_pinpoints)]
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"--image_grid_pinpoints is {self.image_grid_pinpoints!r}; give a list of (width, height) pairs."
            ) from error
        return canvases


@dataclass
class LoraFlags:
    """Flags of LoRA and QLoRA, by LLaVA's names."""

    _argument_group_name = "LoRA and QLoRA"

    lora_enable: bool = field(default=False, metadata={"help": "Train an adapter of the language model in place of its weights."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank; 64, or that of the adapter the run starts from."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale, divided by the rank; 16, or that of the adapter the run starts from."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the matrices; 0.05, or that of the adapter the run starts from."}
    )
    lora_weight_path: str = field(default="", metadata={"help": "Adapter folder to continue from, over --model_name_or_path."})
    lora_bias: str = field(default="none", metadata={"help": "none; biases of the base model are not trained."})
    bits: int = field(default=16, metadata={"help": "16, or 8 or 4: quantise the language model and train an adapter on it (QLoRA)."})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the scales of 4-bit weights too."})
    quant_type: str = field(default="nf4", metadata={"help": "4-bit numbers: nf4 or fp4."})


@dataclass
class StageFlags:
    """What is trained, and how. `None` means the stage's published value."""

    _argument_group_name = "stage"

    learning_rate: float | None = field(default=None, metadata={"help": "The stage's own by default."})
    lr_scheduler_type: str = field(default=PUBLISHED_SCHEDULE, metadata={"help": "Schedule of the learning rate."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows hold images, which the model's forward does not name."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb or none."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder that files of hub ids are kept in (HF_HOME)."})
    stage: str | None = field(default=None, metadata={"help": f"{', '.join(STAGES)}; inferred from the flags without it."})
    tune_mm_mlp_adapter: bool | None = field(default=None, metadata={"help": "Train the projector only (align)."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Freeze the projector."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Freeze the language model."})
    unfreeze_mm_vision_tower: bool | None = field(
        default=None, metadata={"help": "Whether the vision tower is trained; the stage decides by default."}
    )
    tune_router: bool | None = field(default=None, metadata={"help": "Train the router only (rglf)."})
    router_select: bool | None = field(default=None, metadata={"help": "Whether the model has a router."})
    mm_vision_tower_lr: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of similar length, each with images in all rows or in none."}
    )
    model_max_length: int | None = field(
        default=None, metadata={"help": "Longest row, text and visual tokens together; the checkpoint's context by default."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove an earlier run's checkpoints from the output folder and replace its model."}
    )
    accept_lost_state: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint without checksums, or without its optimizer, schedule or random state."},
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Older name of --eval_strategy."})
    warmup_ratio: float | None = field(default=None, metadata={"help": "Share of the steps that warm up."})
    on_nonfinite_loss: str = field(
        default="raise", metadata={"help": "raise, or skip: log the step and its rows, drop its gradients and continue."}
    )


@dataclass
class RouterFlags:
    """The router's stage, RGLF."""

    _argument_group_name = "router (rglf)"

    margin: float = field(default=1.0, metadata={"help": "Scale of the ranking margins (rglf)."})
    rank_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the ranking loss (rglf)."})
    ce_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the cross-entropy (rglf)."})
    granularity_cost_weight: float = field(
        default=0.0, metadata={"help": "Nats per doubling of visual tokens that the router weighs (rglf); 0 is the paper."}
    )
    granularity_scores: str | None = field(
        default=None, metadata={"help": "Parquet of score_granularities: train the router without the language model."}
    )
    router_without_instruction: bool = field(
        default=False, metadata={"help": "Control experiment: the router sees the image only (rglf)."}
    )


@dataclass
class CheckArguments:
    """Flags of the check, beside those of `DataArguments`."""

    _argument_group_name = "check"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint whose config and tokenizer the rows are read with."})
    check: bool = field(default=False, metadata={"help": "Read every row; without it the index is built and rows are counted."})
    version: str | None = field(default=None, metadata={"help": "Conversation template; the checkpoint's by default."})
    vis_token_granularity: str | None = field(default=None, metadata={"help": "Granularities; the checkpoint's by default."})
    model_max_length: int | None = field(default=None, metadata={"help": "Longest row; the checkpoint's by default."})
    output: str | None = field(default=None, metadata={"help": "Folder for report.json and report.png."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes; 0 reads in this one."})
    show: int = field(default=10, metadata={"help": "Findings to print; the report holds all."})


@dataclass
class ScoreArguments:
    """Flags of the scoring pass."""

    _argument_group_name = "scoring"

    model_name_or_path: str = field(metadata={"help": "The checkpoint whose answers are scored."})
    data_path: str = field(metadata={"help": "LLaVA's JSON or JSONL, or a mixture manifest (YAML)."})
    output_file: str = field(metadata={"help": "Parquet file to write."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder, zip or tar that image names are relative to."})
    index_cache: str | None = field(default=None, metadata={"help": "Folder for the index; beside the data by default."})
    version: str | None = field(default=None, metadata={"help": "Conversation template; the checkpoint's by default."})
    vis_token_granularity: str | None = field(default=None, metadata={"help": "Granularities; the checkpoint's by default."})
    batch_size: int = field(
        default=8, metadata={"help": "Rows per pass of the language model; rows about one image share a pass, however many."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that read rows and images ahead; 0: none."})
    part_rows: int = field(default=512, metadata={"help": "Rows per part; an interrupted pass repeats at most one part."})
    device: str | None = field(default=None, metadata={"help": "cuda, mps or cpu; by default the best that is available."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})


@dataclass
class EstimateArguments:
    """Flags of the estimate."""

    _argument_group_name = "estimate"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint; only its config.json is read."})
    preset: str | None = field(default=None, metadata={"help": f"Or a published shape: {', '.join(PRESETS)}."})
    stage: str = field(default="multi_granularity", metadata={"help": f"Stage of the run: {', '.join(STAGES)}."})
    num_gpus: int = field(default=8, metadata={"help": "GPUs of the run, of one machine for the host's memory."})
    gpu_memory_gb: float = field(default=80.0, metadata={"help": "Memory of one GPU in GiB."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per GPU and step, one image each."})
    image_size: str | None = field(default=None, metadata={"help": "WIDTHxHEIGHT of the image; the largest canvas by default."})
    text_tokens: int = field(default=256, metadata={"help": "Text positions of a row, prompt and answer."})
    answer_tokens: int | None = field(
        default=None, metadata={"help": "How many of them are supervised; all by default, which is the most it can cost."}
    )
    dtype: str = field(default="bf16", metadata={"help": f"{', '.join(DTYPES)}."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Run layers again instead of keeping what they computed."})
    zero: str | None = field(default=None, metadata={"help": f"One of {', '.join(ZERO_SETTINGS)}; all by default."})
    lora_r: int = field(default=0, metadata={"help": "Rank of adapters in place of the language model's weights; 0: none."})
    bits: int = field(default=16, metadata={"help": "Of the language model's matrices: 16, 8 or 4."})
    json: str | None = field(default=None, metadata={"help": "File to write all numbers to."})
