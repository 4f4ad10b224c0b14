"""vLLM's second step: a granularity for each image, the image's views, and its placeholders.

A request wishes (`auto`, a list, a budget); `apply` decides first and hands on images with one number each. What vLLM hashes, caches and
counts after that is that number and never a wish: the same image at another level is another item, and its neighbours play no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.vllm_plugin.deciding import Decider, RequestedImage, RouterOptions
from llava.vllm_plugin.served import ServedModel
from llava.vllm_plugin.wishes import routing_request

NO_PIXELS = "An image came without pixels, by its uuid alone or in another form, expected the image: its granularity cannot be decided."


class DecidedImage:
    """An image and the index of its level."""

    def __init__(self, requested: RequestedImage, level: int) -> None:
        self.requested, self.level = requested, level


class DecidedItems(ProcessorBatchItems[DecidedImage]):
    """The images of a prompt, decided."""

    def __init__(self, data: Sequence[DecidedImage]) -> None:
        super().__init__(data, "image")

    def get_item_for_hash(self, index: int) -> Any:
        item = self.data[index]
        return {"image": item.requested.identity, "level": item.level}


class AvgLlavaDataParser(MultiModalDataParser):
    """vLLM's own, which also knows decided images, and looks at embeddings before the engine does."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, list) and data and all(isinstance(item, DecidedImage) for item in data):
            return DecidedItems(data)
        items = super()._parse_image_data(data)
        if isinstance(items, ImageEmbeddingItems):
            for index in range(len(items)):
                _check_embedding(items.get(index))
        elif items is not None and not all(isinstance(image, Image.Image) for image in items.get_all()):
            raise ValueError(NO_PIXELS)
        return items


def _check_embedding(rows: torch.Tensor) -> None:
    if rows.ndim != 2 or not len(rows) or not rows.is_floating_point():
        raise ValueError("image_embeds have another shape or type, expected floating-point rows (tokens, width), one or more of them.")
    if not torch.isfinite(rows).all():
        raise ValueError("image_embeds hold NaN or infinite values, expected finite ones.")


class AvgLlavaInfo(BaseProcessingInfo):
    """What vLLM asks about the model before there is a request."""

    @cached_property
    def served(self) -> ServedModel:
        model_config = self.ctx.model_config
        hub = {} if model_config.revision is None else {"revision": model_config.revision}
        return ServedModel(model_config.hf_config, model_config.model, hub)

    def get_data_parser(self) -> AvgLlavaDataParser:
        return AvgLlavaDataParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.served.most_tokens(self.served.largest_size())}


class AvgLlavaDummyInputs(BaseDummyInputsBuilder[AvgLlavaInfo]):
    """The most expensive prompt, for vLLM to measure its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return DEFAULT_IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        served = self.info.served
        finest = len(served.config.levels) - 1
        image = RequestedImage(served, "largest", Image.new("RGB", served.largest_size()))
        return {"image": [DecidedImage(image, finest)] * mm_counts.get("image", 0)}


class AvgLlavaProcessor(BaseMultiModalProcessor[AvgLlavaInfo]):
    """Images and ids to what the engine gets."""

    def use_router(self, options: RouterOptions) -> None:
        """Decide with a router under these options."""
        self.decider = Decider(self.info.served, self.info.ctx.model_config.dtype, options)

    @cached_property
    def decider(self) -> Decider:
        return Decider(self.info.served, self.info.ctx.model_config.dtype, RouterOptions())

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's own, once every image has its level.

        Raises:
            ValueError: what `routing_request` and `Decider.decide` raise, or a granularity for images that come encoded.
        """
        items = inputs.mm_data_items.get("image")
        if isinstance(items, ImageProcessorItems):
            with timing_ctx.record("decide_granularity"):
                inputs = self._decided(inputs, items)
        elif isinstance(items, ImageEmbeddingItems):
            self._check_count(inputs.prompt, len(items))
            if inputs.hf_processor_mm_kwargs:
                raise ValueError("mm_processor_kwargs came with image_embeds, whose granularity is decided; leave them out.")
        elif items is None:
            raise ValueError(NO_PIXELS)
        return super().apply(inputs, timing_ctx)

    def _decided(self, inputs: Any, items: ImageProcessorItems) -> Any:
        self._check_count(inputs.prompt, len(items))
        context = self.info.ctx
        request = routing_request(context.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs), self.info.served.defaults)
        images = [self._requested(items, index) for index in range(len(items))]
        levels = self.decider.decide(inputs.prompt, images, request)
        decided = [DecidedImage(image, level) for image, level in zip(images, levels, strict=True)]
        return replace(
            inputs,
            mm_data_items=MultiModalDataItems({"image": DecidedItems(decided)}),
            mm_uuid_items=None,
            hf_processor_mm_kwargs={},
            media_io_kwargs={},
        )

    def _requested(self, items: ImageProcessorItems, index: int) -> RequestedImage:
        """An image by its own digest: a client's uuid may name another image, of another client too."""
        digest = MultiModalHasher.hash_kwargs(self.info.ctx.get_mm_config().mm_hasher_algorithm, image=items.get_item_for_hash(index))
        return RequestedImage(self.info.served, digest, items.get(index))

    def _check_count(self, prompt: Sequence[int], num_images: int) -> None:
        """A prompt has one image token per image: another one would take an image's place."""
        found = list(prompt).count(self.info.served.image_token_id)
        if found != num_images:
            raise ValueError(f"The prompt has {found} image tokens, but {num_images} images were given; write one for each.")

    # ---- what vLLM's own asks for --------------------------------------------------------------------------------------------

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        images: Sequence[DecidedImage] = hf_data["images"]
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature({
            "pixel_values": [image.requested.views.to(dtype) for image in images],
            "image_sizes": torch.tensor([image.requested.image.size for image in images]),
            "levels": torch.tensor([image.level for image in images]),
        })  # fmt: skip

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "levels": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_embeds": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Sequence[Any]:
        token = self.info.served.image_token_id

        def placeholders(index: int) -> list[int]:
            return [token] * self._num_tokens(mm_items["image"], index)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

    def _num_tokens(self, items: Any, index: int) -> int:
        if isinstance(items, ImageEmbeddingItems):
            return int(items.get_feature_size(index))
        served, decided = self.info.served, items.get(index)
        image = served.unseen(decided.requested.image.size)
        return int(served.planner.layouts(len(image.views), image.size, image.is_flat)[decided.level].num_tokens)
