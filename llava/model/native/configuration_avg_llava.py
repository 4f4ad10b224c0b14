"""`AvgLlavaConfig`: a text model's configuration, a vision tower's, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from llava.model.config import CANVASES, MOST_TILES, TOKEN_ID, GranularityFields, ruled
from llava.rules import Integer, faults, refuse, shown

TEXT_MODEL: dict[str, Any] = {"model_type": "llama", "vocab_size": 32064}
"""Where no text model is given: as `llava-hf/llava-v1.6-vicuna-7b-hf`, whose image token is 32000."""
_LOGIT_FIELDS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}
"""What text models do to their logits beyond a linear head, with the value that does nothing."""
VISION_MODEL: dict[str, Any] = {"model_type": "clip_vision_model"}


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
    image_grid_pinpoints: list[list[int]] = field(default_factory=list, metadata=ruled(CANVASES))
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config("text_config", self.text_config, TEXT_MODEL)
        self.vision_config = _sub_config("vision_config", self.vision_config, VISION_MODEL)
        self.image_grid_pinpoints = [list(canvas) for canvas in self.image_grid_pinpoints or []]
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self.check_multimodal_fields()

    def check_multimodal_fields(self) -> None:
        """Raise one `ValueError` that names every field whose value cannot work."""
        rules = {each.name: each.metadata["rule"] for each in fields(self) if "rule" in each.metadata}
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


def _sub_config(name: str, given: Any, default: Mapping[str, Any]) -> PreTrainedConfig:
    """A part's configuration as an object.

    Raises:
        ValueError: no configuration, or of a model type that this transformers does not know.
    """
    if isinstance(given, PreTrainedConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name} is {shown(given)}, expected the values of a configuration.")
    values = dict(default if given is None else given)
    kind = values.pop("model_type", default["model_type"])
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{name}.model_type is {shown(kind)}, expected one that this transformers knows, such as {default['model_type']}.")
    return CONFIG_MAPPING[kind](**values)
