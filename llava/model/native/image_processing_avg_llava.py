"""`AvgLlavaImageProcessor`: images to the views of `llava.crops`, under transformers' image processor interface."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from llava.crops import IMAGE_MODES, process_image_for_mode
from llava.images import check_aspect_ratio, to_rgb
from llava.model.image_inputs import read_image


class AvgLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """Of a call, besides transformers' own; see `AvgLlavaImageProcessor`."""

    image_grid_pinpoints: list[list[int]]
    image_aspect_ratio: str


class AvgLlavaImageProcessor(PilBackend):
    """LLaVA-NeXT's views, to the bit those that `llava.mm_utils.process_images` gives.

    An image is whatever `llava.model.image_inputs.read_image` takes: PIL's, a path, a web address, a data URL, base64, or pixels as an
    array or tensor: whole numbers from 0 to 255, or shares from 0 to 1, which are shares before they are normalised, with `do_rescale` or
    without.

    image_grid_pinpoints: canvases, (height, width) in pixels.
    image_aspect_ratio: one of `llava.crops.IMAGE_MODES`. All but `anyres` give one view, for which no canvases are needed.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = AvgLlavaImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True
    image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    image_aspect_ratio = "anyres"

    @classmethod
    def for_model(cls, config: Any, arguments: dict[str, Any] | None, image_aspect_ratio: str) -> "AvgLlavaImageProcessor":
        """The image processor of a model.

        Args:
            config: an `AvgLlavaConfig`. arguments: of the tower's image processor; `None` gives CLIP's own at that size.
            image_aspect_ratio: of a model without canvases, one of `llava.crops.IMAGE_MODES`.
        """
        side = config.view_side
        given = arguments or {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return cls(
            **{name: value for name, value in given.items() if name != "image_processor_type"},
            image_grid_pinpoints=config.image_grid_pinpoints,
            image_aspect_ratio="anyres" if config.image_grid_pinpoints else image_aspect_ratio,
        )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """RGB images in place of whatever names them, arrays (H, W, 3) of shares where shares are given; lists keep their shape, and `None`
        for the images of a prompt is no image.

        Raises:
            ValueError: an image that cannot be used (`llava.images`).
        """
        given = image_url_or_urls
        if isinstance(given, (list, tuple)):
            found = [[] if each is None else self.fetch_images(each) for each in given]
            is_nested = any(isinstance(each, list) for each in found)
            return [each if isinstance(each, list) or not is_nested else [each] for each in found]
        if getattr(given, "ndim", 0) == 4:
            return [self.fetch_images(each) for each in given]
        image = read_image(given)
        check_aspect_ratio(image.size)
        rgb = to_rgb(image)
        is_shares = not isinstance(given, Image.Image) and hasattr(given, "__array__") and np.asarray(given).dtype.kind == "f"
        return np.asarray(rgb, dtype=np.float32) / 255 if is_shares else rgb

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        image_grid_pinpoints: Sequence[Sequence[int]],
        image_aspect_ratio: str,
        do_pad: bool | None,
        return_tensors: Any,
        **steps: Any,
    ) -> BatchFeature:
        """(N, C, 3, S, S) `pixel_values`, an image with fewer than C views filled up with zeros, and (height, width) `image_sizes`.

        Without `do_pad`, `pixel_values` are N arrays (C, 3, S, S).
        """
        if image_aspect_ratio not in IMAGE_MODES:
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}, expected one of {', '.join(IMAGE_MODES)}.")
        canvases = [(width, height) for height, width in image_grid_pinpoints] or None
        views_of = _Steps(self, **{name: steps[name] for name in _Steps.__dataclass_fields__ if name != "backend"})
        views = []
        for image in images:
            is_shares = image.dtype.kind == "f"
            pixels = (image * 255).round().astype(np.uint8) if is_shares else image
            picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
            how = replace(views_of, do_rescale=True) if is_shares else views_of
            found = process_image_for_mode(picture, how, image_aspect_ratio, canvases).numpy()  # type: ignore[arg-type]
            views.append(found if found.ndim == 4 else found[None])
        if do_pad:
            most = max(map(len, views))
            views = [np.pad(each, ((0, most - len(each)), (0, 0), (0, 0), (0, 0))) for each in views]
        data = {"pixel_values": views, "image_sizes": [image.shape[-2:] for image in images]}
        return BatchFeature(data, tensor_type=return_tensors)


@dataclass(frozen=True)
class _Steps:
    """What `llava.crops` needs of an image processor, with the settings of one call."""

    backend: PilBackend
    do_resize: bool
    size: SizeDict
    resample: Any
    do_center_crop: bool
    crop_size: SizeDict
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any

    def preprocess(self, images: Sequence[Image.Image], return_tensors: str, **changes: Any) -> dict[str, torch.Tensor]:
        """Resize, crop, rescale and normalise views: `pixel_values` (C, 3, S, S); `changes` are settings for this call."""
        steps = replace(self, **changes)
        return {"pixel_values": torch.from_numpy(np.stack([steps._pixels(image) for image in images]))}

    def _pixels(self, image: Image.Image) -> np.ndarray:
        pixels = np.moveaxis(np.asarray(image), -1, 0)
        if self.do_resize:
            pixels = self.backend.resize(pixels, self.size, self.resample)
        if self.do_center_crop:
            pixels = self.backend.center_crop(pixels, self.crop_size)
        if self.do_rescale:
            pixels = self.backend.rescale(pixels, self.rescale_factor)
        return self.backend.normalize(pixels, self.image_mean, self.image_std) if self.do_normalize else pixels
