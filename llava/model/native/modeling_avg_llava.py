"""AVG-LLaVA as a native transformers model: LLaVA-NeXT's shape, with a step that decides how many tokens an image takes.

    ids with ONE image token per image ──expand──> ids with T of them ──as LlavaNext──> logits ──collapse──> one position per given id

`expand` composes (`llava.model.compose`): it encodes, routes, pools and merges, and repeats the image tokens. Ids that have T tokens per
image already are decided: the level is read off the length of their run and no router is asked. How prompts are answered:
`generation_avg_llava.py`.

Legend: B rows, L given positions, L' expanded ones, N images, C views, P patches, T visual tokens, D width, G levels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import is_tracing, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from llava.checkpoint_files import hub_options
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.messages import RoutingRequest
from llava.model.compose import Composer, ImageInput, Size
from llava.model.loading import check_stored
from llava.model.merge import MergedLayout
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.expanded_prompt import ExpandedPrompt, ImageFeatures
from llava.model.native.generation_avg_llava import AvgLlavaGenerationMixin
from llava.model.native.hub import HubFolder
from llava.model.native.image_tokens import expand, levels_of_runs
from llava.model.native.outline import check_outline
from llava.model.projector import build_projector
from llava.model.quantization import kept_in_float32
from llava.model.router import GranularityRouter, register_stored_names
from llava.model.routing import RoutingReport
from llava.model.splice import PromptRow, check_context


@dataclass
class AvgLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: (sum of T, D); `routing`: one report per image, both `None` where no image was encoded."""

    image_hidden_states: Tensor | None = None
    routing: list[RoutingReport] | None = None


@dataclass
class AvgLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`image_hidden_states`: (sum of T, D); `routing`: one report per image, both `None` where no image was encoded."""

    image_hidden_states: Tensor | None = None
    routing: list[RoutingReport] | None = None


class Newline(nn.Module):
    """The vector that ends a row of tiles, as a module, so that offloading and sharding see it being used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        return self.weight


class AvgLlavaPreTrainedModel(PreTrainedModel):
    """What the model with and without its head share."""

    config: AvgLlavaConfig
    config_class = AvgLlavaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which takes a checkpoint that has been tried out without its weights.

        Raises:
            ValueError: a configuration or weights that cannot work, in one sentence.
        """
        config = kwargs.get("config")
        if pretrained_model_name_or_path is not None and not kwargs.get("ignore_mismatched_sizes"):
            hub = hub_options(kwargs)
            judged: Any = config
            if not isinstance(config, AvgLlavaConfig):
                judged = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
            check_stored(pretrained_model_name_or_path, judged, hub, partial(check_outline, cls))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Newline):
            init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
        if isinstance(module, GranularityRouter):
            module.reset_parameters()


class NativeEncoder(Composer):
    """The composer's steps from views to features, for a module that has the parts of `AvgLlavaModel` under their names there.

    vision_tower: gives its hidden states as transformers' towers do. multi_modal_projector. image_newline: `None` where there is none.
    """

    config: AvgLlavaConfig
    vision_tower: Any
    multi_modal_projector: nn.Module
    image_newline: Newline | None

    @property
    def newline(self) -> Tensor | None:  # type: ignore[override]
        return None if self.image_newline is None else self.image_newline()

    def tower_output(self, views: Tensor, **kwargs: Any) -> Any:
        """The tower's output for views (N, 3, S, S), hidden states included."""
        return self.vision_tower(views.to(self.vision_tower.dtype), **{**kwargs, "output_hidden_states": True, "return_dict": True})

    def tower_state(self, views: Tensor) -> Tensor:
        """The tower's hidden state that the features are part of: (N, 3, S, S) -> (N, Q + P, Dv), with Q tokens before the patches."""
        return self.tower_output(views).hidden_states[self.config.vision_feature_layer]

    def encode_images(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Encode and project views: (N, 3, S, S) -> (N, P, D)."""
        return self._project(self.tower_state(images))

    def _project(self, state: Tensor) -> Tensor:
        """A tower's hidden state to features of the text model's width: (N, Q + P, Dv) -> (N, P, D)."""
        height, width = self.config.patch_grid
        # Class and register tokens stand in front of the patches, in every tower.
        return self.multi_modal_projector(state[:, -height * width :])


class AvgLlavaModel(AvgLlavaPreTrainedModel, NativeEncoder):
    """Tower, projector, newline vector, router and text model, without the head."""

    def __init__(self, config: AvgLlavaConfig) -> None:
        super().__init__(config)
        text = config.text
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config.mm_projector_type, config.vision.hidden_size, text.hidden_size)
        self.image_newline = Newline(text.hidden_size) if config.mm_patch_merge_type == "spatial_unpad" else None
        self.router = GranularityRouter.from_config(config, text.hidden_size) if config.router_select else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    # ---- parts of the composer -----------------------------------------------------------------------------------------------

    def embed_text(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (L,) -> (L, D)."""
        return self.get_input_embeddings()(ids)

    # ---- images --------------------------------------------------------------------------------------------------------------

    def image_inputs(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[ImageInput]:
        """The images of a processor's call.

        Args:
            pixel_values: (N, C, 3, S, S), of which an image with fewer than C views uses the first; or (N, 3, S, S), one view each.
            image_sizes: (N, 2), (height, width) in pixels; only images with tiles need them.

        Raises:
            ValueError: other shapes, or another number of sizes.
        """
        side = self.config.view_side
        if pixel_values.ndim not in (4, 5) or tuple(pixel_values.shape[-3:]) != (3, side, side):
            raise ValueError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}, expected (images, views, 3, {side}, {side}) or that without "
                "views; use the processor saved with the model."
            )
        views = pixel_values if pixel_values.ndim == 5 else pixel_values[:, None]
        if image_sizes is None:
            sizes: list[Size | None] = [None] * len(views)
        else:
            given = torch.as_tensor(image_sizes)
            if given.ndim != 2 or given.shape[1] != 2:
                raise ValueError(f"image_sizes have the shape {tuple(given.shape)}, expected ({len(views)}, 2), (height, width) per image.")
            sizes = [(int(width), int(height)) for height, width in given.tolist()]
        if len(sizes) != len(views):
            raise ValueError(f"{len(views)} images came with {len(sizes)} image_sizes; give one (height, width) per image.")
        return [ImageInput(image[: self._num_views(size, len(image))], size) for image, size in zip(views, sizes, strict=True)]

    def _num_views(self, size: Size | None, given: int) -> int:
        """Views of an image of (width, height) pixels, of those that a batch has a place for."""
        return given if size is None or given == 1 else self.config.num_views_of(size)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, vis_token_granularity: int | None = None, **kwargs: Any
    ) -> tuple | ImageFeatures:
        """Visual tokens at one granularity, by default the finest, without a router: `pooler_output` has N tensors (T, D).

        `hidden_states` and `attentions` are the tower's, of all views, where they are asked for as of any model.
        """
        images = self.image_inputs(pixel_values, image_sizes)
        level = len(self.levels) - 1 if vis_token_granularity is None else self.level_of(vis_token_granularity)
        output = self.tower_output(torch.cat([image.views for image in images]), **kwargs)
        state = output.hidden_states[self.config.vision_feature_layer]
        features = self._project(state).split([len(image.views) for image in images])
        layouts = [self.layouts(len(image.views), image.size)[level] for image in images]
        keeps = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        return ImageFeatures(
            last_hidden_state=output.last_hidden_state,
            pooler_output=[self.visual_tokens(own, level, layout) for own, layout in zip(features, layouts, strict=True)],  # type: ignore[arg-type]
            hidden_states=output.hidden_states if keeps else None,
            attentions=output.attentions,
        )

    # ---- a prompt to an expanded prompt --------------------------------------------------------------------------------------

    def image_positions(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L) true at image tokens, which are recognised by their embedding where there are no ids."""
        if input_ids is not None:
            torch_compilable_check(
                (input_ids != IMAGE_TOKEN_INDEX).all(),
                f"The prompts have {IMAGE_TOKEN_INDEX}, LLaVA's placeholder for an image, which is no token here; write the image token, "
                f"{self.config.image_token_id}, as the processor saved with the model does.",
            )
            return input_ids == self.config.image_token_id
        width = self.config.text.hidden_size
        if inputs_embeds is None or inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
            found = "missing" if inputs_embeds is None else f"of the shape {tuple(inputs_embeds.shape)}"
            raise ValueError(f"inputs_embeds are {found}, expected (rows, positions, {width}); give input_ids or embeddings of that shape.")
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how long the prompt becomes is data, which no trace can hold
    def expand(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        request: RoutingRequest | None = None,
        padding_side: str = "left",
        gives_way: bool = False,
    ) -> ExpandedPrompt:
        """Encode the images, decide their granularities, and give each as many image tokens as it takes.

        Args:
            pixel_values, image_sizes: see `image_inputs`.
            input_ids, inputs_embeds: (B, L) or (B, L, D) with one image token per image, or with those of a level. One of the two.
            attention_mask: (B, L). labels: (B, L), by which the router tells answers where the ids do not mark them.
            request: by default the router chooses.
            padding_side: of the expanded prompts.
            gives_way: whether the request is a default, which counts for nothing where image tokens decide already.

        Raises:
            ValueError: images and image tokens that do not match, other shapes, or a request that cannot be met.
        """
        images = self.image_inputs(pixel_values, image_sizes)
        is_image = self.image_positions(input_ids, inputs_embeds)
        mask = torch.ones_like(is_image, dtype=torch.long) if attention_mask is None else attention_mask
        if is_image.ndim != 2 or mask.shape != is_image.shape:
            raise ValueError(
                f"The prompts have the shape {tuple(is_image.shape)} and attention_mask {tuple(mask.shape)}, expected (rows, positions) of "
                "both; give the mask that the processor wrote for these prompts."
            )
        if int((is_image & mask.bool()).sum()) != len(images):
            return self._decided(images, is_image, mask, input_ids, inputs_embeds, None if gives_way else request)
        rows = self._rows(is_image, mask, input_ids, inputs_embeds, labels)
        plan = self.plan(rows, images, request)
        images = self.with_features(images)
        logits = self.logits_where_asked(rows, images, plan)
        image = self._image_features(images, plan.layouts, plan.choose(logits), logits)
        expansion = expand(is_image & mask.bool(), mask, [len(tokens) for tokens in image.pooler_output], padding_side)  # type: ignore[union-attr]
        check_context([row.num_text_tokens for row in rows], expansion.attention_mask.sum(-1).tolist(), self.config.context_length)
        pad = self.config.text.pad_token_id
        ids = None if input_ids is None else expansion.take(input_ids, 0 if pad is None else pad)
        embeds = None if inputs_embeds is None else expansion.take(inputs_embeds, 0.0)
        return ExpandedPrompt(ids, embeds, expansion.attention_mask, image, expansion.last)

    def _decided(
        self,
        images: Sequence[ImageInput],
        is_image: Tensor,
        mask: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        request: RoutingRequest | None,
    ) -> ExpandedPrompt:
        """Prompts whose image tokens decide for a level of each image."""
        layouts = [self.layouts(len(image.views), image.size) for image in images]
        costs = [[layout.num_tokens for layout in each] for each in layouts]
        levels = levels_of_runs(is_image & mask.bool(), costs)
        num_text_tokens = (~is_image & mask.bool()).sum(-1).tolist()
        check_context(num_text_tokens, mask.bool().sum(-1).tolist(), self.config.context_length)
        if request is not None and request != RoutingRequest():
            decided = [self.levels[level].tokens for level in levels]
            raise ValueError(
                f"The prompts have the image tokens of {decided} tokens per view already, so a granularity, budget or bias cannot count; "
                "write one image token per image, or leave them out."
            )
        return ExpandedPrompt(input_ids, inputs_embeds, mask, self._image_features(self.with_features(images), layouts, levels, {}), None)

    def _rows(
        self, is_image: Tensor, mask: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None
    ) -> list[PromptRow]:
        """The prompts as the composer reads them, without padding."""
        ids = torch.zeros_like(mask, dtype=torch.long) if input_ids is None else input_ids
        known = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels
        parts = zip(ids, known, is_image, mask.bool(), [None] * len(ids) if inputs_embeds is None else inputs_embeds, strict=True)
        return [
            PromptRow(row_ids[keep], row_labels[keep], row_images[keep], None if embeds is None else embeds[keep])
            for row_ids, row_labels, row_images, keep, embeds in parts
        ]

    def _image_features(
        self, images: Sequence[ImageInput], layouts: Sequence[Sequence[MergedLayout]], levels: Sequence[int], logits: dict[int, Tensor]
    ) -> ImageFeatures:
        tokens = [
            self.visual_tokens(image.features, level, layout[level]) for image, layout, level in zip(images, layouts, levels, strict=True)
        ]
        reports = [self.report(level, layouts[image], logits.get(image)) for image, level in enumerate(levels)]
        return ImageFeatures(pooler_output=tokens, routing=reports)  # type: ignore[arg-type]

    # ---- forward -------------------------------------------------------------------------------------------------------------

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float = 0.0,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple | AvgLlavaModelOutputWithPast:
        """The text model over prompts: the last hidden state (B, L, D) of the given positions, however many tokens an image takes.

        `hidden_states` and `attentions` are the text model's own, of all its positions (B, L', D).

        Args:
            input_ids, inputs_embeds, attention_mask, pixel_values, image_sizes, labels: see `expand`.
            position_ids: (B, L), taken where nothing is expanded.
            vis_token_granularity, max_visual_tokens, granularity_bias: see `AvgLlavaForConditionalGeneration.generate`.
            mm_encoder_outputs: `ImageFeatures` under `image`, of a prompt that was expanded; in place of `pixel_values`.

        Raises:
            ValueError: as `expand`; image tokens without images; or neither or both of ids and embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        image: ImageFeatures | None = (mm_encoder_outputs or {}).get("image")
        last = silent = None
        if pixel_values is not None and len(pixel_values) > 0:
            if image is not None:
                raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time.")
            request = RoutingRequest(vis_token_granularity, max_visual_tokens, granularity_bias)
            side = "right" if self.training else "left"
            behind, new = _split_mask(attention_mask, input_ids if inputs_embeds is None else inputs_embeds, past_key_values)
            prompt = self.expand(pixel_values, image_sizes, input_ids, inputs_embeds, new, labels, request, side)
            input_ids, inputs_embeds, image, last = prompt.input_ids, prompt.inputs_embeds, prompt.image, prompt.last
            if last is not None:
                attention_mask = torch.cat([behind, prompt.attention_mask], dim=1)
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, behind.shape[1] :]
        elif image is None and input_ids is not None and self.training and torch.is_grad_enabled():
            silent = self._silent_image(vis_token_granularity)
        # A step of decoding has no image token to look for, and a compiled one no branch on a static cache's length.
        if image is None and not is_tracing() and (past_key_values is None or past_key_values.get_seq_length() == 0):
            self._check_no_image_token(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if silent is not None:
            inputs_embeds = inputs_embeds + silent.to(inputs_embeds.dtype)
        tokens = None
        if image is not None:
            tokens, inputs_embeds = self._with_images(image, input_ids, inputs_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if last is not None:
            hidden = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        return AvgLlavaModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tokens,
            routing=None if image is None else image.routing,
        )

    def _silent_image(self, granularity: int | Sequence[int] | None) -> Tensor:
        """A zero that went the way of an image, for a batch of text to train with: its gradients are zeros where they would be missing.

        Processes that train together wait for one another's gradients, and under ZeRO-3 for one another's use of every module.
        """
        side = self.config.view_side
        token = torch.tensor([[self.config.image_token_id]], device=self.device)
        view = torch.zeros(1, 1, 3, side, side, device=self.device)
        prompt = self.expand(view, torch.tensor([[side, side]]), token, request=RoutingRequest(granularity))
        return (0.0 * prompt.image.pooler_output[0]).sum()  # type: ignore[index]  # a sum of features may leave float16, and 0 * inf is nan

    def _check_no_image_token(self, input_ids: Tensor | None) -> None:
        """Refuse image tokens in a prompt without images, whose embedding means nothing."""
        if input_ids is not None:
            is_image = self.image_positions(input_ids, None)
            torch_compilable_check(
                ~is_image.any(),
                lambda: f"The prompts have {int(is_image.sum())} image tokens but no image; give pixel_values, or leave them out.",
            )

    def _with_images(self, image: ImageFeatures, input_ids: Tensor | None, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """The visual tokens (sum of T, D), and the embeddings with them in place of the image tokens."""
        tokens = torch.cat(list(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)  # type: ignore[arg-type]
        is_image = self.image_positions(input_ids, inputs_embeds)
        torch_compilable_check(
            is_image.sum() == len(tokens),
            lambda: f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, features: {len(tokens)}.",
        )
        return tokens, inputs_embeds.masked_scatter(is_image[..., None], tokens)


class AvgLlavaForConditionalGeneration(HubFolder, AvgLlavaPreTrainedModel, AvgLlavaGenerationMixin):
    """The model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    inner_class = AvgLlavaModel

    def __init__(self, config: AvgLlavaConfig) -> None:
        super().__init__(config)
        text = config.text
        self._keep_in_fp32_modules = kept_in_float32(config)
        self.model = self.inner_class(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> tuple | ImageFeatures:
        """See `AvgLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float = 0.0,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple | AvgLlavaCausalLMOutputWithPast:
        """Logits (B, L, V) of the given positions; with `labels` (B, L) also the mean loss over what they supervise.

        Args:
            logits_to_keep: how many of the last positions, or their indices; 0 keeps all.
            Everything else: see `AvgLlavaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            vis_token_granularity=vis_token_granularity,
            max_visual_tokens=max_visual_tokens,
            granularity_bias=granularity_bias,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            labels = self._supervised(labels, input_ids, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text.vocab_size, **kwargs)
        return AvgLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            routing=outputs.routing,
        )

    def _supervised(self, labels: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """The labels (B, L) of real text that something real stands before, so that a batch has the loss of its rows."""
        ignored = torch.zeros_like(labels, dtype=torch.bool) if input_ids is None else input_ids == self.config.image_token_id
        if attention_mask is not None and attention_mask.shape == labels.shape:
            hidden = attention_mask == 0
            ignored = ignored | hidden
            ignored[:, 1:] |= hidden[:, :-1]
        return labels.masked_fill(ignored, IGNORE_INDEX)


register_stored_names(AvgLlavaConfig.model_type)


def _split_mask(attention_mask: Tensor | None, prompt: Tensor | None, cache: Any) -> tuple[Tensor, Tensor | None]:
    """The mask of what a cache holds, (B, past), and of the prompt behind it, (B, L), given for both or for the prompt alone."""
    assert prompt is not None, "a prompt has ids or embeddings"
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] == past + prompt.shape[1]:
        return attention_mask[:, :past].long(), attention_mask[:, past:]
    return torch.ones(len(prompt), past, dtype=torch.long, device=prompt.device), attention_mask
