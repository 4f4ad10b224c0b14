"""LLaVA's face over a native model: any text model and vision tower, the names of LLaVA, the native layout on the disk.

The modules and their weights are those of `AvgLlavaForConditionalGeneration`; the placeholder, the containers of images and `generate`
those of `llava_arch.py`. `LlavaNativeConfig` has LLaVA's fields in memory, and is read from and written to a native config.json.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.checkpoint_files import read_object, stored_file
from llava.model.config import IMAGE_PROCESSOR_RULES, KEPT_KEY, LlavaFields, check_image_processor
from llava.model.llava_arch import InnerModel, LlavaMetaForCausalLM
from llava.model.loading import CheckpointLoading
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel, Newline
from llava.model.native.processing_avg_llava import AvgLlavaProcessor
from llava.model.vision_tower import TowerNames, make_image_processor

OF_THE_PROCESSOR = ("image_processor", "image_aspect_ratio")
"""LLaVA's fields that the image processor's own file holds."""
KEPT = tuple(each.name for each in fields(LlavaFields) if each.name not in OF_THE_PROCESSOR)
"""Those that a native config.json keeps under `KEPT_KEY`."""


class LlavaNativeConfig(LlavaFields, AvgLlavaConfig):
    """A native configuration with LLaVA's fields beside it, its canvases (width, height) as LLaVA has them.

    llava_fields: what a native config.json keeps there beyond `KEPT`.
    """

    model_type = AvgLlavaConfig.model_type
    language_model_type: ClassVar[None] = None
    attribute_map: ClassVar[dict[str, str]] = {"mm_vision_select_layer": "vision_feature_layer"}
    mm_vision_select_feature: ClassVar[str] = "patch"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a native config.json."""
        stored = dict(config_dict)
        kept = stored.get(KEPT_KEY)
        if isinstance(kept, Mapping):
            stored[KEPT_KEY] = {name: value for name, value in kept.items() if name not in KEPT}
            stored |= {name: kept[name] for name in KEPT if name in kept}
        stored["image_grid_pinpoints"] = _turned(stored.get("image_grid_pinpoints"))
        return super().from_dict(stored, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What a native config.json holds, whichever face wrote it."""
        values = super().to_dict()
        own = {name: values.pop(name) for name in KEPT + OF_THE_PROCESSOR if name in values}
        kept = {name: own[name] for name in KEPT if name in own}
        canvases = values["image_grid_pinpoints"] if self.image_aspect_ratio == "anyres" else []
        return {
            **values,
            "image_grid_pinpoints": _turned(canvases),
            "architectures": [AvgLlavaForConditionalGeneration.__name__],
            KEPT_KEY: {**(values.get(KEPT_KEY) or {}), **kept},
        }

    def read_image_processor(self, path: Any, hub: Mapping[str, Any] | None = None) -> None:
        """Take the settings of the image processor that is saved beside a native config.json.

        Raises:
            ValueError: there is none, or it cannot work.
        """
        files = {name: stored_file(path, name, hub) for name in ("processor_config.json", "preprocessor_config.json")}
        if not any(files.values()):
            raise ValueError(f"{path} has neither {' nor '.join(files)}; save the model's processor with it.")
        whole, views = ({} if file is None else read_object(file) for file in files.values())
        stored = whole.get("image_processor", views)
        check_image_processor(stored, f"The image processor of {path}")
        self.image_processor = {name: stored[name] for name in IMAGE_PROCESSOR_RULES if name in stored} or None
        self.image_aspect_ratio = stored.get("image_aspect_ratio", "pad")
        if self.image_grid_pinpoints:
            self.image_aspect_ratio = "anyres"
        self.check_multimodal_fields()

    @property
    def canvases(self) -> list[tuple[int, int]]:
        return [(width, height) for width, height in self.image_grid_pinpoints]

    @property
    def vocab_size(self) -> int:
        return int(self.text.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.text.hidden_size)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.text.max_position_embeddings)

    @property
    def mm_hidden_size(self) -> int:
        return int(self.vision.hidden_size)


def _turned(canvases: Any) -> Any:
    """Canvases with the sides of each exchanged; what are none is left for the rules to refuse."""
    are_pairs = isinstance(canvases, (list, tuple)) and all(isinstance(each, (list, tuple)) for each in canvases)
    return [list(reversed(each)) for each in canvases] if are_pairs else canvases


class NativeTower(TowerNames):
    """A native model's tower under LLaVA's names; everything else that is asked of it is the encoder's own.

    Args:
        model: which holds the tower.
    """

    select_feature = "patch"

    def __init__(self, model: LlavaNativeModel) -> None:
        self.model = model
        self.config = model.config.vision
        self.vision_tower_name = model.config.mm_vision_tower
        self.choose_layer(model.config.vision_feature_layer)
        self.image_processor = make_image_processor(model.config.image_processor, self.image_size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying looks for, before there is a model
            raise AttributeError(name)
        return getattr(self.model.vision_tower, name)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.model.vision_tower

    def hidden_state(self, views: Tensor) -> Tensor:  # type: ignore[override]
        return self.model.tower_state(views)

    __call__ = TowerNames.forward


class LlavaNativeModel(InnerModel, AvgLlavaModel):
    """A native model without its head, its parts under LLaVA's names too."""

    config_class = LlavaNativeConfig

    def get_vision_tower(self) -> NativeTower:
        """The tower under LLaVA's names."""
        return self._named_tower

    @cached_property
    def _named_tower(self) -> NativeTower:
        return NativeTower(self)

    @property
    def newline(self) -> Tensor | None:  # type: ignore[override]
        return AvgLlavaModel.newline.fget(self)  # type: ignore[attr-defined]

    def initialize_newline(self) -> None:
        """Draw a vector that ends rows of tiles, where there is none."""
        if self.image_newline is None:
            like = self.embedding_weight
            self.image_newline = Newline(like.shape[1]).to(like)
            nn.init.normal_(self.image_newline.weight, std=like.shape[1] ** -0.5)

    @property
    def mm_projector(self) -> nn.Module:
        return self.multi_modal_projector

    @property
    def embed_tokens(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        return self.language_model.layers


class LlavaNativeForCausalLM(CheckpointLoading, LlavaMetaForCausalLM, AvgLlavaForConditionalGeneration):
    """AVG-LLaVA under LLaVA's contract, over any text model and vision tower; loads and saves native folders."""

    config_class = LlavaNativeConfig
    inner_class = LlavaNativeModel

    def of_answers(self, logits: Tensor) -> Tensor:
        """The head's logits (..., V); the image token is no answer."""
        is_image = torch.arange(logits.shape[-1], device=logits.device) == self.config.image_token_id
        return logits.masked_fill(is_image, float("-inf"))

    def processor(self, tokenizer: Any) -> AvgLlavaProcessor:
        """The native processor with this tokenizer, which stays as it is."""
        config = AvgLlavaConfig.from_dict(self.config.to_dict())
        return AvgLlavaProcessor.for_model(config, copy.deepcopy(tokenizer), self.config.image_processor, self.config.image_aspect_ratio)

    @classmethod
    def _check_stored(cls, path: Any, config: Any, hub: Mapping[str, Any] | None = None) -> None:
        """Nothing beyond what the native model's own loading does."""

    @staticmethod
    def _complete_tower(config: Any, path: Any, hub: Mapping[str, Any] | None = None) -> None:
        """Complete the configuration with the image processor's settings; the tower itself is always in the folder."""
        config.read_image_processor(path, hub)
