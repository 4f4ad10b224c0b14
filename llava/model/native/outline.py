"""A native checkpoint is tried out before any of its weights is read: its model without storage, on torch's meta device.

The text model and the tower may be any that transformers has, so no table says what shapes they have or which values go together: the
model is built from the configuration, its shapes are held against the headers of the weights, and one view and one position go through it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from llava.checkpoint_files import LIBRARY_ERRORS, StoredTensor, one_line
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.shapes import compare_layers, compare_shapes

_LAYERS = {"text_config": r"model\.language_model\.(?:\D*\.)?", "vision_config": r"model\.vision_tower\.(?:\D*\.)?"}
"""Part of the configuration -> what stands before a layer's number in the names of its weights."""


def check_outline(model_class: Any, config: AvgLlavaConfig, stored: Mapping[str, StoredTensor], source: Any) -> None:
    """Refuse a configuration that makes no working model, or another than the weights are of.

    Args:
        model_class: the native model with or without its head, or one derived from it.
        stored: headers of the weights; none says nothing of sizes. source: the checkpoint, for the error.

    Raises:
        ValueError: in one sentence, before anything large is built.
    """
    for part, before_number in _LAYERS.items():
        declared = getattr(getattr(config, part), "num_hidden_layers", None)
        if declared is not None:
            compare_layers(f"{part}.num_hidden_layers", declared, before_number, stored, source)
    config = copy.deepcopy(config)
    for each in (config, config.text, config.vision):
        each._attn_implementation = "eager"  # which is there for every model, and needs no package
        each._experts_implementation = "batched_mm"  # the others take bfloat16 alone there, or look at values
    try:
        with torch.device("meta"):
            outline = model_class(config)
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The configuration of {source} makes no model ({one_line(error)}); {CURE}") from error
    compare_shapes({name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}, stored, source)
    try:
        _run(outline)
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The model that the configuration of {source} makes does not run ({one_line(error)}); {CURE}") from error


def _run(outline: Any) -> None:
    """One view through the tower and the projector, and two positions through the text model."""
    inner = getattr(outline, "model", outline)
    side, width = inner.config.view_side, inner.config.text.hidden_size
    with torch.no_grad():
        features = inner.encode_images(torch.empty(1, 3, side, side, device="meta"))
        mask = torch.empty(1, 1, 2, 2, device="meta")  # used as it is; without one, positions would be inspected, which have no values
        positions = torch.arange(2, device="meta")[None]
        hidden = inner.language_model(inputs_embeds=torch.empty(1, 2, width, device="meta"), attention_mask=mask, position_ids=positions)
    expected = (1, inner.config.patch_grid[0] * inner.config.patch_grid[1], width)
    if tuple(features.shape) != expected or hidden.last_hidden_state.shape[-1] != width:
        raise ValueError(f"a view gives features of shape {list(features.shape)}, expected {list(expected)}")


CURE = "use the config.json that was saved with the weights."
