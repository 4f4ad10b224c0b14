"""The model and tokenizer that a run starts from: a language model plus a new multimodal part, or a checkpoint of ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llava.checkpoint_files import hub_options
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.conversation import conv_templates
from llava.model.adapter import adapter_base, is_adapter, tokenizer_source
from llava.model.builder import MODEL_CLASSES, PLAIN_CONFIGS, check_vocabulary, load_adapter_model
from llava.model.config import check_language_fields
from llava.model.loading import load_tower_weights, read_stored_config, read_tower_config, resolve_tower
from llava.model.projector import load_projector
from llava.model.vocabulary import embed_new_tokens
from llava.tokenizer import load_tokenizer
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.lora import attach_lora, quantization_options

logger = logging.getLogger(__name__)

FLAG_FIELDS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "unpad_rule",
    "router_attention_axis",
    "router_hidden_size",
    "router_dropout",
    "filtered_text_num",
)
"""Flags of `ModelArguments` that are configuration fields of the same name."""

WEIGHT_FIELDS = ("mm_projector_type", "mm_vision_select_feature")
"""Fields that decide what weights a checkpoint with a vision tower holds."""

ROUTER_FIELDS = ("vis_token_granularity", "router_attention_axis", "router_hidden_size", "filtered_text_num")
"""Fields that decide what weights a trained router holds."""

IMAGE_FIELDS = (
    "image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type", "unpad_rule", "mm_vision_select_layer",
)  # fmt: skip
"""Fields that change no weight's shape, but what the trained weights see of an image."""


def read_model_config(path: str) -> Any:
    """The configuration of one of our checkpoints, completed with that of its vision tower; no weights are read.

    Raises:
        ValueError: not a checkpoint of this package, or one without a vision tower.
    """
    try:
        kind = read_stored_config(path).get("model_type")
    except ValueError as error:
        raise ValueError(f"no config can be read at {path!r}; give a checkpoint folder or a hub id that can be reached.") from error
    if kind not in MODEL_CLASSES:
        raise ValueError(
            f"{path} is of model type {kind!r}, expected one of {', '.join(MODEL_CLASSES)}; give a checkpoint with a vision "
            "tower that has the same language model, tokenizer and canvases."
        )
    config = MODEL_CLASSES[kind]._read_config(path)
    MODEL_CLASSES[kind]._complete_tower(config, path)
    if config.vision_config is None:
        raise ValueError(f"{path} has no vision tower; give the checkpoint that training starts from or leads to.")
    return config


def model_outline(config: Any) -> Any:
    """The model of a configuration without storage: modules, names and shapes on the meta device."""
    with torch.device("meta"):
        return MODEL_CLASSES[config.model_type](config)


def config_overrides(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """The configuration fields that flags set, and their values."""
    fields = {name: getattr(model_args, name) for name in FLAG_FIELDS}
    fields["vis_token_granularity"] = model_args.granularities
    fields["image_aspect_ratio"] = data_args.image_aspect_ratio
    fields["image_grid_pinpoints"] = data_args.canvases
    if training_args.router_without_instruction:
        fields["filtered_text_num"] = 0
    return {name: value for name, value in fields.items() if value is not None}


def load_model(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load or assemble the model that a stage starts from, with its tokenizer.

    An adapter folder is merged into its base model, or, with `--lora_enable`, trained further.

    Raises:
        ValueError: flags that do not fit the checkpoint.
    """
    path = model_args.model_name_or_path
    adapter = training_args.lora_weight_path or (path if is_adapter(path) else None)
    base = adapter_base(adapter, None if adapter == path else path) if adapter else path
    hub = training_args.hub_options
    kind = read_stored_config(path, hub).get("model_type", "")
    overrides = config_overrides(model_args, data_args, training_args)
    options: dict[str, Any] = {"dtype": _weights_dtype(training_args), **quantization_options(training_args, path), **hub}
    if adapter and model_args.allow_bin_weights:
        options["use_safetensors"] = False
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    if adapter:
        model = load_adapter_model(adapter, base, options, with_lora=not training_args.lora_enable)[0]
        _apply_flags(model, adapter, overrides, model_args, training_args)
    elif kind in MODEL_CLASSES:
        model = MODEL_CLASSES[kind].from_pretrained(path, **options)
        _apply_flags(model, path, overrides, model_args, training_args)
    else:
        model = _from_language_model(path, kind, overrides, model_args, options)
    if model_args.pretrain_mm_mlp_adapter is not None:
        load_projector(model, Path(model_args.pretrain_mm_mlp_adapter), model_args.allow_bin_weights)
    if training_args.router_select or training_args.stage == "rglf":
        model.model.initialize_router()
    _check_stage_fits(model, training_args)
    if training_args.router_select is False and model.model.router is not None:
        raise ValueError(f"--router_select is False, but {path} has a router, which stays; drop the flag.")
    model.config.description = None  # it described the checkpoint that the run starts from
    tokenizer_path = tokenizer_source(adapter, base) if adapter else path
    tokenizer = _load_tokenizer(tokenizer_path, model, model_args, training_args)
    if training_args.lora_enable:
        attach_lora(model, training_args, base, adapter, options["dtype"])
    return model, tokenizer


def _weights_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Master weights are float32; only DeepSpeed keeps its own float32 copy of 16-bit weights."""
    if training_args.deepspeed and training_args.bf16:
        return torch.bfloat16
    return torch.float16 if training_args.deepspeed and training_args.fp16 else torch.float32


def _from_language_model(
    path: str, kind: str, overrides: dict[str, Any], model_args: ModelArguments, options: dict[str, Any]
) -> Any:
    families = {family.config_class.language_model_type: family for family in MODEL_CLASSES.values()}
    if kind not in PLAIN_CONFIGS:
        raise ValueError(f"{path} is of model type {kind!r}; expected one of {', '.join([*PLAIN_CONFIGS, *MODEL_CLASSES])}.")
    missing = [
        f"--{name}" for name in ("vision_tower", "mm_projector_type") if getattr(model_args, name) is None
    ]
    if missing:
        raise ValueError(f"{path} is a plain language model; give {' and '.join(missing)} to make it multimodal.")
    family = families[kind]
    assert model_args.vision_tower is not None
    tower = resolve_tower(model_args.vision_tower, path)
    hub = hub_options(options)
    vision_config, image_processor = read_tower_config(tower, hub)
    stored = read_stored_config(path, hub)
    check_language_fields(stored, PLAIN_CONFIGS[kind])
    language_fields = {name: value for name, value in stored.items() if name not in ("model_type", "architectures")}
    config = family.config_class(
        **language_fields,
        **{
            **overrides,
            "mm_vision_tower": model_args.vision_tower,
            "vision_config": vision_config,
            "image_processor": image_processor,
        },
    )
    return family.from_base(path, config, tower, **options)


def _apply_flags(
    model: Any, path: str, overrides: dict[str, Any], model_args: ModelArguments, training_args: TrainingArguments
) -> None:
    """Change a checkpoint's configuration as the flags ask, where its weights allow that."""
    config = model.config
    changed = {name: value for name, value in overrides.items() if _plain(getattr(config, name)) != _plain(value)}
    fixed = [name for name in WEIGHT_FIELDS if name in changed]
    if model.model.router is not None:
        fixed += [name for name in ROUTER_FIELDS if name in changed]
    if fixed:
        differences = ", ".join(f"{name} {getattr(config, name)!r} against {changed[name]!r}" for name in fixed)
        raise ValueError(f"checkpoint {path} was trained with other values than the flags ask for: {differences}; drop the flags.")
    change_fields(config, path, changed)
    if "mm_vision_select_layer" in changed:
        model.get_vision_tower().choose_layer(config.mm_vision_select_layer)
    if "router_dropout" in changed and model.model.router is not None:
        model.model.router.set_dropout(config.router_dropout)
    if model_args.vision_tower is not None and model_args.vision_tower != config.mm_vision_tower:
        if config.language_model_type is None:
            raise ValueError(f"--vision_tower is {model_args.vision_tower!r}, but {path} brings a tower that stays; drop the flag.")
        if training_args.lora_enable:
            raise ValueError(
                f"--vision_tower is {model_args.vision_tower!r}, but {path} was trained with {config.mm_vision_tower!r}; an adapter "
                "cannot change towers, so drop the flag or train stage align first."
            )
        load_tower_weights(model, resolve_tower(model_args.vision_tower, path), training_args.hub_options)
        config.mm_vision_tower = model_args.vision_tower
    if config.mm_patch_merge_type == "spatial_unpad":
        model.model.initialize_newline()


def change_fields(config: Any, path: str, changed: dict[str, Any]) -> None:
    """Change fields of a checkpoint's configuration, and warn where its weights were trained with other values.

    Raises:
        ValueError: the fields do not fit each other.
    """
    for name, value in changed.items():
        old = getattr(config, name)
        if name in IMAGE_FIELDS:
            logger.warning(
                "checkpoint %s was trained with %s %r, but --%s is %r: from here on it sees images differently; drop the flag unless you "
                "mean that", path, name, old, name, value,
            )  # fmt: skip
        else:
            logger.info("%s: %r of the checkpoint becomes %r", name, old, value)
        setattr(config, name, value)
    config.check_multimodal_fields()


def _check_stage_fits(model: Any, training_args: TrainingArguments) -> None:
    if training_args.stage_plan.needs_granularities and len(model.levels) < 2:
        raise ValueError(
            f"stage {training_args.stage} compares granularities, but the model has {len(model.levels)}; give "
            '--vis_token_granularity, as in "36,72,144,288,576".'
        )


def _load_tokenizer(
    path: str, model: Any, model_args: ModelArguments, training_args: TrainingArguments
) -> PreTrainedTokenizerBase:
    config = model.config
    version = model_args.version or training_args.stage_plan.version
    if version not in conv_templates:
        raise ValueError(f"--version is {version!r}; choose one of {', '.join(conv_templates)}.")
    limit = training_args.model_max_length or config.tokenizer_model_max_length or config.context_length
    if limit > config.context_length:
        raise ValueError(
            f"--model_max_length is {limit}, but the language model was built for {config.context_length}; give at most that."
        )
    tokenizer = load_tokenizer(path, model_max_length=limit, padding_side="right", **training_args.hub_options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config.tokenizer_model_max_length = limit
    config.tokenizer_padding_side = "right"
    if training_args.stage_plan.name != "align":
        config.conv_version = version
    _add_image_tokens(model, tokenizer, training_args)
    check_vocabulary(tokenizer, model)
    return tokenizer


def _add_image_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, training_args: TrainingArguments) -> None:
    """Add LLaVA's extra tokens around images; the embedding of a new token is the mean of the old ones."""
    wanted = [DEFAULT_IMAGE_PATCH_TOKEN] if model.config.mm_use_im_patch_token else []
    if model.config.mm_use_im_start_end:
        wanted += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if not wanted or not tokenizer.add_tokens(wanted, special_tokens=True):
        return
    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= old:
        return
    if training_args.lora_enable:
        raise ValueError(
            f"--mm_use_im_start_end or --mm_use_im_patch_token adds {len(tokenizer) - old} rows to the vocabulary, which an adapter "
            "does not hold; train stage align with them first, then LoRA."
        )
    embed_new_tokens(model, len(tokenizer), len(tokenizer) - old)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
