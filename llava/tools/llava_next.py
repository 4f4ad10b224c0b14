"""Checkpoints of transformers' `LlavaNextForConditionalGeneration` in this project's LLaVA layout, and back.

What has no counterpart on the other side:
- transformers' model knows one granularity, all patches. A router and coarser granularities are refused unless --drop-router is given.
- It marks an image with a token of the vocabulary, LLaVA with a placeholder outside it. Where the tokenizer has no `<image>`, the token
  is added, and if no spare row is there one row is appended to the embedding and the output layer: the mean of the rows, whose logit is
  the mean of all logits and so never the largest. The way back drops that row. Rows that a checkpoint of transformers came with stay.
- Its config holds no conversation template. One that is written here keeps the template's name and LLaVA's other text settings under
  `llava_fields`; for any other source --conv-version names it. Settings of a training run (learning rates and the like) are dropped.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llava.checkpoint_files import check_dtypes, is_stored_buffer, read_headers, read_object, weight_files
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.durable import whole_folder
from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.chat_template import add_image_token, jinja_template, own_text_behind
from llava.model.config import KEPT_KEY
from llava.model.loading import check_folder, read_stored_config, read_tower_config, resolve_tower
from llava.model.native.llava_layout import Rules, rename
from llava.model.router import name_in_checkpoint
from llava.tokenizer import load_tokenizer

logger = logging.getLogger("llava.convert_llava_next")

FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaConfig, LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": (MistralConfig, LlavaMistralConfig, LlavaMistralForCausalLM),
}
"""Model type of the language model -> its config, ours, our model."""

KEPT_FIELDS = (
    "mm_vision_tower",
    "unpad_rule",
    "conv_version",
    "tokenizer_padding_side",
    "tokenizer_model_max_length",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)
"""Fields of ours that transformers' config has no place for, kept under `KEPT_KEY`."""

IMAGE_PROCESSOR_FIELDS = (
    "size",
    "crop_size",
    "image_mean",
    "image_std",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "resample",
    "do_convert_rgb",
)

Edits = dict[str, Callable[[Tensor], Tensor]]
"""What is done to tensors while they are written, by their new name."""

TOWER_RULE = (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_tower.vision_model.")
TO_LLAVA: Rules = (
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^(?:model\.)?image_newline$", "model.image_newline"),
)
"""Names of any release of transformers -> ours: on the hub, as version 5 saves (no `vision_model.`), and as it has them in memory."""
TO_HUB: Rules = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^model\.", "language_model.model."),
)
"""Our names -> those on the hub, which every release of transformers reads."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with one row per token."""


# --- weights --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk."""

    file: Path
    key: str
    shape: tuple[int, ...]
    num_bytes: int


def stored_tensors(folder: Path, rules: Rules) -> dict[str, Stored]:
    """The tensors of a checkpoint folder under their new names; buffers that today's libraries compute are left out.

    Args:
        rules: (pattern, replacement); the first that matches a name counts.

    Raises:
        ValueError: two tensors with the same new name, a damaged file, or numbers that are no weights.
    """
    check_dtypes(read_headers(weight_files(folder)), folder)
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        with safe_open(str(file), "pt") as tensors:
            for key in tensors.keys():
                if is_stored_buffer(key):
                    continue
                name = rename(key, rules)
                if name in found:
                    raise ValueError(
                        f"{folder} holds {found[name].key} and {key}, which are both {name}; expected one of them, so save it again."
                    )
                part = tensors.get_slice(key)
                shape = tuple(part.get_shape())
                found[name] = Stored(file, key, shape, _count(shape) * _item_bytes(part.get_dtype()))
    return found


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _item_bytes(dtype: str) -> int:
    """Bytes of an element from safetensors' name of its type, such as BF16 or F8_E4M3."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def check_weights(found: dict[str, Stored], model_class: Any, config: Any, source: Path) -> None:
    """Refuse weights that are not exactly those of the configuration, by name and shape.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        built = model_class(config).state_dict()
    expected = {name_in_checkpoint(name): tuple(tensor.shape) for name, tensor in built.items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(found) - optional)
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"The weights of {source} do not fit its config.json: {len(missing)} missing {missing[:3]}, {len(unknown)} unexpected "
            f"{unknown[:3]}; give a complete checkpoint that is not quantised."
        )
    odd = [f"{name} {found[name].shape}, expected {expected[name]}" for name in found if found[name].shape != expected[name]]
    if odd:
        raise ValueError(f"The weights of {source} do not fit its config.json: {'; '.join(odd[:3])}; use the config saved with them.")


def append_mean_row(weight: Tensor) -> Tensor:
    """(V, D) -> (V + 1, D), the new row the mean of the others."""
    return torch.cat([weight, weight.float().mean(dim=0, keepdim=True).to(weight.dtype)])


def drop_last_row(weight: Tensor) -> Tensor:
    """(V + 1, D) -> (V, D)."""
    return weight[:-1].clone()


def write_weights(tensors: dict[str, Stored], edits: Edits, folder: Path, max_shard_bytes: int) -> None:
    """Write safetensors shard by shard, with an index where there are several; one shard is in memory at a time.

    Args:
        tensors: by the name to write. edits: what to do to some of them on the way.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in tensors.items():
        if shards[-1] and filled + stored.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += stored.num_bytes
    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        loaded = _load(names, tensors, edits)
        save_file(loaded, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in loaded.values())
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")


def _load(names: Sequence[str], tensors: dict[str, Stored], edits: Edits) -> dict[str, Tensor]:
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(str(file), "pt")) for file in {tensors[name].file for name in names}}
        loaded = {name: opened[tensors[name].file].get_tensor(tensors[name].key) for name in names}
        return {name: edits[name](tensor) if name in edits else tensor for name, tensor in loaded.items()}


# --- configuration --------------------------------------------------------------------------------------------------------------


def language_fields(config: Any, family: Any) -> dict[str, Any]:
    """The values of a language model's own fields."""
    common = {field.name for field in fields(PretrainedConfig)} - {"bos_token_id", "eos_token_id", "pad_token_id"}
    return {field.name: getattr(config, field.name) for field in fields(family) if field.name not in common}


def vision_fields(config: CLIPVisionConfig) -> dict[str, Any]:
    """The values of a vision tower's own fields, with its model type."""
    common = {field.name for field in fields(PretrainedConfig)}
    own = {field.name: getattr(config, field.name) for field in fields(CLIPVisionConfig) if field.name not in common}
    return {**own, "model_type": CLIPVisionConfig.model_type}


def swap(pinpoints: Sequence[Sequence[int]]) -> list[list[int]]:
    """(height, width) of transformers <-> (width, height) of LLaVA; the order of the canvases breaks ties and stays."""
    return [[second, first] for first, second in pinpoints]


def _raise_together(source: Path, errors: Sequence[str]) -> None:
    if errors:
        raise ValueError(f"{source} cannot be converted: " + "; ".join(errors) + ".")


def read_llava_next(source: Path) -> Any:
    """Read transformers' configuration and refuse what LLaVA's layout cannot hold.

    Raises:
        ValueError: another model type, or one sentence that names every field in the way.
    """
    kind = read_stored_config(source).get("model_type")
    if kind != LlavaNextConfig.model_type:
        raise ValueError(f"{source} is of model type {kind!r}, expected {LlavaNextConfig.model_type!r} for --direction to-llava.")
    config: Any = LlavaNextConfig.from_pretrained(source)
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "the vision tower's model_type": (config.vision_config.model_type, (CLIPVisionConfig.model_type,)),
        "the language model's model_type": (config.text_config.model_type, tuple(FAMILIES)),
        "projector_hidden_act": (config.projector_hidden_act, ("gelu",)),
        "multimodal_projector_bias": (config.multimodal_projector_bias, (True,)),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, ("default",)),
    }
    errors = [
        f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}"
        for name, (value, choices) in expected.items()
        if value not in choices
    ]
    if not isinstance(config.vision_feature_layer, int):
        errors.append(f"vision_feature_layer is {config.vision_feature_layer!r}, expected one layer")
    _raise_together(source, errors)
    return config


def llava_config(source: Path, given: Any, conv_version: str | None) -> Any:
    """Our configuration of a transformers checkpoint, with all its vocabulary rows."""
    kept = getattr(given, KEPT_KEY, None) or {}
    template = conv_version or kept.get("conv_version")
    if template is None:
        raise ValueError(
            f"{source} does not say which conversation template its model was trained with; give --conv-version, such as v1 (Vicuna), "
            "mistral_instruct, chatml_direct or llava_llama_3."
        )
    get_template(template)
    family, config_class, model_class = FAMILIES[given.text_config.model_type]
    processor = CLIPImageProcessorPil.from_pretrained(source).to_dict()
    config = config_class(
        **{**language_fields(given.text_config, family), "tie_word_embeddings": given.tie_word_embeddings},
        **{name: kept[name] for name in KEPT_FIELDS if name in kept and name != "conv_version"},
        conv_version=template,
        vision_config=vision_fields(given.vision_config),
        image_processor={name: processor[name] for name in IMAGE_PROCESSOR_FIELDS if name in processor},
        mm_hidden_size=given.vision_config.hidden_size,
        mm_vision_select_layer=given.vision_feature_layer,
        image_grid_pinpoints=swap(given.image_grid_pinpoints),
    )
    config.architectures = [model_class.__name__]
    config.dtype = given.dtype
    return config


def read_llava(source: Path, drop_router: bool) -> Any:
    """Read our configuration and refuse what transformers' model cannot do.

    Raises:
        ValueError: another model type, or one sentence that names every field in the way.
    """
    kinds = (LlavaConfig.model_type, LlavaMistralConfig.model_type)
    kind = read_stored_config(source).get("model_type")
    if kind not in kinds:
        raise ValueError(f"{source} is of model type {kind!r}, expected {' or '.join(kinds)} for --direction to-transformers.")
    config = AutoConfig.from_pretrained(source)
    if config.vision_config is None:
        if config.mm_vision_tower is None:
            raise ValueError(f"{source} has no vision tower, so it is a plain language model already; nothing is to be converted.")
        config.vision_config, config.image_processor = read_tower_config(resolve_tower(config.mm_vision_tower, source))
    check_for_transformers(config, source, drop_router)
    config.router_select, config.vis_token_granularity, config.vis_token_grids = False, None, None
    return config


def check_for_transformers(config: Any, source: Path, drop_router: bool) -> None:
    """Refuse a configuration of LLaVA's layout that transformers' model cannot hold.

    Args:
        source: the folder that the sentence names.

    Raises:
        ValueError: one sentence that names every field in the way.
    """
    expected = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
    }
    errors = [
        f"{name} is {getattr(config, name)!r}, expected {value!r}" for name, value in expected.items() if getattr(config, name) != value
    ]
    if not drop_router and config.router_select:
        errors.append("it has a router, which transformers' model cannot hold (--drop-router leaves it out)")
    elif not drop_router and any(level.kernel != (1, 1) for level in config.levels):
        errors.append(
            f"it has granularities {config.vis_token_granularity}, of which transformers' model keeps all patches alone (--drop-router)"
        )
    _raise_together(source, errors)


def llava_next_config(config: Any, image_token: int, vocab_size: int) -> Any:
    """Transformers' configuration of one of ours.

    Args:
        image_token: the id that marks an image. vocab_size: rows of the embedding that is written.
    """
    family = FAMILIES[config.language_model_type][0]
    vision = {name: value for name, value in config.vision_config.items() if name != "model_type"}
    made = LlavaNextConfig(
        text_config=family(
            **{**language_fields(config, family), "vocab_size": vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
        ),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=image_token,
        image_grid_pinpoints=swap(config.image_grid_pinpoints),
        vision_feature_layer=config.mm_vision_select_layer,
        image_seq_length=config.patch_grid[0] * config.patch_grid[1],
        tie_word_embeddings=config.tie_word_embeddings,
    )
    made.architectures = ["LlavaNextForConditionalGeneration"]
    made.dtype = config.dtype
    setattr(made, KEPT_KEY, {**{name: getattr(config, name) for name in KEPT_FIELDS}, "vocab_size": config.vocab_size})
    return made


# --- tokenizer ------------------------------------------------------------------------------------------------------------------


def tokenizer_with_image(source: Path, rows: int) -> tuple[PreTrainedTokenizerBase, int]:
    """A checkpoint's tokenizer with `<image>`, and that token's id: below `rows`, those of the vocabulary, or the row to append.

    Raises:
        ValueError: the tokenizer has more tokens than that.
    """
    tokenizer = load_tokenizer(source)
    image_token = add_image_token(tokenizer)
    if image_token > rows:
        raise ValueError(
            f"The tokenizer of {source} has {image_token} tokens, but the model {rows} rows; give the tokenizer saved with it."
        )
    if image_token == rows:
        logger.info("one row is appended to the vocabulary, %d for <image>", image_token)
    return tokenizer, image_token


def without_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer without the `<image>` that `add_image_token` put in."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}, from which <image> cannot be removed; expected one of the tokenizers library."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != DEFAULT_IMAGE_TOKEN]
    options = {
        key: value
        for key, value in tokenizer.init_kwargs.items()
        if key not in ("added_tokens_decoder", "tokenizer_file", "tokenizer_object")
    }
    options["extra_special_tokens"] = [token for token in options.get("extra_special_tokens") or [] if str(token) != DEFAULT_IMAGE_TOKEN]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **options)


# --- the two directions ---------------------------------------------------------------------------------------------------------


def check_new(output: Path) -> None:
    """Refuse to write over something.

    Raises:
        ValueError: `output` is there already.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; name a folder that does not.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name once complete, and that disappears if anything goes wrong.

    Raises:
        ValueError: `output` is there already.
    """
    check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as staging:
        yield staging


def to_llava(source: Path, output: Path, conv_version: str | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Convert transformers' layout to ours.

    Args:
        conv_version: the conversation template of the model, a name from `conv_templates`; needed unless the source says it.

    Raises:
        ValueError: a source that is incomplete or has no counterpart, or an output that exists.
    """
    check_folder(source, True)
    given = read_llava_next(source)
    config = llava_config(source, given, conv_version)
    tensors = stored_tensors(source, TO_LLAVA)
    check_weights(tensors, FAMILIES[config.language_model_type][2], config, source)
    # The name stored there would make AutoProcessor build transformers' processor for this checkpoint.
    tokenizer = load_tokenizer(source, processor_class=None)
    tokenizer.chat_template = None
    rows = (getattr(given, KEPT_KEY, None) or {}).get("vocab_size")
    edits: Edits = {}
    if rows is not None and given.image_token_index == rows and config.vocab_size == rows + 1:
        logger.info("the row of <image>, %d, which was appended for transformers, is dropped", rows)
        config.vocab_size = rows
        tokenizer = without_image_token(tokenizer)
        edits = {name: drop_last_row for name in VOCABULARY if name in tensors}
    else:
        logger.info("all %d rows of the vocabulary stay, that of <image> (%d) unused", config.vocab_size, given.image_token_index)
    with new_folder(output) as staging:
        config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        copy_generation_config(source, staging)
        write_weights(tensors, edits, staging, max_shard_bytes)


def to_transformers(source: Path, output: Path, drop_router: bool = False, max_shard_bytes: int = 5 * 10**9) -> None:
    """Convert our layout to transformers'.

    Args:
        drop_router: leave out the router and the coarser granularities of a source that has them.

    Raises:
        ValueError: a source that is incomplete or that transformers' model cannot hold, or an output that exists.
    """
    check_folder(source, True)
    config = read_llava(source, drop_router)
    tensors = stored_tensors(source, (TOWER_RULE,))
    router = [name for name in tensors if name.startswith("model.router.")]
    if router and not drop_router:
        raise ValueError(
            f"{source} holds a router ({router[0]}, ...), which transformers' model cannot hold; leave it out with --drop-router."
        )
    if router:
        logger.info("%d tensors of the router are dropped", len(router))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in router}
    check_weights(tensors, FAMILIES[config.language_model_type][2], config, source)
    tokenizer, image_token = tokenizer_with_image(source, config.vocab_size)
    edits: Edits = {}
    if image_token == config.vocab_size:
        edits = {rename(name, TO_HUB): append_mean_row for name in VOCABULARY if name in tensors}
    made = llava_next_config(config, image_token, max(config.vocab_size, image_token + 1))
    processor = _llava_next_processor(config, made, tokenizer)
    with new_folder(output) as staging:
        made.save_pretrained(staging)
        processor.save_pretrained(staging)
        processor.image_processor.save_pretrained(staging)
        copy_generation_config(source, staging)
        write_weights({rename(name, TO_HUB): tensor for name, tensor in tensors.items()}, edits, staging, max_shard_bytes)


def _llava_next_processor(config: Any, made: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaNextProcessor:
    side = made.vision_config.image_size
    processor = config.image_processor or {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**processor, image_grid_pinpoints=made.image_grid_pinpoints),
        tokenizer=tokenizer,
        patch_size=made.vision_config.patch_size,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which the strategy takes off again
        chat_template=jinja_template(get_template(config.conv_version), behind_image=own_text_behind(tokenizer, DEFAULT_IMAGE_TOKEN)),
    )


def copy_generation_config(source: Path, folder: Path) -> None:
    """Take a checkpoint's generation settings along, where it has any.

    Raises:
        ValueError: the file holds something else; a link might lead to what its owner does not mean to publish.
    """
    file = source / "generation_config.json"
    if file.is_file():
        read_object(file)
        shutil.copyfile(file, folder / file.name)
