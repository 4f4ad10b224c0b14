"""Our model in vLLM's engine: vLLM's language model, and before it the steps of `llava.model` from views to visual tokens.

The router is not here: levels are decided in the API server (`processing.py`), and come with the images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.clip import CLIPVisionTransformer
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from llava.checkpoint_files import is_stored_buffer
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.compose import ImageInput
from llava.model.native import AvgLlavaConfig
from llava.model.native.llava_layout import TO_NATIVE, TOWER
from llava.model.native.modeling_avg_llava import NativeEncoder, Newline
from llava.model.projector import build_projector
from llava.tools.llava_next import append_mean_row
from llava.vllm_plugin.processing import AvgLlavaDummyInputs, AvgLlavaInfo, AvgLlavaProcessor
from llava.vllm_plugin.served import native_view

FROM_NATIVE = (
    (r"^model\.router\.", None),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\b", "language_model.lm_head"),
)
"""Native names -> names here; the router's weights are left out."""
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


class ShardedTower(CLIPVisionTransformer):
    """vLLM's CLIP, split over the ranks of tensor parallelism, in the place of transformers'.

    Args:
        layer: the hidden state that is wanted; layers behind it are left out.
    """

    def __init__(self, config: Any, layer: int, prefix: str) -> None:
        used = layer if layer >= 0 else config.num_hidden_layers + 1 + layer
        super().__init__(config, num_hidden_layers_override=used, require_post_norm=False, prefix=prefix)
        self._layer = layer

    def forward(self, views: Tensor, **options: Any) -> Any:
        return SimpleNamespace(hidden_states={self._layer: super().forward(views, feature_select_strategy="full")})


def build_tower(config: Any, layer: int, num_ranks: int) -> nn.Module:
    """The tower of transformers, as everywhere in this project; where it can be split over several ranks, vLLM's."""
    if config.model_type == TOWER and num_ranks > 1 and config.num_attention_heads % num_ranks == 0:
        return ShardedTower(config, layer, "vision_tower")
    return AutoModel.from_config(config)


@MULTIMODAL_REGISTRY.register_processor(AvgLlavaProcessor, info=AvgLlavaInfo, dummy_inputs=AvgLlavaDummyInputs)
class AvgLlavaForVllm(nn.Module, NativeEncoder, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Tower, projector, newline vector and vLLM's language model, for checkpoints of both layouts."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex={re.compile(name): new for name, new in (*TO_NATIVE, *FROM_NATIVE)})
    config: AvgLlavaConfig
    router = None

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return DEFAULT_IMAGE_TOKEN

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        stored, text = vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config
        self.config = config = native_view(stored)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_tower = build_tower(config.vision, config.vision_feature_layer, ranks)
            self.multi_modal_projector = build_projector(config.mm_projector_type, config.vision.hidden_size, text.hidden_size)
            self.image_newline = Newline(text.hidden_size) if config.mm_patch_merge_type == "spatial_unpad" else None
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model: Any = init_vllm_registered_model(
                vllm_config,
                hf_config=text,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    # ---- images --------------------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Visual tokens (T, D) of each image, in the order of the prompt.

        Args:
            kwargs: `pixel_values`, `image_sizes` (width, height) and `levels`, or `image_embeds`.
        """
        if kwargs.get("image_embeds") is not None:
            return list(kwargs["image_embeds"])
        if kwargs.get("pixel_values") is None:
            return []
        sizes = [(width, height) for width, height in kwargs["image_sizes"].tolist()]
        inputs = [ImageInput(views, size) for views, size in zip(kwargs["pixel_values"], sizes, strict=True)]
        return [
            self.visual_tokens(image.features, level, self.layouts(len(image.views), image.size, image.is_flat)[level])
            for image, level in zip(self.with_features(inputs), kwargs["levels"].flatten().tolist(), strict=True)
        ]

    # ---- text ----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's hidden states, or what the next stage of a pipeline gets."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits, in which the image token cannot win: it is no answer."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[..., self.config.image_token_id] = -torch.inf
        return logits

    # ---- weights -------------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the model from a checkpoint of either layout; the row for `<image>` is appended where the checkpoint has none."""
        named = self.hf_to_vllm_mapper.apply((name, tensor) for name, tensor in weights if not is_stored_buffer(name))
        return AutoWeightsLoader(self).load_weights(
            (name, self._with_image_row(tensor) if name in VOCABULARY else tensor) for name, tensor in named
        )

    def _with_image_row(self, weight: Tensor) -> Tensor:
        return append_mean_row(weight) if len(weight) == self.config.image_token_id else weight

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which part is what, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )
