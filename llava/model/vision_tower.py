"""The vision tower: views in, patch features out. Knows nothing of pooling, text or projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.checkpoint_files import LIBRARY_ERRORS, one_line


def make_image_processor(arguments: dict[str, Any] | None, side: int) -> CLIPImageProcessorPil:
    """The image processor of a tower that takes views of `side` pixels.

    Args:
        arguments: of `CLIPImageProcessor`; `None` gives CLIP's own at that size.

    Raises:
        ValueError: it does not make views (3, side, side) of finite numbers.
    """
    arguments = arguments or {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    try:
        processor = CLIPImageProcessorPil(**arguments)
        view = processor.preprocess([Image.new("RGB", (side, side))], return_tensors="np")["pixel_values"]
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The image processor cannot work ({one_line(error)}); use the image_processor saved with the model.") from error
    if view.shape != (1, 3, side, side) or not np.isfinite(view).all():
        raise ValueError(
            f"The image processor makes views of shape {list(view.shape[1:])}, expected [3, {side}, {side}] of finite numbers; use the "
            "image_processor saved with the model."
        )
    return processor


class _NamedEncoder(nn.Module):
    """Gives the encoder's weights the names that LLaVA checkpoints have (`vision_tower.vision_model.*`)."""

    def __init__(self, vision_model: CLIPVisionModel) -> None:
        super().__init__()
        self.vision_model = vision_model


class TowerNames:
    """LLaVA's names of a tower, whatever encodes, and the checks of what goes into it.

    Attributes:
        config: the encoder's configuration. image_processor: transformers', for the tower's views.
        vision_tower_name: folder or hub id that it was read from, as in the configuration.
        select_layer: which hidden state is the feature: -1 after the last layer, -2 the one before.
        select_feature: `patch`, or `cls_patch` to keep what stands before the patches.
        num_layers_used: layers up to the selected one.
    """

    config: Any
    image_processor: CLIPImageProcessorPil
    vision_tower_name: str | None
    select_layer: int
    select_feature: str
    num_layers_used: int
    dtype: torch.dtype
    device: torch.device
    encoder: nn.Module
    """The module that holds the weights."""
    hidden_state: Callable[[Tensor], Tensor]
    """Views (N, 3, S, S) to the selected hidden state (N, Q + P, Dv), with Q tokens before the patches."""

    def choose_layer(self, select_layer: int) -> None:
        """Take the features from another hidden state.

        Raises:
            ValueError: the tower has no such layer.
        """
        layers = self.config.num_hidden_layers
        used = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= used <= layers:
            raise ValueError(f"mm_vision_select_layer is {select_layer}, but the tower has {layers} layers; use -{layers + 1} to {layers}.")
        self.select_layer = select_layer
        self.num_layers_used = used

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one view as (height, width)."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def num_patches_per_side(self) -> int:
        return self.patch_grid[0]

    @property
    def image_size(self) -> int:
        """Side of a view in pixels."""
        return int(self.config.image_size)

    @property
    def num_patches(self) -> int:
        return self.patch_grid[0] * self.patch_grid[1]

    @property
    def is_loaded(self) -> bool:
        """Always true: the weights live in the model. LLaVA's users ask."""
        return True

    def load_model(self, device_map: Any = None) -> None:
        """Nothing is left to load, as in LLaVA once the tower is; its users call this before they use one."""

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, Dv)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """The features (N, P, Dv) in what an encoder returns with `output_hidden_states=True`."""
        return self._features(image_forward_outs.hidden_states[self.num_layers_used])

    def _features(self, hidden: Tensor) -> Tensor:
        # Class and register tokens stand before the patches, in every tower.
        return hidden[:, -self.num_patches :] if self.select_feature == "patch" else hidden

    def unused_weights(self) -> list[nn.Parameter]:
        """Weights that no feature depends on: layers behind the selected one, a head that pools.

        Found by asking autograd on the meta device, so that it holds for any tower.
        """
        own = dict(self.encoder.named_parameters())
        weights = {name: torch.empty_like(weight, device="meta", requires_grad=True) for name, weight in own.items()}
        buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in self.encoder.named_buffers()}
        views = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        replaced = {f"encoder.{name}": tensor for name, tensor in {**weights, **buffers}.items()}
        features = functional_call(_Call(self.encoder, self.forward), replaced, views)
        gradients = torch.autograd.grad(features.sum(), list(weights.values()), allow_unused=True)
        return [own[name] for name, gradient in zip(weights, gradients, strict=True) if gradient is None]

    def forward(self, views: Tensor | list[Tensor]) -> Any:
        """Encode views.

        Args:
            views: (N, 3, S, S) with S the tower's image size, normalised by its image processor; or a list of (3, S, S).

        Returns:
            (N, P, Dv) patch features, row by row; of a list, one (1, P, Dv) each.

        Raises:
            ValueError: views of another size.
        """
        if isinstance(views, list):
            return [self.forward(view[None]) for view in views]
        size = self.image_size
        if views.shape[1:] != (3, size, size):
            raise ValueError(f"Views have shape {tuple(views.shape[1:])}, expected (3, {size}, {size}); prepare them with process_images.")
        device = views.device if self.device.type == "meta" else self.device  # offloaded weights come to where the views are
        return self._features(self.hidden_state(views.to(device, self.dtype)))


class _Call(nn.Module):
    """A function that uses a module's weights, as a module that has them."""

    def __init__(self, encoder: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.function = function

    def forward(self, views: Tensor) -> Tensor:
        return self.function(views)


class CLIPVisionTower(TowerNames, nn.Module):
    """A CLIP vision transformer whose features are taken from one of its layers.

    Args:
        vision_config: arguments of `CLIPVisionConfig`.
        image_processor: arguments of `CLIPImageProcessor`; `None` gives CLIP's own at the tower's size.
        select_layer, select_feature: see `TowerNames`.
    """

    def __init__(
        self,
        vision_config: dict[str, Any],
        image_processor: dict[str, Any] | None = None,
        select_layer: int = -2,
        select_feature: str = "patch",
    ) -> None:
        super().__init__()
        self.config = CLIPVisionConfig(**{k: v for k, v in vision_config.items() if k != "model_type"})
        self.select_feature = select_feature
        self.vision_tower_name: str | None = None
        self.choose_layer(select_layer)
        self.vision_tower = _NamedEncoder(CLIPVisionModel._from_config(self.config))
        self.image_processor = make_image_processor(image_processor, self.config.image_size)  # type: ignore[arg-type]

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.vision_tower.vision_model.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.vision_tower.vision_model.device

    def hidden_state(self, views: Tensor) -> Tensor:  # type: ignore[override]
        encoder = self.vision_tower.vision_model
        hidden = encoder.pre_layrnorm(encoder.embeddings(views))
        # The layers behind the selected one are not run: nobody reads them.
        for layer in encoder.encoder.layers[: self.num_layers_used]:
            hidden = layer(hidden, attention_mask=None)
        return hidden
