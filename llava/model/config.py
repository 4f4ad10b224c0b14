"""What a checkpoint says about itself: every multimodal field, declared once.

`MultimodalFields` is mixed into the configuration of a language model family (`LlavaConfig` for Llama). The defaults below are
those of *new* models. A checkpoint written before a field existed gets the value it was trained with, from `RELEASED_VALUES`,
in `from_dict` and nowhere else, so that no reader ever asks whether a model is old.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import LlamaConfig, MistralConfig

from llava.model.granularity import Granularity, granularity_levels

RELEASED_VALUES: dict[str, Any] = {
    "unpad_rule": "pooled_grid",
    "router_attention_axis": "views",
    "router_text_fill": "answer",
    "filtered_text_num": 32,
    "conv_version": "v1",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
    "mm_vision_select_layer": -2,
    "router_select": False,
}
"""What the published code did where a checkpoint does not say."""

CHOICES: dict[str, tuple[str, ...]] = {
    "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad"),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "image_aspect_ratio": ("square", "none", "pad", "anyres"),
    "unpad_rule": ("picture", "pooled_grid"),
    "router_attention_axis": ("views", "tokens"),
    "router_text_fill": ("zeros", "answer"),
    "tokenizer_padding_side": ("left", "right"),
}


@dataclass(kw_only=True)
class MultimodalFields:
    """The multimodal part of a configuration.

    Vision
        mm_vision_tower: where the vision tower came from (hub id or path); only read when `vision_config` is missing.
        vision_config: the CLIP vision configuration, so that a checkpoint loads without a hub.
        image_processor: the arguments of the `CLIPImageProcessor`, likewise.
        mm_hidden_size: width of the tower's features.
        mm_vision_select_layer: which hidden state is the feature (-1: after the last layer, -2: the one before).
        mm_vision_select_feature: `patch` drops the class token, `cls_patch` keeps it.
        mm_projector_type: `linear`, `mlpNx_gelu` or `identity`.
    Picture to tokens
        image_aspect_ratio: `square` (resize and centre-crop), `pad` (to a square), `anyres` (whole view plus tiles).
        image_grid_pinpoints: the canvases of `anyres`, (width, height) in pixels.
        mm_patch_merge_type: `flat`, `spatial` (tiles joined into one grid), `spatial_unpad` (padding removed, newline vectors added).
        unpad_rule: `picture` removes what the picture does not cover; `pooled_grid` compares the picture's aspect ratio with the
            pooled grid's, as published, which drops real rows where pooling is uneven.
    Granularity
        vis_token_granularity: tokens per view of each level, coarse to fine; `None`: one level, un-pooled.
        vis_token_grids: (height, width) of each level; `None`: the chain of halvings, width first.
    Router
        router_select: whether the model has a router and uses it when the caller names no granularity.
        router_attention_axis: `views` as published, or `tokens` as the paper describes (section 3.2).
        router_hidden_size: a narrower width for the router; `None`: the language model's.
        router_dropout: dropout of the router's encoder layer.
        router_text_fill: what fills the text slots of a short instruction: `zeros`, or, as published, in training the `answer`.
        filtered_text_num: how many instruction tokens the router sees.
    Text
        conv_version: the conversation template the model was trained with.
        tokenizer_padding_side, tokenizer_model_max_length: what training used. Generation pads left whatever this says.
        mm_use_im_start_end, mm_use_im_patch_token: LLaVA's extra tokens around a picture.
    """

    mm_vision_tower: str | None = None
    vision_config: dict[str, Any] | None = None
    image_processor: dict[str, Any] | None = None
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "mlp2x_gelu"
    image_aspect_ratio: str = "anyres"
    image_grid_pinpoints: list[list[int]] | str | None = None
    mm_patch_merge_type: str = "spatial_unpad"
    unpad_rule: str = "picture"
    vis_token_granularity: list[int] | None = None
    vis_token_grids: list[list[int]] | None = None
    router_select: bool = False
    router_attention_axis: str = "views"
    router_hidden_size: int | None = None
    router_dropout: float = 0.1
    router_text_fill: str = "zeros"
    filtered_text_num: int = 32
    conv_version: str = "v1"
    tokenizer_padding_side: str = "right"
    tokenizer_model_max_length: int | None = None
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_grid_pinpoints, str):
            self.image_grid_pinpoints = [list(canvas) for canvas in ast.literal_eval(self.image_grid_pinpoints)]
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_multimodal_fields()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration; one of our kind that lacks a field gets the value it was trained with."""
        if config_dict.get("model_type") == cls.model_type:  # type: ignore[attr-defined]
            config_dict = {**RELEASED_VALUES, **config_dict}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def check_multimodal_fields(self) -> None:
        """Raise one `ValueError` that names every field whose value cannot work."""
        errors = [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        if self.image_aspect_ratio == "anyres" and self.vision_config is not None and not self.image_grid_pinpoints:
            errors.append("image_aspect_ratio is 'anyres' but image_grid_pinpoints is empty: give the canvases")
        if self.router_select and not self.vis_token_granularity:
            errors.append("router_select is on but vis_token_granularity is empty: give the levels to choose from")
        if self.filtered_text_num < 0:
            errors.append(f"filtered_text_num is {self.filtered_text_num}, expected 0 or more")
        if self.router_hidden_size is not None and self.router_hidden_size % 8:
            errors.append(f"router_hidden_size is {self.router_hidden_size}, expected a multiple of its 8 attention heads")
        if errors:
            raise ValueError("The configuration cannot work: " + "; ".join(errors) + ".")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one view as (height, width)."""
        if self.vision_config is None:
            raise ValueError("This configuration has no vision_config, so it has no patch grid; load or add a vision tower first.")
        side = self.vision_config["image_size"] // self.vision_config["patch_size"]
        return side, side

    @property
    def levels(self) -> tuple[Granularity, ...]:
        """The granularities of this model, coarse to fine; a model without any has its full patch grid as the only level."""
        return granularity_levels(self.patch_grid, self.vis_token_granularity, self.vis_token_grids)

    @property
    def context_length(self) -> int:
        """How many positions, text and visual tokens together, the language model can take."""
        return self.max_position_embeddings  # type: ignore[attr-defined]


class LlavaConfig(MultimodalFields, LlamaConfig):
    """Llama-shaped language models (Vicuna, Llama, SmolLM2)."""

    model_type = "llava_llama"
    language_model_type: ClassVar[str] = LlamaConfig.model_type


class LlavaMistralConfig(MultimodalFields, MistralConfig):
    """Mistral-shaped language models."""

    model_type = "llava_mistral"
    language_model_type: ClassVar[str] = MistralConfig.model_type
