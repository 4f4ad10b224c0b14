"""`build_vision_tower` under LLaVA's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llava.checkpoint_files import hub_options
from llava.model.loading import load_tower_weights, read_tower_config, resolve_tower
from llava.model.vision_tower import CLIPVisionTower


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Read a CLIP tower and freeze it.

    Args:
        vision_tower_cfg: any object with `mm_vision_tower` or `vision_tower`, a folder or hub id, and `mm_vision_select_layer`;
            `mm_vision_select_feature` may be missing ("patch").
        kwargs: transformers' hub options. LLaVA's `delay_load` changes nothing: the tower comes loaded.

    Raises:
        ValueError: no tower, one that cannot be read, or LLaVA's multi-scale `s2`.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if not name:
        raise ValueError("neither mm_vision_tower nor vision_tower names a tower; give a CLIP folder or hub id.")
    if getattr(vision_tower_cfg, "s2", False):
        raise ValueError("s2 asks for features at several scales, which is not supported; image_aspect_ratio 'anyres' cuts tiles instead.")
    tower, hub = resolve_tower(name), hub_options(kwargs)
    vision_config, image_processor = read_tower_config(tower, hub)
    feature = getattr(vision_tower_cfg, "mm_vision_select_feature", None) or "patch"
    made = CLIPVisionTower(vision_config, image_processor, vision_tower_cfg.mm_vision_select_layer, feature)
    made.vision_tower_name = name
    load_tower_weights(SimpleNamespace(get_vision_tower=lambda: made), tower, hub)
    return made.requires_grad_(False)
