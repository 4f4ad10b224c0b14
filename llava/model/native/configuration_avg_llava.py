"""`AvgLlavaConfig`: a text model's configuration, a vision tower's, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from llava.checkpoint_files import LIBRARY_ERRORS, is_deeper, one_line
from llava.model.config import CANVASES, COMMON_RULES, KEPT_KEY, MOST_TILES, TOKEN_ID, GranularityFields, foreign_names, ruled
from llava.model.native.parts import read_part
from llava.rules import Anything, Choice, Flag, Integer, Rule, faults, optional, refuse

_LOGIT_FIELDS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}
"""What text models do to their logits beyond a linear head, with the value that does nothing."""
_TOP_RULES: dict[str, Rule] = {
    **COMMON_RULES,
    **dict.fromkeys(("quantization_config", KEPT_KEY, "auto_map"), optional(Anything())),
}
"""Values of config.json beside the fields of `AvgLlavaConfig`."""


class AvgLlavaConfig(GranularityFields, PreTrainedConfig):
    """An AVG-LLaVA over any text model and vision tower that transformers' Auto classes know.

    text_config, vision_config: configurations, or their values with a `model_type`. The tower takes square views, and its patches are the
        last of its positions.
    tie_word_embeddings: whether the head is the embedding; by default as the text model says.
    image_token_id: the token that stands for an image. One of them is an image whose granularity is still open; as many as the image has
        visual tokens at a level decide for that level.
    vision_feature_layer: which hidden state of the tower is the feature (-1: after the last layer, -2: the one before).
    image_grid_pinpoints: canvases, (height, width) in pixels as everywhere in transformers; none means that an image is one view.
    Further fields: see `GranularityFields`.
    """

    model_type = "avg_llava"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}
    auto_map: ClassVar[dict[str, str]] = {}  # a folder with code has one; TRL asks every class for it that is none of transformers' own

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = field(default=32000, metadata=ruled(TOKEN_ID))
    vision_feature_layer: int = field(default=-2, metadata=ruled(Integer(-2049, 2048)))
    image_grid_pinpoints: list[list[int]] = field(default_factory=list, metadata=ruled(optional(CANVASES)))
    tie_word_embeddings: bool | None = field(default=None, metadata=ruled(optional(Flag())))

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = read_part("text_config", self.text_config)
        self.vision_config = read_part("vision_config", self.vision_config)
        if self.image_grid_pinpoints is None:
            self.image_grid_pinpoints = []
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self.check_multimodal_fields()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration.

        Raises:
            ValueError: values that cannot work, all of them at once where they are wrong alone.
        """
        if is_deeper(config_dict):
            raise ValueError("The configuration is nested too deeply; use the config.json that was saved with the weights.")
        rules = {**_TOP_RULES, "model_type": Choice((cls.model_type,)), **cls._rules()}
        judged = {name: value for name, value in config_dict.items() if not isinstance(value, torch.dtype)}
        refuse("The configuration", faults(judged, rules) + foreign_names(config_dict, cls, rules))
        try:
            return super().from_dict(config_dict, **kwargs)
        except LIBRARY_ERRORS as error:
            raise ValueError(f"The configuration cannot work: {one_line(error)}.") from error

    @classmethod
    def _rules(cls) -> dict[str, Rule]:
        return {each.name: each.metadata["rule"] for each in fields(cls) if "rule" in each.metadata}

    def check_multimodal_fields(self) -> None:
        """Raise one `ValueError` that names every field whose value cannot work."""
        rules = self._rules()
        found = faults({name: getattr(self, name) for name in rules}, rules)
        refuse("The configuration", found or list(self._contradictions()))

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with fields beside one another."""
        yield from self.router_contradictions()
        vision = self.vision
        if vision.patch_size > self.view_side:
            yield f"vision_config.patch_size is {vision.patch_size}, expected at most image_size, {self.view_side}"
            return
        layers = vision.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            yield f"vision_feature_layer is {self.vision_feature_layer}, but the tower has {layers} layers; use -{layers + 1} to {layers}"
        for name, neutral in _LOGIT_FIELDS.items():
            if (value := getattr(self.text_config, name, None)) not in (None, neutral):
                yield f"text_config.{name} is {value}, but this model's head is a plain linear layer; choose a text model without it"
        vocabulary = self.text.vocab_size
        if not 0 <= self.image_token_id < vocabulary:
            yield f"image_token_id is {self.image_token_id}, expected 0 to {vocabulary - 1}, a token of the vocabulary"
        try:
            _ = self.levels
        except ValueError as error:
            yield str(error).rstrip(".")
        side = self.view_side
        for height, width in self.image_grid_pinpoints:
            if width % side or height % side or width // side * (height // side) > MOST_TILES:
                yield f"image_grid_pinpoints has {[height, width]}, expected multiples of {side} with at most {MOST_TILES} tiles"

    @property
    def text(self) -> Any:
        """The text model's configuration."""
        return self.text_config

    @property
    def vision(self) -> Any:
        """The tower's configuration."""
        return self.vision_config

    @property
    def patch_grid(self) -> tuple[int, int]:
        side = self.view_side // self.vision.patch_size
        return side, side

    @property
    def view_side(self) -> int:
        return int(self.vision.image_size)

    @property
    def canvases(self) -> list[tuple[int, int]]:
        return [(width, height) for height, width in self.image_grid_pinpoints]

    @property
    def context_length(self) -> int:
        return int(self.text.max_position_embeddings)
