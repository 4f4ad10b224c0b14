"""Which granularity each image of a prompt gets, decided in the API server before anything is hashed, cached or counted. Knows no vLLM.

A level that the caller fixes costs arithmetic alone. Where the router is asked, it reads the features of its own copy of the vision tower;
they are kept by the image's identity, so that a second question about an image pays for the router only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.messages import RoutingRequest
from llava.model.compose import ImageInput
from llava.model.splice import prompt_rows
from llava.rules import Integer, Rule, Text, faults, refuse
from llava.vllm_plugin.served import ServedModel

OPTION_RULES: dict[str, Rule] = {
    "router_device": Text(r"cpu|cuda(:\d+)?|mps|xpu(:\d+)?", "a device such as cpu or cuda:0"),
    "router_cache_mib": Integer(0, 2**20),
}


@dataclass(frozen=True)
class RouterOptions:
    """Of a server, given as `--additional-config '{"avg_llava": {"router_device": "cuda:0"}}'`.

    router_device: where the router and its vision tower compute. router_cache_mib: memory for features of images seen before.
    """

    router_device: str = "cpu"
    router_cache_mib: int = 512

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RouterOptions:
        """Check and take the given values.

        Raises:
            ValueError: unknown names or values that cannot work.
        """
        unknown = [f"{name} is no option of it" for name in values if name not in OPTION_RULES]
        refuse("additional_config.avg_llava", unknown or faults(values, OPTION_RULES))
        return cls(**values)


class RequestedImage:
    """An image of a request.

    Args:
        identity: the same for the same image, and for no other. image: its pixels.
    """

    def __init__(self, served: ServedModel, identity: str, image: Image.Image) -> None:
        self._served, self.identity, self.image = served, identity, image

    @cached_property
    def views(self) -> Tensor:
        """See `ServedModel.views`."""
        return self._served.views(self.image)


class FeatureCache:
    """Features by image; the least recently used go first.

    Args:
        capacity: in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, identity: str) -> Tensor | None:
        """The features, if they are there."""
        if identity in self._kept:
            self._kept.move_to_end(identity)
        return self._kept.get(identity)

    def put(self, identity: str, features: Tensor) -> None:
        """Keep features, unless they alone are too large."""
        if features.nbytes > self._capacity or identity in self._kept:
            return
        self._kept[identity] = features
        self._size += features.nbytes
        while self._size > self._capacity:
            self._size -= self._kept.popitem(last=False)[1].nbytes


class Decider:
    """Decides for one prompt at a time.

    Args:
        dtype: of the weights that the router is asked with.
    """

    def __init__(self, served: ServedModel, dtype: torch.dtype, options: RouterOptions) -> None:
        self._served, self._dtype, self._options = served, dtype, options
        self._cache = FeatureCache(options.router_cache_mib * 2**20)

    @cached_property
    def _front(self) -> Any:
        return self._served.load_front(self._options.router_device, self._dtype)

    @torch.inference_mode()
    def decide(self, ids: Sequence[int], images: Sequence[RequestedImage], request: RoutingRequest) -> list[int]:
        """The level index of each image.

        Args:
            ids: the prompt, with one image token per image.

        Raises:
            ValueError: images unlike image tokens, or a request that cannot be met.
        """
        planner = self._served.planner
        [row] = prompt_rows(torch.tensor([list(ids)]), None, None, image_token=self._served.image_token_id)
        plan = planner.plan([row], [self._served.unseen(image.image.size) for image in images], request)
        if planner.router is None or not plan.asks_router(0):
            return plan.choose({})
        [row] = prompt_rows(row.ids[None].to(self._options.router_device), None, None, image_token=self._served.image_token_id)
        return plan.choose(self._front.logits_where_asked([row], self._encoded(images), plan))

    def _encoded(self, images: Sequence[RequestedImage]) -> list[ImageInput]:
        """The images with their features, which are computed where they are not kept."""
        found = {image.identity: self._cache.get(image.identity) for image in images}
        new = list({image.identity: image for image in images if found[image.identity] is None}.values())
        inputs = [ImageInput(image.views.to(self._options.router_device, self._dtype), image.image.size) for image in new]
        for image, encoded in zip(new, self._front.with_features(inputs), strict=True):
            features = encoded.features.clone()  # of one image: a view would keep those of all
            self._cache.put(image.identity, features)
            found[image.identity] = features
        return [ImageInput(found[image.identity], image.image.size, is_encoded=True) for image in images]  # type: ignore[arg-type]
