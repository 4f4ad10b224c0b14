"""AVG-LLaVA as a native transformers model: LLaVA-NeXT's shape, with a step that decides how many tokens an image takes.

    ids with ONE image token per image ──expand──> ids with T of them ──as LlavaNext──> logits ──collapse──> one position per given id

`expand` composes (`llava.model.compose`): it encodes, routes, pools and merges, and repeats the image tokens. Ids that have T tokens per
image already are decided: the level is read off the length of their run and no router is asked. `generate` expands before transformers
looks at the prompt, so that every way of decoding sees a LlavaNext prompt, and puts the caller's own prompt back in front of the new ids.

Legend: B rows, L given positions, L' expanded ones, N images, C views, P patches, T visual tokens, D width, G levels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from llava.checkpoint_files import hub_options
from llava.constants import IGNORE_INDEX
from llava.crops import get_anyres_image_grid_shape
from llava.messages import RoutingRequest
from llava.model.compose import Composer, ImageInput, Size
from llava.model.loading import check_stored
from llava.model.merge import MergedLayout
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.hub import HubFolder
from llava.model.native.image_tokens import expand, images_behind, images_per_row, levels_of_runs
from llava.model.native.outline import check_outline
from llava.model.projector import build_projector
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


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """`pooler_output`: N tensors (T, D), by transformers' name for them; `routing`: N reports."""

    routing: list[RoutingReport] | None = None


@dataclass(frozen=True)
class ExpandedPrompt:
    """Prompts as LlavaNext knows them.

    input_ids, inputs_embeds: (B, L') or (B, L', D), whichever was given. attention_mask: (B, L').
    last: (B, L) where each given position went; `None` where nothing was expanded.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    image: ImageFeatures
    last: Tensor | None


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


class AvgLlavaModel(AvgLlavaPreTrainedModel, Composer):
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

    @property
    def newline(self) -> Tensor | None:  # type: ignore[override]
        return None if self.image_newline is None else self.image_newline()

    def tower_state(self, views: Tensor, **kwargs: Any) -> Tensor:
        """The tower's hidden state that the features are part of: (N, 3, S, S) -> (N, Q + P, Dv), with Q tokens before the patches."""
        output = self.vision_tower(views.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True, **kwargs)
        return output.hidden_states[self.config.vision_feature_layer]

    def encode_images(self, images: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Encode and project views: (N, 3, S, S) -> (N, P, D)."""
        height, width = self.config.patch_grid
        # Class and register tokens stand in front of the patches, in every tower.
        return self.multi_modal_projector(self.tower_state(images, **kwargs)[:, -height * width :])

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
            sizes = [(int(width), int(height)) for height, width in torch.as_tensor(image_sizes).tolist()]
        if len(sizes) != len(views):
            raise ValueError(f"{len(views)} images came with {len(sizes)} image_sizes; give one (height, width) per image.")
        return [ImageInput(image[: self._num_views(size, len(image))], size) for image, size in zip(views, sizes, strict=True)]

    def _num_views(self, size: Size | None, given: int) -> int:
        """Views of an image of (width, height) pixels, of those that a batch has a place for."""
        if size is None or given == 1:
            return given
        across, down = get_anyres_image_grid_shape(size, self.config.canvases, self.config.view_side)
        return 1 + across * down

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, vis_token_granularity: int | None = None, **kwargs: Any
    ) -> tuple | ImageFeatures:
        """Visual tokens at one granularity, by default the finest, without a router: `pooler_output` has N tensors (T, D)."""
        images = self.image_inputs(pixel_values, image_sizes)
        level = len(self.levels) - 1 if vis_token_granularity is None else self.level_of(vis_token_granularity)
        layouts = [self.layouts(len(image.views), image.size) for image in images]
        tokens = [
            self.visual_tokens(image.features, level, layout[level])
            for image, layout in zip(self.with_features(images), layouts, strict=True)
        ]
        return ImageFeatures(pooler_output=tokens)  # type: ignore[arg-type]

    # ---- a prompt to an expanded prompt --------------------------------------------------------------------------------------

    def image_positions(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L) true at image tokens, which are recognised by their embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None, "a prompt has ids or embeddings"
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
    ) -> ExpandedPrompt:
        """Encode the images, decide their granularities, and give each as many image tokens as it takes.

        Args:
            pixel_values, image_sizes: see `image_inputs`.
            input_ids, inputs_embeds: (B, L) or (B, L, D) with one image token per image, or with those of a level. One of the two.
            attention_mask: (B, L). labels: (B, L), by which the router tells answers where the ids do not mark them.
            request: by default the router chooses.

        Raises:
            ValueError: images and image tokens that do not match, or a request that cannot be met.
        """
        images = self.image_inputs(pixel_values, image_sizes)
        is_image = self.image_positions(input_ids, inputs_embeds)
        mask = torch.ones_like(is_image, dtype=torch.long) if attention_mask is None else attention_mask
        if int((is_image & mask.bool()).sum()) != len(images):
            return self._decided(images, is_image, mask, input_ids, inputs_embeds, request)
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
        last = None
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
        if image is None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            self._check_no_image_token(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
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


class AvgLlavaForConditionalGeneration(HubFolder, AvgLlavaPreTrainedModel, GenerationMixin):
    """The model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    inner_class = AvgLlavaModel

    def __init__(self, config: AvgLlavaConfig) -> None:
        super().__init__(config)
        text = config.text
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

    # ---- generation ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` on prompts with images: the given prompt, then the new ids.

        Args:
            inputs: (B, L) ids with one image token per image, or with those of a level; `input_ids=` and `inputs_embeds=` as well.
            vis_token_granularity: `None` lets the router choose where the model has one, a number fixes the tokens per view, a list limits
                the router to those. It may stand in the generation config, as may the next two.
            max_visual_tokens: a budget for the images of each row together.
            granularity_bias: added to the router's logits per log2 of the tokens; negative is cheaper.
            output_routing: also return one `RoutingReport` per image.
            kwargs: what the processor gives and what transformers' `generate` takes. `max_length` counts the given prompt.

        Returns:
            (B, L + new), or what `return_dict_in_generate` asks for; with `output_routing`, a pair with the reports.

        Raises:
            ValueError: as `AvgLlavaModel.expand`, or a cache that holds another prompt.
        """
        settings = generation_config or self.generation_config
        request = RoutingRequest(
            _setting(vis_token_granularity, settings, "vis_token_granularity", None),
            _setting(max_visual_tokens, settings, "max_visual_tokens", None),
            _setting(granularity_bias, settings, "granularity_bias", 0.0),
        )
        # An image token is no answer, and must not be drafted by prompt lookup.
        suppressed = {self.config.image_token_id, *(_setting(kwargs.get("suppress_tokens"), settings, "suppress_tokens", ()))}
        kwargs |= {"generation_config": generation_config, "suppress_tokens": sorted(suppressed)}
        given = inputs if inputs is not None else kwargs.pop("input_ids", None)
        kwargs.pop("input_ids", None)
        prompt = self._expand_turn(given, request, kwargs)
        if prompt is None:
            output = super().generate(given, *args, **kwargs)
            return (output, []) if output_routing else output
        if prompt.inputs_embeds is not None:
            kwargs["inputs_embeds"] = prompt.inputs_embeds
        kwargs["mm_encoder_outputs"] = {"image": prompt.image} if prompt.image.pooler_output else None
        added = 0
        if given is not None and prompt.input_ids is not None:
            added = prompt.input_ids.shape[1] - given.shape[1]
            for name in ("max_length", "min_length"):  # of what comes back, in which an image is one token again
                if (length := _setting(kwargs.get(name), settings, name, None)) is not None:
                    kwargs[name] = length + added
        output = super().generate(None, *args, input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, **kwargs)
        if added:
            output = _with_given_prompt(output, given, prompt, kwargs.get("past_key_values"))  # type: ignore[arg-type]
        return (output, prompt.image.routing or []) if output_routing else output

    def _expand_turn(self, given: Tensor | None, request: RoutingRequest, kwargs: dict[str, Any]) -> ExpandedPrompt | None:
        """The prompt of a call, expanded; `None` where there is nothing to expand, and `kwargs` are left as they are.

        What a cache from an earlier call holds stays as it was expanded then; only what stands behind it is expanded now.
        """
        pixel_values = kwargs.get("pixel_values")
        has_images = pixel_values is not None and len(pixel_values) > 0
        mask = kwargs.get("attention_mask")
        if mask is None and given is not None:
            mask = self._mask_of_padding(given)
        turn = Turn.of(kwargs.get("past_key_values"), given, mask, has_images)
        if not has_images and turn is None:
            return None
        image_sizes, embeds = kwargs.pop("image_sizes", None), kwargs.pop("inputs_embeds", None)
        for name in ("pixel_values", "position_ids", "attention_mask"):
            kwargs.pop(name, None)
        if turn is None:
            return self.model.expand(pixel_values, image_sizes, given, embeds, mask, request=request)
        assert given is not None and mask is not None, "a turn is known by its ids"
        known = turn.given.shape[1]
        ids, mask = given[:, known:], mask[:, known:]
        behind = (ids == self.config.image_token_id).sum(-1).tolist()
        if pixel_values is None or not has_images or not sum(behind):
            return turn.followed_by(ExpandedPrompt(ids, None, mask, ImageFeatures(), None))
        before = (turn.given == self.config.image_token_id).sum(-1).tolist()
        if len(pixel_values) == sum(before) + sum(behind):
            chosen = images_behind(before, behind)
            pixel_values, image_sizes = (None if each is None else each[chosen] for each in (pixel_values, image_sizes))
        return turn.followed_by(self.model.expand(pixel_values, image_sizes, ids, embeds, mask, request=request))

    def _mask_of_padding(self, input_ids: Tensor) -> Tensor:
        """What transformers infers where no mask is given: padding is the pad token, unless that also ends answers."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if pad is None or pad == eos or (isinstance(eos, list) and pad in eos):
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own. Images count when their tokens are read: in the first step, also of an assistant, or without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """transformers' own; a row that is repeated has its images repeated, all of them together."""
        encoded = kwargs.pop("mm_encoder_outputs", None)
        ids = kwargs.get("input_ids")
        if encoded and expand_size > 1:
            image: ImageFeatures = encoded["image"]
            tokens = list(image.pooler_output)  # type: ignore[arg-type]
            is_image = self.model.image_positions(ids if ids is not None and ids.numel() else None, kwargs.get("inputs_embeds"))
            repeated: list[Tensor] = []
            for count in images_per_row(is_image, [len(each) for each in tokens]):
                repeated += tokens[:count] * expand_size
                tokens = tokens[count:]
            encoded = {"image": ImageFeatures(pooler_output=repeated, routing=image.routing)}  # type: ignore[arg-type]
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        return ids, kwargs if encoded is None else {**kwargs, "mm_encoder_outputs": encoded}


register_stored_names(AvgLlavaConfig.model_type)


@dataclass(frozen=True)
class Turn:
    """What a cache holds: the prompt as the caller knows it and as it was expanded. It stays on the cache, for the next turn.

    given: (B, L). expanded, attention_mask: (B, L').
    """

    given: Tensor
    expanded: Tensor
    attention_mask: Tensor

    @staticmethod
    def of(cache: Any, input_ids: Tensor | None, attention_mask: Tensor | None, has_images: bool) -> Turn | None:
        """The turn that a cache remembers; where it remembers none and images are given, the ids that it holds, as they are.

        Raises:
            ValueError: ids that do not continue it: their positions are not the cache's, and the answer would be noise.
        """
        length = 0 if cache is None or input_ids is None else cache.get_seq_length()
        if input_ids is None or length == 0:
            return None
        turn: Turn | None = getattr(cache, "avg_llava_turn", None)
        if turn is not None and not _starts_with(input_ids, turn.expanded):
            if not _starts_with(input_ids, turn.given):
                raise ValueError(
                    "input_ids do not continue what past_key_values holds; give the whole conversation, as generate returned it, or no "
                    "cache."
                )
            return turn
        if not has_images:
            return None
        if input_ids.shape[1] <= length or attention_mask is None:
            raise ValueError(
                f"past_key_values holds {length} positions, and input_ids have {input_ids.shape[1]}; give the whole conversation with the "
                "cache of an earlier generate, or no cache."
            )
        return Turn(input_ids[:, :length], input_ids[:, :length], attention_mask[:, :length])

    def followed_by(self, prompt: ExpandedPrompt) -> ExpandedPrompt:
        """A prompt behind this one."""
        assert prompt.input_ids is not None, "a turn is continued by ids"
        ids = torch.cat([self.expanded, prompt.input_ids], dim=1)
        return ExpandedPrompt(ids, None, torch.cat([self.attention_mask, prompt.attention_mask], dim=1), prompt.image, None)


def _setting(given: Any, settings: Any, name: str, default: Any) -> Any:
    """An argument of `generate`, else what a generation config says."""
    stored = getattr(settings, name, None)
    return given if given is not None else default if stored is None else stored


def _starts_with(ids: Tensor, prefix: Tensor) -> bool:
    return len(ids) == len(prefix) and ids.shape[1] >= prefix.shape[1] and torch.equal(ids[:, : prefix.shape[1]], prefix)


def _with_given_prompt(output: Any, given: Tensor, prompt: ExpandedPrompt, cache: Any) -> Any:
    """Put the caller's own prompt back in front of the new ids, and remember on the cache how it was expanded."""
    assert prompt.input_ids is not None, "what was expanded has ids"
    sequences = output if isinstance(output, Tensor) else output.sequences
    per_prompt = len(sequences) // len(given)
    new = sequences[:, prompt.input_ids.shape[1] :]
    sequences = torch.cat([given.to(sequences.device).repeat_interleave(per_prompt, dim=0), new], dim=1)
    cache = getattr(output, "past_key_values", None) or cache
    if cache is not None:
        parts = (given, prompt.input_ids, prompt.attention_mask)
        cache.avg_llava_turn = Turn(*(part.repeat_interleave(per_prompt, dim=0) for part in parts))
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _split_mask(attention_mask: Tensor | None, prompt: Tensor | None, cache: Any) -> tuple[Tensor, Tensor | None]:
    """The mask of what a cache holds, (B, past), and of the prompt behind it, (B, L), given for both or for the prompt alone."""
    assert prompt is not None, "a prompt has ids or embeddings"
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] == past + prompt.shape[1]:
        return attention_mask[:, :past].long(), attention_mask[:, past:]
    return torch.ones(len(prompt), past, dtype=torch.long, device=prompt.device), attention_mask
