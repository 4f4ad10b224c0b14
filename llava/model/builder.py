"""`load_pretrained_model`: one call from a path to everything an answer needs. The kind of model is read from its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, LlamaConfig, MistralConfig, PreTrainedTokenizerBase

from llava.checkpoint_files import hub_options, read_weights, weight_files
from llava.model.adapter import (
    adapter_base,
    attach_adapter,
    is_adapter,
    is_stock_adapter,
    load_lora,
    load_rest,
    merge_adapter,
    merge_stock_adapter,
    read_lora_config,
    read_rest,
    tokenizer_source,
)
from llava.model.config import LlavaConfig, LlavaMistralConfig, check_language_fields
from llava.model.front import front_of
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_native import LlavaNativeConfig, LlavaNativeForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import check_plain_model, read_stored_config, resolve_tower
from llava.model.quantization import quantization_config
from llava.rules import shown
from llava.tokenizer import load_tokenizer
from llava.utils import pick_device

logger = logging.getLogger(__name__)

MODEL_CLASSES: dict[str, Any] = {
    LlavaConfig.model_type: LlavaLlamaForCausalLM,
    LlavaMistralConfig.model_type: LlavaMistralForCausalLM,
    LlavaNativeConfig.model_type: LlavaNativeForCausalLM,
}
"""Model type in config.json -> the class that reads it, with LLaVA's contract."""

PLAIN_CONFIGS: dict[str, Any] = {LlavaConfig.language_model_type: LlamaConfig, LlavaMistralConfig.language_model_type: MistralConfig}
"""Model type of a plain language model -> transformers' configuration for it."""

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | None = None,
    use_flash_attn: bool = False,
    front_only: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedTokenizerBase, Any, CLIPImageProcessorPil | None, int]:
    """Load a checkpoint for inference.

    Args:
        model_path: a folder or hub id: a full checkpoint in LLaVA's layout or the native one, an adapter folder (LoRA), or a folder with
            a config and only a projector (then give `model_base`).
        model_base: the model that a projector-only or adapter folder belongs to; an adapter may name its own.
        model_name: accepted for LLaVA's callers; nothing is decided by a name.
        load_8bit, load_4bit: quantise the language model with bitsandbytes; tower, projector and router stay whole. An adapter is
            merged into the language model otherwise; here it stays beside the quantised weights, as merging would round it away. One that
            PEFT alone wrote is merged first.
        device_map: "auto" puts the model on the best device here, and spreads it where there are several; otherwise transformers' own.
        device: cuda, mps or cpu; by default the best that is there. A device other than cuda overrides `device_map`.
        use_flash_attn: the language model uses flash attention 2.
        front_only: load a whole multimodal checkpoint without its language layers, see `llava.model.front`.
        kwargs: `dtype` or `torch_dtype` (default: the checkpoint's), `attn_implementation`, `use_safetensors`, and transformers' others.
            Those that say where files come from (`cache_dir`, `token`, `local_files_only` ...) hold for the tokenizer, the vision tower and
            `model_base` too. LLaVA's `multimodal` is accepted.

    Returns:
        (tokenizer, model in eval mode, image processor or `None` for a plain language model, context length).

    Raises:
        ValueError: a folder that is not a checkpoint, another model type, flags that contradict, or keys that do not fit.
        ImportError: quantised weights are asked for and bitsandbytes is not installed.
    """
    options = _loading_options(load_8bit, load_4bit, device_map, device, use_flash_attn, kwargs)
    hub = hub_options(options)
    if load_4bit and options["device_map"] == {"": "cpu"}:
        check_4bit_on_cpu(model_path, hub)
    if model_base is not None and _is_whole(model_path, hub):
        logger.warning("model_base %s is left aside: %s is a whole model, which needs none", model_base, model_path)
        model_base = None
    if front_only and (model_base is not None or is_adapter(model_path)):
        raise ValueError(f"{model_path} is no whole model, of which a front could be read; merge it with its base first.")
    tokenizer = _load_tokenizer(_tokenizer_source(model_path, model_base), hub)
    if front_only:
        model = _load_front(model_path, options)
    elif is_adapter(model_path):
        model, _ = load_adapter_model(model_path, model_base, options, merge=not (load_8bit or load_4bit))
    elif model_base is not None:
        model = _load_with_base(model_path, model_base, options)
    else:
        model = _load_whole(model_path, options)
    _add_image_tokens(tokenizer, model)
    check_vocabulary(tokenizer, model)
    model.eval()
    tower = model.model.get_vision_tower() if isinstance(model, LlavaMetaForCausalLM) else None
    context = getattr(model.config, "context_length", None) or model.config.max_position_embeddings
    return tokenizer, model, None if tower is None else tower.image_processor, context


def _is_whole(path: str, hub: Mapping[str, Any]) -> bool:
    """Whether a folder has weights of its own and neither an adapter nor a projector to put over other weights."""
    folder = Path(path)
    return bool(weight_files(folder, hub)) and not is_adapter(folder) and not any((folder / name).is_file() for name in PROJECTOR_FILES)


def _tokenizer_source(model_path: str, model_base: str | None) -> str:
    if is_adapter(model_path):
        return tokenizer_source(model_path, adapter_base(model_path, model_base))
    return model_base or model_path


def _load_tokenizer(path: str, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model whose config.json, which transformers reads with it, has been judged."""
    _read_model_config(path, hub)
    return load_tokenizer(path, **hub)


def _load_whole(path: str, options: dict[str, Any]) -> Any:
    hub = hub_options(options)
    model_class, stored = _read_model_config(path, hub)
    if model_class is AutoModelForCausalLM:
        check_plain_model(path, stored, PLAIN_CONFIGS[stored["model_type"]], options.get("use_safetensors", True), hub)
    return model_class.from_pretrained(path, **options)


def _load_front(path: str, options: dict[str, Any]) -> Any:
    model_class, _ = _read_model_config(path, hub_options(options))
    if model_class is AutoModelForCausalLM:
        raise ValueError(f"{path} is a plain language model: without its language layers, nothing remains of it.")
    return front_of(model_class).from_pretrained(path, **options)


def _loading_options(
    load_8bit: bool, load_4bit: bool, device_map: Any, device: str | None, use_flash_attn: bool, given: dict[str, Any]
) -> dict[str, Any]:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit are both on; choose one.")
    options = {key: value for key, value in given.items() if key not in ("multimodal", "torch_dtype", "dtype")}
    if "torch_dtype" in given and "dtype" in given:
        raise ValueError(f"torch_dtype={given['torch_dtype']} and dtype={given['dtype']} are both given; they mean the same, give one.")
    options["dtype"] = given.get("dtype", given.get("torch_dtype")) or "auto"
    if use_flash_attn:
        if options.setdefault("attn_implementation", "flash_attention_2") != "flash_attention_2":
            raise ValueError(f"use_flash_attn contradicts attn_implementation={options['attn_implementation']!r}; give one.")
    chosen = device or pick_device()
    _check_device(chosen)
    options["device_map"] = device_map if chosen == "cuda" and device_map is not None else {"": chosen}
    if load_8bit or load_4bit:
        compute = options["dtype"] if isinstance(options["dtype"], torch.dtype) else torch.float32 if chosen == "cpu" else torch.bfloat16
        options["quantization_config"] = quantization_config(8 if load_8bit else 4, compute)
    return options


def load_adapter_model(
    folder: str, model_base: str | None, options: dict[str, Any], merge: bool = True, with_lora: bool = True
) -> tuple[Any, str]:
    """The model underneath an adapter with the adapter's whole parts, and its LoRA matrices merged or attached.

    Args:
        folder: the adapter folder. model_base: see `load_pretrained_model`.
        options: for transformers' `from_pretrained`; a `dtype` of "auto" means that of the model underneath.
        merge: put the matrices into the weights; otherwise they stay apart, in float32.
        with_lora: `False` leaves the matrices out, for a caller that attaches them itself.

    A folder that PEFT alone wrote is always merged.

    Returns:
        (model, the model underneath by path or hub id).

    Raises:
        ValueError: parts that do not fit together, or that neither folder has.
    """
    base = adapter_base(folder, model_base)
    use_safetensors = options.get("use_safetensors", True)
    if is_stock_adapter(folder):
        if not (merge and with_lora):
            raise ValueError(
                f"{folder} was written by PEFT alone, so it can only be merged into the model under it, in 16 or 32 bits; write the merged "
                "model with scripts/merge_lora_weights.py, and quantise or train that."
            )
        return merge_stock_adapter(_load_whole(base, options), folder, use_safetensors), base
    rest = read_rest(folder, use_safetensors)
    model_class = _model_class(folder)
    if model_class not in MODEL_CLASSES.values():
        kinds = ", ".join(MODEL_CLASSES)
        raise ValueError(f"{folder} is an adapter of a plain language model; expected a config.json of type {kinds} in it.")
    config = model_class._read_config(folder)
    if options.get("dtype") == "auto":
        stored = _read_model_config(base, hub_options(options))[1]
        config.dtype = stored.get("dtype", stored.get("torch_dtype"))
    tower = model_class._complete_tower(config, folder, hub_options(options))
    model = model_class.from_base(base, config, tower, held=rest, **options)
    load_rest(model, rest, folder)
    if with_lora:
        attach_adapter(model, read_lora_config(folder))
        load_lora(model, folder, use_safetensors)
        if merge:
            merge_adapter(model)
    return model, base


def _check_device(device: str) -> None:
    kind = str(device).split(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present:
        raise ValueError(f"device is {device!r}, expected cuda, mps or cpu.")
    if not present[kind]:
        raise ValueError(f"device is {device!r}, but this machine has no {kind}; use {pick_device()}.")


def check_4bit_on_cpu(path: str, hub: Mapping[str, Any] | None = None) -> None:
    """Refuse widths that cannot work.

    bitsandbytes packs 4-bit weights for the CPU in blocks of 64 inputs and fails in the first forward where they do not fit.

    Raises:
        ValueError: a width that is no multiple of 64.
    """
    stored = _read_model_config(path, hub)[1]
    stored = stored.get("text_config", stored)
    odd = {name: stored[name] for name in ("hidden_size", "intermediate_size") if name in stored and stored[name] % 64}
    if odd:
        raise ValueError(f"4-bit on the CPU needs widths that are multiples of 64, but {path} has {odd}; use load_8bit or a GPU.")


def _model_class(path: str) -> Any:
    """The class for a checkpoint, from the `model_type` in its config.json."""
    return _read_model_config(path)[0]


def _read_model_config(path: str, hub: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """The class for a checkpoint, from the `model_type` in its config.json, and what stands there, judged.

    Raises:
        ValueError: no checkpoint, another model type, or values of its language model that cannot work.
    """
    stored = read_stored_config(path, hub)
    kind = stored.get("model_type")
    if kind not in (*MODEL_CLASSES, *PLAIN_CONFIGS):
        raise ValueError(f"{path} is of model type {shown(kind)}, expected one of {', '.join(MODEL_CLASSES)}, or a plain llama or mistral.")
    if kind in PLAIN_CONFIGS:
        check_language_fields(stored, PLAIN_CONFIGS[kind])
        return AutoModelForCausalLM, stored
    MODEL_CLASSES[kind].config_class.from_dict(stored)
    return MODEL_CLASSES[kind], stored


def _load_with_base(model_path: str, model_base: str, options: dict[str, Any]) -> Any:
    """A projector-only folder over its language model: the config and projector are ours, the rest is the base's and the tower's."""
    use_safetensors = options.get("use_safetensors", True)
    weights = read_projector(Path(model_path), use_safetensors)
    model_class = _model_class(model_path)
    config = model_class._read_config(model_path)
    tower = model_class._complete_tower(config, model_path, hub_options(options))
    if tower is None:
        raise ValueError(
            f"{model_path} names no mm_vision_tower, so its projector has nothing to project; use the config.json saved with it."
        )
    model = model_class.from_base(model_base, config, resolve_tower(tower, model_path), **options)
    expected = {key for key in model.state_dict() if key.startswith(("model.mm_projector.", "model.image_newline"))}
    own = model.state_dict()
    missing = expected - set(weights) - {"model.image_newline"}
    wrong = {name for name, weight in weights.items() if name not in own or own[name].shape != weight.shape}
    if missing or wrong:
        raise ValueError(
            f"The projector in {model_path} does not fit: missing {sorted(missing)}, unexpected or of another shape {sorted(wrong)}; "
            "check its base and config.json."
        )
    model.load_state_dict(weights, strict=False)
    return model


def read_projector(folder: Path, use_safetensors: bool = True) -> dict[str, torch.Tensor]:
    """Read a projector file: parameter names as in a full checkpoint.

    Args:
        use_safetensors: `False` also reads LLaVA's pickled `mm_projector.bin`, with `weights_only`.

    Raises:
        ValueError: no projector there, or only a pickled one that the caller did not ask for.
    """
    safe, pickled = (folder / name for name in PROJECTOR_FILES)
    if safe.is_file():
        return read_weights(safe)
    if pickled.is_file() and not use_safetensors:
        stored = torch.load(pickled, map_location="cpu", weights_only=True)
        return {key.removeprefix("base_model.model."): value for key, value in stored.items()}
    if pickled.is_file():
        raise ValueError(f"{folder} holds a pickled projector only; pass use_safetensors=False if you trust it.")
    raise ValueError(f"{folder} holds no projector: expected {PROJECTOR_FILES[0]}.")


def _add_image_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """LLaVA's optional extra tokens, for checkpoints that were trained with them."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    wanted = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", False) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        wanted += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if wanted and tokenizer.add_tokens(wanted, special_tokens=True):
        model.resize_token_embeddings(len(tokenizer))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Raises:
        ValueError: naming both sizes.
    """
    rows, ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise ValueError(
            f"The tokenizer has {ids} ids, but the model embeds {rows}: the files belong to different models; use the tokenizer that was "
            "saved with the weights."
        )
