"""Checkpoints of LLaVA's layout in the native one (`avg_llava`), and back. No weight is computed anew.

Where the tokenizer has no `<image>`, it is added, and if no spare row is there one row is appended to the embedding and the output layer,
the mean of the others; the way back drops it. What only LLaVA's layout has a place for is kept under `llava_fields` of the native config.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from llava.conversation import get_template
from llava.model.answers import answer_marks
from llava.model.config import KEPT_KEY, GranularityFields
from llava.model.loading import check_folder, read_tower_config, resolve_tower
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.model.native.hub import CARD
from llava.model.native.image_processing_avg_llava import AvgLlavaImageProcessor
from llava.model.native.llava_layout import TO_LLAVA, TO_NATIVE, llava_config, native_config, rename
from llava.model.native.model_card import model_card
from llava.model.native.processing_avg_llava import AvgLlavaProcessor
from llava.tokenizer import load_tokenizer
from llava.tools.llava_next import (
    FAMILIES,
    IMAGE_PROCESSOR_FIELDS,
    KEPT_FIELDS,
    TOWER_RULE,
    VOCABULARY,
    Edits,
    append_mean_row,
    check_weights,
    copy_generation_config,
    drop_last_row,
    new_folder,
    stored_tensors,
    tokenizer_with_image,
    without_image_token,
    write_weights,
)
from llava.tools.portable_code import write_code

logger = logging.getLogger("llava.convert")


@dataclass(frozen=True)
class Extras:
    """What a native folder holds besides the model: code for `trust_remote_code=True`, and what its card says (`model_card`)."""

    with_code: bool = False
    report: Mapping[str, Any] | None = None
    license_id: str | None = None
    base_models: Sequence[str] = ()

    def write(self, folder: Path, config: AvgLlavaConfig, name: str) -> None:
        """Write the card, and the code where it is wanted.

        Args:
            name: what the model is loaded by.
        """
        with torch.device("meta"):
            model = AvgLlavaForConditionalGeneration(config)
        card = model_card(model, name, self.report, self.license_id, self.base_models)
        (folder / CARD).write_text(card, encoding="utf-8")
        if self.with_code:
            write_code(folder)


NO_EXTRAS = Extras()


def to_native(source: Path, output: Path, max_shard_bytes: int = 5 * 10**9, extras: Extras = NO_EXTRAS) -> None:
    """Convert LLaVA's layout to the native one.

    Raises:
        ValueError: a source that is incomplete or that the native model cannot hold, or an output that exists.
    """
    check_folder(source, True)
    config = AutoConfig.from_pretrained(source)
    if config.vision_config is None:
        if config.mm_vision_tower is None:
            raise ValueError(f"{source} has no vision tower, so it is a plain language model; nothing is to be converted.")
        config.vision_config, config.image_processor = read_tower_config(resolve_tower(config.mm_vision_tower, source))
    tensors = stored_tensors(source, (TOWER_RULE,))
    check_weights(tensors, FAMILIES[config.language_model_type][2], config, source)
    tokenizer, image_token = tokenizer_with_image(source, config.vocab_size)
    edits: Edits = {}
    if image_token == config.vocab_size:
        edits = {rename(name, TO_NATIVE): append_mean_row for name in VOCABULARY if name in tensors}
    made = native_config(config, image_token, max(config.vocab_size, image_token + 1))
    made.architectures = [AvgLlavaForConditionalGeneration.__name__]
    if made.answer_start is None:
        made.answer_start, made.answer_end = answer_marks(tokenizer, get_template(config.conv_version))
    setattr(made, KEPT_KEY, {**{name: getattr(config, name) for name in KEPT_FIELDS}, "vocab_size": config.vocab_size})
    processor = AvgLlavaProcessor.for_model(made, tokenizer, config.image_processor, config.image_aspect_ratio)
    with new_folder(output) as staging:
        made.save_pretrained(staging)
        processor.save_pretrained(staging)
        copy_generation_config(source, staging)
        extras.write(staging, made, output.name)
        write_weights({rename(name, TO_NATIVE): tensor for name, tensor in tensors.items()}, edits, staging, max_shard_bytes)


def copy_native(source: Path, output: Path, max_shard_bytes: int = 5 * 10**9, extras: Extras = NO_EXTRAS) -> None:
    """Write a native folder anew: complete, checked, in shards of this size, with a card and, where wanted, code.

    Raises:
        ValueError: a source that is incomplete, or an output that exists.
    """
    check_folder(source, True)
    config: Any = AvgLlavaConfig.from_pretrained(source)
    processor: Any = AvgLlavaProcessor.from_pretrained(source)
    for part in (config, processor.image_processor):  # which name the files of code, where the source has some
        part.__dict__.pop("auto_map", None)
    tensors = stored_tensors(source, ())
    check_weights(tensors, AvgLlavaForConditionalGeneration, config, source)
    with new_folder(output) as staging:
        config.save_pretrained(staging)
        processor.save_pretrained(staging)
        copy_generation_config(source, staging)
        extras.write(staging, config, output.name)
        write_weights(tensors, {}, staging, max_shard_bytes)


def read_as_llava(source: Path, config: AvgLlavaConfig) -> Any:
    """LLaVA's configuration of a native folder.

    Raises:
        ValueError: a model that LLaVA's layout cannot hold.
    """
    views: Any = AvgLlavaImageProcessor.from_pretrained(source)
    kept = getattr(config, KEPT_KEY, None) or {}
    shared = {each.name for each in fields(GranularityFields)}
    settings = {name: kept[name] for name in KEPT_FIELDS if name in kept and name not in shared}
    arguments = views.to_dict()
    return llava_config(
        config,
        {name: arguments[name] for name in IMAGE_PROCESSOR_FIELDS if name in arguments},
        **{**settings, "image_aspect_ratio": views.image_aspect_ratio},
    )


def from_native(source: Path, output: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Convert the native layout to LLaVA's.

    Raises:
        ValueError: a source that is incomplete or that LLaVA's layout cannot hold, or an output that exists.
    """
    check_folder(source, True)
    config: Any = AvgLlavaConfig.from_pretrained(source)
    made = read_as_llava(source, config)
    model_class = FAMILIES[made.language_model_type][2]
    made.architectures = [model_class.__name__]
    tensors = stored_tensors(source, TO_LLAVA)
    check_weights(tensors, model_class, made, source)
    # The name stored there would make AutoProcessor build the native processor for this checkpoint.
    tokenizer = load_tokenizer(source, processor_class=None)
    tokenizer.chat_template = None
    edits: Edits = {}
    rows = (getattr(config, KEPT_KEY, None) or {}).get("vocab_size")
    if rows is not None and config.image_token_id == rows and made.vocab_size == rows + 1:
        logger.info("the row of <image>, %d, which was appended for the native layout, is dropped", rows)
        made.vocab_size = rows
        tokenizer = without_image_token(tokenizer)
        edits = {name: drop_last_row for name in VOCABULARY if name in tensors}
    with new_folder(output) as staging:
        made.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        copy_generation_config(source, staging)
        write_weights(tensors, edits, staging, max_shard_bytes)
