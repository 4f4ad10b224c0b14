"""`CLIPVisionTower` where LLaVA has it; it is made from a configuration by `llava.model.multimodal_encoder.builder.build_vision_tower`."""

from __future__ import annotations

from llava.model.vision_tower import CLIPVisionTower

__all__ = ["CLIPVisionTower"]
