"""LLaVA's face: the model with the interface and the parameter names of the released LLaVA, on top of `compose.Composer`.

`LlavaMetaModel` holds vision tower, projector, newline vector and router beside the language model's layers; `LlavaMetaForCausalLM` turns
prompts and images into its inputs. `language_model/` mixes both into Llama and Mistral. As in LLaVA, a prompt marks an image by one id that
is no token (-200), images come in several containers, and `generate` returns the new tokens only. What happens between prompt and
language model is in `compose.py`.

Legend: as in `compose.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.crops import get_anyres_image_grid_shape as get_anyres_image_grid_shape  # LLaVA's callers import it from here
from llava.messages import RoutingRequest
from llava.model.compose import Composer, ImageInput, Size, Timer, untimed
from llava.model.config import LlavaConfig
from llava.model.loading import load_tower_weights, read_tower_config, resolve_tower
from llava.model.merge import unpad_image as unpad_image  # and this one
from llava.model.projector import build_projector, load_projector
from llava.model.router import GranularityRouter
from llava.model.routing import RoutingReport
from llava.model.splice import SplicedInputs, SplicedRow, pad_rows, prompt_rows
from llava.model.vision_tower import CLIPVisionTower
from llava.model.vocabulary import embed_new_tokens

Images = Tensor | Sequence[Tensor]

NEW_MODEL_FIELDS = (
    "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type", "image_aspect_ratio",
    "image_grid_pinpoints",
)  # fmt: skip
"""Fields that `initialize_vision_modules` takes from its arguments."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompts ready for the language model, and how each image's granularity came about."""

    inputs: SplicedInputs
    reports: list[RoutingReport]


def image_inputs(images: Images | None, image_sizes: Sequence[Sequence[int]] | None = None) -> list[ImageInput]:
    """Bring LLaVA's image containers to one form.

    Args:
        images: N of them: (N, C, 3, S, S), a list of (C, 3, S, S) or (3, S, S), or (N, 3, S, S). LLaVA lays the single views of the last
            form out flat, without the newline vector; this is what `process_images` gives for a model that cuts no tiles.
        image_sizes: N (width, height) in pixels.

    Raises:
        ValueError: another shape, or another number of sizes.
    """
    if images is None:
        return []
    is_flat = isinstance(images, Tensor) and images.ndim == 4
    views = [image if is_flat or image.ndim == 4 else image[None] for image in images]
    if wrong := [tuple(view.shape) for view in views if view.ndim != (3 if is_flat else 4)]:
        raise ValueError(f"Images have shapes {wrong}, expected (views, 3, side, side) each; prepare them with process_images.")
    sizes = [None] * len(views) if image_sizes is None else [(int(width), int(height)) for width, height in image_sizes]
    if len(sizes) != len(views):
        raise ValueError(f"{len(views)} images came with {len(sizes)} image_sizes; give one (width, height) per image.")
    return [ImageInput(view, size) for view, size in zip(views, sizes, strict=True)]


class InnerModel(nn.Module):
    """What the inner model of LLaVA's face has, whatever holds its parts."""

    config: Any
    router: GranularityRouter | None

    @property
    def newline(self) -> Tensor | None:
        """The vector (D,) that ends a row of tiles, where the model has one."""
        with align_module_device(self):  # an offloaded weight is there while its module runs, and this one is read before
            return getattr(self, "image_newline", None)

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Add a tower, read and frozen, and a fresh projector to a plain language model; a model that has them keeps them (LLaVA's name).

        Args:
            model_args: `vision_tower` (folder or hub id), the fields of `NEW_MODEL_FIELDS`, each `None` or missing for the
                configuration's own, and `pretrain_mm_mlp_adapter`, a projector to start from.
            fsdp: accepted for LLaVA's callers; the tower is a module like any other here.

        Raises:
            ValueError: no tower, or values that do not fit.
        """
        config = self.config
        tower = self.get_vision_tower()  # type: ignore[operator]
        if tower is None:
            self._add_vision_modules(model_args)  # type: ignore[operator]
        else:
            self.mm_projector.requires_grad_(True)  # type: ignore[union-attr, operator]
            if getattr(model_args, "mm_vision_select_layer", None) is not None:
                config.mm_vision_select_layer = model_args.mm_vision_select_layer
                tower.choose_layer(config.mm_vision_select_layer)
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if adapter is not None:
            load_projector(self, Path(adapter), getattr(model_args, "allow_bin_weights", False))

    def initialize_newline(self) -> None:
        """Draw a vector that ends rows of tiles, where there is none."""
        if self.newline is None:
            like = self.embedding_weight
            vector = torch.randn(like.shape[1], dtype=like.dtype, device=like.device) * like.shape[1] ** -0.5
            self.image_newline = nn.Parameter(vector)

    def initialize_router(self) -> GranularityRouter:
        """Add a new router where there is none, and keep an existing one; sets `config.router_select`."""
        self.config.router_select = True
        self.config.check_multimodal_fields()
        if self.router is None:
            like = self.embedding_weight
            self.router = GranularityRouter.from_config(self.config, like.shape[1]).to(device=like.device, dtype=like.dtype)
        return self.router

    @property
    def embedding_weight(self) -> Tensor:
        """The language model's embeddings (V, D), whose device and dtype new multimodal parts take."""
        return self.get_input_embeddings().weight  # type: ignore[operator, attr-defined]


class LlavaMetaModel(InnerModel):
    """Mixed into a language model's inner module: holds the tower, the projector, the newline vector and the router."""

    config: LlavaConfig

    def build_multimodal(self) -> None:
        """Build the parts that the configuration describes; that of a plain language model describes none."""
        config = self.config
        self.vision_tower: CLIPVisionTower | None = None
        self.router: GranularityRouter | None = None
        if config.vision_config is None:
            return
        self.vision_tower = CLIPVisionTower(
            config.vision_config, config.image_processor, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        self.vision_tower.vision_tower_name = config.mm_vision_tower
        config.mm_hidden_size = self.vision_tower.hidden_size
        self.mm_projector = build_projector(config.mm_projector_type, self.vision_tower.hidden_size, config.hidden_size)
        if config.mm_patch_merge_type == "spatial_unpad":
            # Drawn here as well as in init_multimodal_weights: the language model's own post_init has already passed over this module.
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        if config.router_select:
            self.router = GranularityRouter.from_config(self.config, self.config.hidden_size)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The vision tower; `None` for a plain language model (LLaVA's name)."""
        return self.vision_tower

    def _add_vision_modules(self, model_args: Any) -> None:
        config = self.config
        name = getattr(model_args, "vision_tower", None)
        if not name:
            raise ValueError("vision_tower is empty; name a CLIP folder or hub id to make this language model multimodal.")
        hub = {} if getattr(model_args, "cache_dir", None) is None else {"cache_dir": model_args.cache_dir}
        tower = resolve_tower(name)
        config.vision_config, config.image_processor = read_tower_config(tower, hub)
        config.mm_vision_tower = name
        for field in NEW_MODEL_FIELDS:
            if getattr(model_args, field, None) is not None:
                setattr(config, field, getattr(model_args, field))
        if not config.image_grid_pinpoints and config.image_aspect_ratio == "anyres":
            config.image_aspect_ratio = "square"  # LLaVA's, until the caller sets another
        config.check_multimodal_fields()
        like = self.embedding_weight
        self.build_multimodal()
        for part in (self.vision_tower, self.mm_projector, self.router):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype)
        if hasattr(self, "image_newline"):
            self.image_newline.data = self.image_newline.data.to(like)
        load_tower_weights(self, tower, hub)
        assert self.vision_tower is not None
        self.vision_tower.requires_grad_(False)

    def init_multimodal_weights(self, module: nn.Module) -> bool:
        """Initialise what the language model's own `_init_weights` does not know; return whether `module` was such a part."""
        if module is self and hasattr(self, "image_newline"):
            init.normal_(self.image_newline, std=self.config.hidden_size**-0.5)
            return True
        if isinstance(module, GranularityRouter):
            module.reset_parameters()
            return True
        return False


class RefuseNonFinite(LogitsProcessor):
    """Stops generation when the model's logits are non-finite, instead of emitting noise."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).any(dim=-1).all() or torch.isnan(scores).any():
            raise FloatingPointError(
                "The language model produced non-finite logits; load it in the dtype it was trained in (float32 or bfloat16) and check "
                "its weights."
            )
        return scores


class LlavaMetaForCausalLM(Composer):
    """Mixed into a causal language model: from prompts with placeholders and images to its inputs, its loss and its answers."""

    config: Any
    model: Any

    # ---- parts ---------------------------------------------------------------------------------------------------------------

    def get_model(self) -> Any:
        """The inner model, which holds the multimodal parts (LLaVA's name)."""
        return self.model

    def get_vision_tower(self) -> Any:
        """The vision tower, see `TowerNames`.

        Raises:
            ValueError: a plain language model without one.
        """
        tower = self.model.get_vision_tower()
        if tower is None:
            raise ValueError("This model has no vision tower, so it takes no images; load a LLaVA checkpoint or add a tower first.")
        return tower

    @property
    def router(self) -> GranularityRouter | None:  # type: ignore[override]
        return self.model.router

    @property
    def newline(self) -> Tensor | None:  # type: ignore[override]
        return self.model.newline

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of what may follow positions with these last hidden states (..., D)."""
        return self.of_answers(self.lm_head(hidden))  # type: ignore[operator, attr-defined]

    def of_answers(self, logits: Tensor) -> Tensor:
        """The head's logits (..., V), without what no answer has."""
        return logits

    def processor(self, tokenizer: Any) -> Any:
        """What is saved beside the weights, for a tokenizer: here itself, in the native layout a processor that holds it."""
        return tokenizer

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the tokens around images that `mm_use_im_patch_token` and `mm_use_im_start_end` of `model_args` ask for (LLaVA's name).

        A new token's embedding is the mean of the old ones.
        """
        wanted = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        if model_args.mm_use_im_start_end:
            wanted += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        self.config.mm_use_im_patch_token = bool(model_args.mm_use_im_patch_token)
        self.config.mm_use_im_start_end = bool(model_args.mm_use_im_start_end)
        if added := tokenizer.add_tokens(wanted, special_tokens=True):
            embed_new_tokens(self, len(tokenizer), added)

    def encode_images(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Encode and project views: (N, 3, S, S) -> (N, P, D)."""
        features = self.get_vision_tower()(images)
        return self.model.mm_projector(features)

    def embed_text(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (L,) -> (L, D)."""
        return self.model.get_input_embeddings()(ids)

    # ---- prompts as tensors --------------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        request: RoutingRequest | None = None,
        padding_side: str = "left",
        timer: Timer = untimed,
        always_route: bool = False,
    ) -> EncodedPrompt:
        """`compose` for prompts and images as LLaVA gives them, padded.

        Args:
            input_ids: (B, L) with one placeholder per image. attention_mask, labels: (B, L).
            images, image_sizes: see `image_inputs`.
            request, timer, always_route: see `compose`.

        Raises:
            ValueError: as `image_inputs` and `compose`.
        """
        rows = prompt_rows(input_ids, attention_mask, labels)
        composed = self.compose(rows, image_inputs(images, image_sizes), request, timer, always_route)
        inputs = pad_rows([each.row for each in composed], padding_side)
        return EncodedPrompt(inputs, [report for each in composed for report in each.reports])

    def route_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, features: Sequence[Tensor]
    ) -> Tensor:
        """`router_logits` for prompts as (B, L) tensors and the (C, P, D) features of their images: (N, G)."""
        return self.router_logits(prompt_rows(input_ids, attention_mask, labels), features)

    def splice_levels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size] | None,
        granularities: Sequence[int],
    ) -> list[list[SplicedRow]]:
        """Every row at every one of the given granularities, before padding, by granularity and row.

        Args:
            features: N tensors (C, P, D). image_sizes: N (width, height). granularities: tokens per view.
        """
        rows = prompt_rows(input_ids, attention_mask, labels)
        sizes: Sequence[Size | None] = image_sizes or [None] * len(features)
        images = [ImageInput(image, size, is_encoded=True) for image, size in zip(features, sizes, strict=True)]
        layouts = [self.layouts(len(image), size) for image, size in zip(features, sizes, strict=True)]
        levels = [self.level_of(granularity) for granularity in granularities for _ in images]
        times = len(granularities)
        spliced = self.splice_at(rows * times, images * times, levels, layouts * times)
        return [spliced[start : start + len(rows)] for start in range(0, len(spliced), len(rows))]

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        attention_mask: Tensor | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float = 0.0,
    ) -> list[RoutingReport]:
        """One routing report per image, without generating: the router's logits, and the visual tokens that the choice would cost."""
        request = RoutingRequest(vis_token_granularity, max_visual_tokens, granularity_bias)
        return self.encode_prompt(input_ids, images, image_sizes, attention_mask, request=request, always_route=True).reports

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sequence[Size] | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """LLaVA's signature: (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

        Without images, or one position wide (a cached step), the arguments come back untouched and `inputs_embeds` is `None`. What was
        not given (mask, positions, labels) is `None` in the result too. Rows pad to the side of `config.tokenizer_padding_side`.
        """
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        request = RoutingRequest(vis_token_granularity)
        side = self.config.tokenizer_padding_side
        inputs = self.encode_prompt(input_ids, images, image_sizes, attention_mask, labels, request, side).inputs
        return (
            None,
            None if position_ids is None else inputs.position_ids,
            None if attention_mask is None else inputs.attention_mask.to(attention_mask.dtype),
            past_key_values,
            inputs.inputs_embeds,
            None if labels is None else inputs.labels,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The language model over prompts with images; with `labels`, also the mean loss over supervised tokens.

        Args:
            images, image_sizes, vis_token_granularity: as in `generate`. Everything else is the language model's own.
        """
        if inputs_embeds is None and input_ids is not None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes, vis_token_granularity
            )
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        attention_mask: Tensor | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float = 0.0,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts.

        Args:
            input_ids: (B, L) with one placeholder per image; `inputs=` is accepted too. Pad either side and give the mask: rows are
                padded to the left whatever the training side was.
            images: N images in reading order over the batch, see `image_inputs`; text-only rows have none.
            image_sizes: N (width, height) in pixels.
            vis_token_granularity: `None` lets the router choose where the model has one, a number fixes the tokens per view, a list
                limits the router to those.
            max_visual_tokens: a budget for the images of each row together.
            granularity_bias: added to the router's logits per log2 of the tokens; negative is cheaper.
            output_routing: also return one `RoutingReport` per image.
            kwargs: transformers' generation arguments.

        Returns:
            New tokens only, (B, new), or what `return_dict_in_generate` asks for; with `output_routing`, a pair with the reports.

        Raises:
            ValueError: input that cannot work, see `encode_prompt`.
            FloatingPointError: non-finite logits.
        """
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        reports: list[RoutingReport] = []
        if kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise ValueError("generate got neither input_ids nor inputs_embeds; give one.")
            request = RoutingRequest(vis_token_granularity, max_visual_tokens, granularity_bias)
            prompt = self.encode_prompt(input_ids, images, image_sizes, attention_mask, request=request)
            reports, attention_mask = prompt.reports, prompt.inputs.attention_mask.long()
            kwargs["inputs_embeds"] = prompt.inputs.inputs_embeds
            kwargs.pop("position_ids", None)
        kwargs["logits_processor"] = LogitsProcessorList([RefuseNonFinite(), *(kwargs.pop("logits_processor", None) or [])])
        output = super().generate(attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        return (output, reports) if output_routing else output

