"""LLaVA's layout and the native one, in both directions: names of weights, and configurations. No weight is computed anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from llava.model.config import GranularityFields, LlavaConfig, LlavaMistralConfig
from llava.model.native.configuration_avg_llava import AvgLlavaConfig

Rules = Sequence[tuple[str, str]]

TO_NATIVE: Rules = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.image_newline$", "model.image_newline.weight"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
"""Names of LLaVA's layout -> native ones; the router's and the head's are the same."""
TO_LLAVA: Rules = (
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "model.mm_projector."),
    (r"^model\.image_newline\.weight$", "model.image_newline"),
    (r"^model\.language_model\.", "model."),
)
"""The way back."""
FAMILIES: dict[str, tuple[Any, Any]] = {
    LlamaConfig.model_type: (LlamaConfig, LlavaConfig),
    MistralConfig.model_type: (MistralConfig, LlavaMistralConfig),
}
"""Model type of the text model -> its configuration, and that of LLaVA's face on it."""
TOWER = "clip_vision_model"
"""The only kind of tower that LLaVA's layout holds."""


def rename(name: str, rules: Rules) -> str:
    """Apply the first rule whose pattern matches."""
    for pattern, replacement in rules:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def own_fields(config: Any, kind: Any) -> dict[str, Any]:
    """The values of a part's own fields, of a configuration that has them among others.

    Args:
        kind: the part's configuration class.
    """
    common = {each.name for each in fields(PreTrainedConfig)} - {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    return {each.name: getattr(config, each.name) for each in fields(kind) if each.name not in common}


def native_config(config: Any, image_token_id: int, vocab_size: int) -> AvgLlavaConfig:
    """The native configuration of one in LLaVA's layout.

    Args:
        config: a `LlavaConfig` or `LlavaMistralConfig` with its tower's configuration.
        image_token_id: the token that stands for an image. vocab_size: rows of the embedding, that token's included.

    Raises:
        ValueError: the native model cannot do what the configuration says.
    """
    if config.mm_vision_select_feature != "patch":
        raise ValueError(f"mm_vision_select_feature is {config.mm_vision_select_feature!r}, expected 'patch' for the native layout.")
    kind, _ = FAMILIES[config.language_model_type]
    text = kind(**{**own_fields(config, kind), "vocab_size": vocab_size})
    tiled = config.image_aspect_ratio == "anyres"
    made = AvgLlavaConfig(
        text_config=text,
        vision_config={"model_type": TOWER, **config.vision_config},
        image_token_id=image_token_id,
        vision_feature_layer=config.mm_vision_select_layer,
        image_grid_pinpoints=[[height, width] for width, height in config.image_grid_pinpoints] if tiled else [],
        tie_word_embeddings=config.tie_word_embeddings,
        **{each.name: getattr(config, each.name) for each in fields(GranularityFields)},
    )
    made.dtype = config.dtype
    return made


def llava_config(config: AvgLlavaConfig, image_processor: dict[str, Any], **settings: Any) -> Any:
    """The configuration in LLaVA's layout of a native one.

    Args:
        image_processor: arguments of the tower's image processor. settings: fields of `MultimodalFields` that only LLaVA's layout has.

    Raises:
        ValueError: LLaVA's face has no such text model or tower.
    """
    text, vision = config.text, config.vision
    if text.model_type not in FAMILIES or vision.model_type != TOWER:
        raise ValueError(
            f"The text model is {text.model_type!r} and the tower {vision.model_type!r}, expected {' or '.join(FAMILIES)} and {TOWER} for "
            "LLaVA's layout; keep the native one."
        )
    kind, face = FAMILIES[text.model_type]
    made = face(
        **own_fields(text, kind),
        **{each.name: getattr(config, each.name) for each in fields(GranularityFields)},
        vision_config={"model_type": TOWER, **own_fields(vision, type(vision))},
        image_processor=image_processor,
        mm_hidden_size=vision.hidden_size,
        mm_vision_select_layer=config.vision_feature_layer,
        image_grid_pinpoints=[list(canvas) for canvas in config.canvases] or None,
        **{"image_aspect_ratio": "anyres" if config.canvases else "pad", **settings},
    )
    made.dtype = config.dtype
    return made
