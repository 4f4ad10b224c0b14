"""A checkpoint as the plug-in sees it, whichever layout its folder has: the native configuration, views, prompts, defaults. Knows no vLLM.

A folder in LLaVA's layout is read as `llava.convert` would write it in the native one: the same names of weights, and a row of the
vocabulary for `<image>` where the tokenizer has no such token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.checkpoint_files import read_object, stored_file
from llava.model.builder import load_pretrained_model
from llava.model.chat_template import add_image_token
from llava.model.compose import ImageInput, Size
from llava.model.config import KEPT_KEY, MultimodalFields
from llava.model.loading import read_tower_config, resolve_tower
from llava.model.native import AvgLlavaConfig, AvgLlavaModel
from llava.model.native.image_processing_avg_llava import AvgLlavaImageProcessor
from llava.model.native.llava_layout import native_config
from llava.tokenizer import load_tokenizer
from llava.vllm_plugin.wishes import RULES, check_wishes

IMAGE_TOKEN_FIELD = "image_token_id"
"""Where a configuration of either layout says which id stands for an image; in LLaVA's it is put there by `complete`."""


def complete(config: Any, path: str, hub: Mapping[str, Any] | None = None) -> None:
    """Put into a configuration of LLaVA's layout what the native one has besides; one that has it stays as it is.

    Args:
        path: the checkpoint's folder or hub id. hub: transformers' options for it, such as `revision`.

    Raises:
        ValueError: a plain language model, or a tower or tokenizer that does not fit.
    """
    if not isinstance(config, MultimodalFields) or hasattr(config, IMAGE_TOKEN_FIELD):
        return
    if config.vision_config is None:
        if config.mm_vision_tower is None:
            raise ValueError(f"{path} has no vision tower, so it is a plain language model; serve it without this plug-in.")
        config.vision_config, config.image_processor = read_tower_config(resolve_tower(config.mm_vision_tower, path), hub)
    rows: int = config.vocab_size  # type: ignore[attr-defined]
    image_token = add_image_token(load_tokenizer(path, **(hub or {})))
    if image_token > rows:
        raise ValueError(f"The tokenizer of {path} has {image_token} tokens, but the model {rows} rows; give the tokenizer saved with it.")
    config.vocab_size = max(rows, image_token + 1)  # type: ignore[attr-defined]
    setattr(config, IMAGE_TOKEN_FIELD, image_token)


def load_served_tokenizer(path: str, **options: Any) -> Any:
    """The checkpoint's tokenizer, with `<image>`; options as in `load_tokenizer`."""
    tokenizer = load_tokenizer(path, **options)
    add_image_token(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class ServedModel:
    """What the front of a server has to know of a checkpoint.

    stored: its configuration, of either layout, after `complete`. path: its folder or hub id. hub: options for that.
    """

    stored: Any
    path: str
    hub: Mapping[str, Any]

    @cached_property
    def config(self) -> AvgLlavaConfig:
        """The native configuration."""
        return native_view(self.stored)

    @property
    def image_token_id(self) -> int:
        return int(getattr(self.stored, IMAGE_TOKEN_FIELD))

    @property
    def use_start_end(self) -> bool:
        """Whether the prompt wraps images in LLaVA's start and end tokens."""
        kept = getattr(self.stored, KEPT_KEY, None) or {}
        return bool(getattr(self.stored, "mm_use_im_start_end", kept.get("mm_use_im_start_end", False)))

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What generation_config.json says of the granularity.

        Raises:
            ValueError: values that cannot work.
        """
        file = stored_file(self.path, "generation_config.json", self.hub)
        stored = {} if file is None else read_object(file)
        found = {name: stored[name] for name in RULES if stored.get(name) is not None}
        try:
            check_wishes(found)
        except ValueError as error:
            raise ValueError(f"{file} cannot work: {error}") from error
        return found

    # ---- images --------------------------------------------------------------------------------------------------------------

    @cached_property
    def image_processor(self) -> AvgLlavaImageProcessor:
        if isinstance(self.stored, AvgLlavaConfig):
            return AvgLlavaImageProcessor.from_pretrained(self.path, **self.hub)
        return AvgLlavaImageProcessor.for_model(self.config, self.stored.image_processor, self.stored.image_aspect_ratio)

    @property
    def is_flat(self) -> bool:
        """Whether a single view is laid out without a newline vector, as LLaVA does for images that it does not cut; see `ImageInput`."""
        return isinstance(self.stored, MultimodalFields) and self.stored.image_aspect_ratio != "anyres"

    def views(self, image: Image.Image) -> Tensor:
        """An image's views (C, 3, S, S), or (3, S, S) of one that is laid out flat.

        Raises:
            ValueError: an image that cannot be used.
        """
        [views] = self.image_processor([image], do_pad=False)["pixel_values"]
        return torch.as_tensor(views)[0] if self.is_flat else torch.as_tensor(views)

    def unseen(self, size: Size) -> ImageInput:
        """An image of (width, height) pixels of which nothing has been computed; it tells what it costs."""
        side, num_views = self.config.view_side, 1 if self.is_flat else self.config.num_views_of(size)
        views = torch.empty(num_views, 3, side, side, device="meta")
        return ImageInput(views[0] if self.is_flat else views, size)

    def largest_size(self) -> Size:
        """(width, height) of an image than which none costs more: it fills the canvas that has the most visual tokens."""
        side = self.config.view_side
        return max(self.config.canvases or [(side, side)], key=self.most_tokens)

    def most_tokens(self, size: Size) -> int:
        """Visual tokens of an image of (width, height) pixels at the finest level."""
        image = self.unseen(size)
        return self.planner.layouts(len(image.views), size, image.is_flat)[-1].num_tokens

    # ---- models --------------------------------------------------------------------------------------------------------------

    @cached_property
    def planner(self) -> AvgLlavaModel:
        """The model without language layers and without weights: it plans."""
        config = copy.deepcopy(self.config)
        config.text.num_hidden_layers = 0
        if getattr(config.text, "layer_types", None):
            config.text.layer_types = []
        with torch.device("meta"):
            return AvgLlavaModel(config)

    def load_front(self, device: str, dtype: torch.dtype) -> Any:
        """The model without language layers, which encodes and routes; errors as in `load_pretrained_model`."""
        return load_pretrained_model(self.path, None, "", device=device, dtype=dtype, front_only=True, **self.hub)[1]


def native_view(stored: Any) -> AvgLlavaConfig:
    """The native configuration of a stored one of either layout."""
    if isinstance(stored, AvgLlavaConfig):
        return stored
    return native_config(stored, getattr(stored, IMAGE_TOKEN_FIELD), stored.vocab_size)
