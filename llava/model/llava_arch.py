"""The page that composes the model: read this first.

    images ──prepare_views──> views ──encode_views──> features ──route_logits──> logits ──decide──> a granularity per image
                                         │                                                             │
                                         └───────────────visual_tokens (pool, merge)<─────────────────┘
    prompt ids ──prompt_rows──> rows ──splice──> embeddings, mask, positions, labels ──> the language model

Every caller (training, generation, evaluation, serving) takes these steps in this order and encodes an image once, however many
granularities it then looks at. Each step is a file of its own that imports none of its neighbours; here is no arithmetic.

Legend: B rows, N images of a batch, C views of an image, P patches, T visual tokens, G granularities, D width, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.crops import get_anyres_image_grid_shape
from llava.messages import RoutingRequest
from llava.model.config import LlavaConfig
from llava.model.granularity import Granularity, pool
from llava.model.merge import MergedLayout, merge_views, merged_layout
from llava.model.projector import build_projector
from llava.model.router import GranularityRouter, select_text
from llava.model.routing import RoutingReport, allowed_levels, check_budget, choose_levels, levels_per_image
from llava.model.splice import PromptRow, SplicedInputs, SplicedRow, images_of_rows, pad_rows, prompt_rows, splice, splice_rows
from llava.model.vision_tower import CLIPVisionTower

Images = Tensor | Sequence[Tensor]
Size = tuple[int, int]
Timer = Callable[[str], AbstractContextManager[None]]


def untimed(stage: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompts ready for the language model, and how each image's granularity came about."""

    inputs: SplicedInputs
    reports: list[RoutingReport]


@dataclass(frozen=True)
class EncodedRow:
    """One prompt before padding, and one report per image of it."""

    row: SplicedRow
    reports: list[RoutingReport]


@dataclass(frozen=True)
class RoutingPlan:
    """What is known about B rows and their N images before a pixel is looked at.

    owners: for each row, the indices of its images. requests: the callers' wishes, one per row. allowed: level indices each row may take.
    layouts: what each image keeps at each level.
    """

    owners: list[range]
    requests: list[RoutingRequest]
    allowed: list[list[int]]
    layouts: list[list[MergedLayout]]

    def costs(self, row: int) -> list[list[int]]:
        """Visual tokens of each image of a row at each level."""
        return [[layout.num_tokens for layout in self.layouts[image]] for image in self.owners[row]]

    def levels(self, row: int) -> list[Sequence[int]]:
        """Level indices that each image of a row may get."""
        return levels_per_image(self.allowed[row], self.requests[row], len(self.owners[row]))

    def asks_router(self, row: int) -> bool:
        """Whether there is an image in a row whose level is the router's to choose."""
        return any(len(levels) > 1 and self.requests[row].detail_of(image) is None for image, levels in enumerate(self.levels(row)))


class LlavaMetaModel(nn.Module):
    """Mixed into a language model's inner module: holds the tower, the projector, the newline vector and the router."""

    config: LlavaConfig

    def build_multimodal(self) -> None:
        """Make the parts that the configuration describes; a plain language model's configuration describes none."""
        config = self.config
        self.vision_tower: CLIPVisionTower | None = None
        self.router: GranularityRouter | None = None
        if config.vision_config is None:
            return
        self.vision_tower = CLIPVisionTower(
            config.vision_config, config.image_processor, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        config.mm_hidden_size = self.vision_tower.hidden_size
        self.mm_projector = build_projector(config.mm_projector_type, self.vision_tower.hidden_size, config.hidden_size)
        if config.mm_patch_merge_type == "spatial_unpad":
            # Drawn here as well as in init_multimodal_weights: the language model's own post_init has already passed over this module.
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        if config.router_select:
            self.router = self._new_router()

    def _new_router(self) -> GranularityRouter:
        config = self.config
        return GranularityRouter(
            config.hidden_size,
            config.patch_grid,
            config.levels,
            config.filtered_text_num,
            config.router_attention_axis,
            config.router_hidden_size,
            config.router_dropout,
        )

    def initialize_router(self) -> GranularityRouter:
        """Add a fresh router where there is none; a trained one is kept. `config.router_select` is set."""
        self.config.router_select = True
        self.config.check_multimodal_fields()
        if self.router is None:
            like = self.embedding_weight
            self.router = self._new_router().to(device=like.device, dtype=like.dtype)
        return self.router

    @property
    def embedding_weight(self) -> Tensor:
        """The language model's embeddings (V, D), whose device and dtype new multimodal parts take."""
        return self.get_input_embeddings().weight  # type: ignore[operator, attr-defined]

    def init_multimodal_weights(self, module: nn.Module) -> bool:
        """Initialise what the language model's own `_init_weights` does not know; tell whether `module` was such a part."""
        if module is self and hasattr(self, "image_newline"):
            init.normal_(self.image_newline, std=self.config.hidden_size**-0.5)
            return True
        if isinstance(module, GranularityRouter):
            module.reset_parameters()
            return True
        return False


class RefuseNonFinite(LogitsProcessor):
    """Stops generation when the model's numbers have broken down, instead of emitting noise."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).any(dim=-1).all() or torch.isnan(scores).any():
            raise FloatingPointError(
                "The language model produced non-finite logits; load it in the dtype it was trained in (float32 or bfloat16) and check "
                "its weights."
            )
        return scores


class LlavaMetaForCausalLM:
    """Mixed into a causal language model: from prompts with placeholders and images to its inputs."""

    config: LlavaConfig
    model: Any

    # ---- parts ---------------------------------------------------------------------------------------------------------------

    def get_model(self) -> Any:
        """The inner model, which holds the multimodal parts (LLaVA's name)."""
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower:
        """The vision tower.

        Raises:
            ValueError: a plain language model without one.
        """
        if self.model.vision_tower is None:
            raise ValueError("This model has no vision tower, so it takes no images; load a LLaVA checkpoint or add a tower first.")
        return self.model.vision_tower

    @property
    def levels(self) -> tuple[Granularity, ...]:
        """The granularities of this model, coarse to fine."""
        return self.config.levels

    # ---- image to features: once per image -----------------------------------------------------------------------------------

    def prepare_views(self, images: Images) -> list[Tensor]:
        """Bring LLaVA's image containers to one form.

        Args:
            images: (N, 3, S, S) single views; (N, C, 3, S, S); or a list of (C, 3, S, S) or (3, S, S).

        Returns:
            N tensors (C, 3, S, S).
        """
        views = [image if image.ndim == 4 else image[None] for image in images]
        wrong = [tuple(view.shape) for view in views if view.ndim != 4]
        if wrong:
            raise ValueError(f"Images have shapes {wrong}, expected (views, 3, side, side) each; prepare them with process_images.")
        return views

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode and project views: (N, 3, S, S) -> (N, P, D)."""
        return self.model.mm_projector(self.get_vision_tower()(images))

    def encode_views(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Encode all views of all images in one call of the tower: (C_i, 3, S, S) each -> (C_i, P, D) each."""
        if not views:
            return []
        tower = self.get_vision_tower()
        stacked = torch.cat([view.to(tower.device, tower.dtype) for view in views])
        return list(self.encode_images(stacked).split([len(view) for view in views]))

    # ---- features to a granularity -------------------------------------------------------------------------------------------

    def route_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, features: Sequence[Tensor]
    ) -> Tensor:
        """The router's logits for every image.

        Args:
            input_ids, attention_mask, labels: (B, L); what has a label is an answer and hidden from the router.
            features: N tensors (C, P, D) from `encode_views`.

        Returns:
            (N, G), coarse to fine.

        Raises:
            ValueError: the model has no router, or images and placeholders disagree.
        """
        return self._route_rows(prompt_rows(input_ids, attention_mask, labels), features)

    def _route_rows(self, rows: Sequence[PromptRow], features: Sequence[Tensor]) -> Tensor:
        router = self.model.router
        if router is None:
            raise ValueError("This model has no router; give a vis_token_granularity.")
        config = self.config
        text_ids = [row.ids[~row.is_image] for row in rows]
        words_of_rows = self.model.embed_tokens(torch.cat(text_ids)).split([len(ids) for ids in text_ids])
        fill = config.router_text_fill == "answer"
        texts: list[Tensor] = []
        for row, words, owned in zip(rows, words_of_rows, images_of_rows(rows, len(features)), strict=True):
            eligible = row.labels[~row.is_image] < 0
            texts += [select_text(words, eligible, features[index][0], config.filtered_text_num, fill) for index in owned]
        return router(pad_sequence(list(features), batch_first=True), torch.stack(texts), [len(image) for image in features])

    def layouts(self, num_views: int, image_size: Size | None, merge_type: str | None = None) -> list[MergedLayout]:
        """What an image keeps at each level, coarse to fine.

        Args:
            num_views: its views, the whole view included.
            image_size: (width, height) in pixels; only a tiled image needs it.
        """
        config = self.config
        tiles = None
        if num_views > 1 and (merge_type or config.mm_patch_merge_type) != "flat":
            if image_size is None:
                raise ValueError(f"An image of {num_views} views came without its size; give image_sizes=[(width, height), ...].")
            across, down = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, config.vision_config["image_size"])  # type: ignore[arg-type, index]
            tiles = (down, across)
        return [
            merged_layout(level, num_views, tiles, image_size or (1, 1), merge_type or config.mm_patch_merge_type, config.unpad_rule)
            for level in self.levels
        ]

    def num_visual_tokens(self, image_size: Size, granularity: int, num_views: int) -> int:
        """What an image costs at one granularity, newlines included."""
        index = [level.tokens for level in self.levels].index(granularity)
        return self.layouts(num_views, image_size)[index].num_tokens

    # ---- a granularity to visual tokens --------------------------------------------------------------------------------------

    def visual_tokens(self, features: Tensor, level_index: int, layout: MergedLayout) -> Tensor:
        """One image's (C, P, D) features at one level: (T, D)."""
        level = self.levels[level_index]
        newline = getattr(self.model, "image_newline", None)
        pooled = pool(features, self.config.patch_grid, level)
        return merge_views(pooled, level, layout, features.new_zeros(0) if newline is None else newline)

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size] | None,
        granularities: Sequence[int],
        padding_side: str = "right",
    ) -> SplicedInputs:
        """The language model's inputs with every image at a given granularity.

        Args:
            features: N tensors (C, P, D). image_sizes: N (width, height). granularities: N tokens per view.
        """
        tokens = self._tokens_at(features, image_sizes, [granularities])
        rows = prompt_rows(input_ids, attention_mask, labels)
        return splice(rows, tokens, self.model.embed_tokens, self.config.context_length, padding_side)

    def splice_levels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size] | None,
        granularities: Sequence[int],
    ) -> list[list[SplicedRow]]:
        """Every row at every one of the given granularities, before padding: [granularity][row]. Arguments as in `splice`."""
        tokens = self._tokens_at(features, image_sizes, [[granularity] * len(features) for granularity in granularities])
        rows = prompt_rows(input_ids, attention_mask, labels)
        spliced = splice_rows(rows * len(granularities), tokens, self.model.embed_tokens, self.config.context_length)
        return [spliced[start : start + len(rows)] for start in range(0, len(spliced), len(rows))]

    def _tokens_at(
        self, features: Sequence[Tensor], image_sizes: Sequence[Size] | None, choices: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Visual tokens of all N images for each choice of N granularities, choice after choice."""
        names = [level.tokens for level in self.levels]
        sizes: Sequence[Size | None] = image_sizes or [None] * len(features)
        layouts = [self.layouts(len(image), size) for image, size in zip(features, sizes, strict=True)]
        return [
            self.visual_tokens(image, names.index(granularity), kept[names.index(granularity)])
            for choice in choices
            for image, kept, granularity in zip(features, layouts, choice, strict=True)
        ]

    # ---- the whole path ------------------------------------------------------------------------------------------------------

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
        """Prompts and images become the language model's inputs: encode once, route, pool, merge, splice.

        Args:
            input_ids: (B, L) with one placeholder per image. attention_mask, labels: (B, L).
            images: N images, see `prepare_views`. image_sizes: N (width, height) in pixels.
            request: the caller's wishes; by default the router chooses.
            timer: called with `vision`, `router` and `splice` around the three parts.
            always_route: ask the router even where the request leaves it no choice.

        Raises:
            ValueError: counts that disagree, a granularity or budget that cannot be met, or a row longer than the context.
        """
        rows = prompt_rows(input_ids, attention_mask, labels)
        views = [] if images is None else self.prepare_views(images)
        # LLaVA lays single views given as one 4-D tensor out plainly, without the newline vector.
        merge_type = "flat" if isinstance(images, Tensor) and images.ndim == 4 else None
        plan = self.plan(rows, [len(view) for view in views], image_sizes, request or RoutingRequest(), merge_type)
        with timer("vision"):
            features = self.encode_views(views)
        encoded = self.encode_rows(rows, features, plan, timer, always_route)
        inputs = pad_rows([each.row for each in encoded], padding_side)
        return EncodedPrompt(inputs, [report for each in encoded for report in each.reports])

    def plan(
        self,
        rows: Sequence[PromptRow],
        num_views: Sequence[int],
        image_sizes: Sequence[Size] | None,
        requests: RoutingRequest | Sequence[RoutingRequest],
        merge_type: str | None = None,
    ) -> RoutingPlan:
        """Check B prompts, their N images and the callers' wishes against each other, before any of them is computed.

        Args:
            rows: from `prompt_rows`. num_views: views of each image. image_sizes: N (width, height) in pixels.
            requests: one for all rows, or one per row.
            merge_type: instead of the config's.

        Raises:
            ValueError: counts that disagree, or a granularity or budget that cannot be met.
        """
        wishes = [requests] * len(rows) if isinstance(requests, RoutingRequest) else list(requests)
        owners = images_of_rows(rows, len(num_views))
        sizes: Sequence[Size | None] = image_sizes if image_sizes is not None else [None] * len(num_views)
        if len(sizes) != len(num_views):
            raise ValueError(f"{len(num_views)} images came with {len(sizes)} image_sizes; give one (width, height) per image.")
        names = [level.tokens for level in self.levels] if num_views else []
        allowed = [
            allowed_levels(names, wish, has_router=self.model.router is not None) if owned else []
            for wish, owned in zip(wishes, owners, strict=True)
        ]
        layouts = [self.layouts(views, _size(size), merge_type) for views, size in zip(num_views, sizes, strict=True)]
        plan = RoutingPlan(owners, wishes, allowed, layouts)
        for index, wish in enumerate(wishes):
            plan.levels(index)
            check_budget(plan.costs(index), allowed[index], wish)
        return plan

    def encode_rows(
        self,
        rows: Sequence[PromptRow],
        features: Sequence[Tensor],
        plan: RoutingPlan,
        timer: Timer = untimed,
        always_route: bool = False,
    ) -> list[EncodedRow]:
        """From encoded images to the language model's rows, before padding: route, pool, merge, splice.

        Args:
            rows: B rows. features: N tensors (C, P, D) from `encode_views`. plan: of these rows and images.

        Raises:
            ValueError: a row longer than the context.
        """
        logits = self._logits_where_asked(rows, features, plan, timer, always_route)
        chosen: list[int] = []
        for index, owned in enumerate(plan.owners):
            row_logits = [None if (scores := logits.get(image)) is None else scores.tolist() for image in owned]
            chosen += choose_levels(row_logits, plan.costs(index), plan.allowed[index], plan.requests[index])
        with timer("splice"):
            tokens = [
                self.visual_tokens(image, level, layouts[level])
                for image, level, layouts in zip(features, chosen, plan.layouts, strict=True)
            ]
            spliced = splice_rows(rows, tokens, self.model.embed_tokens, self.config.context_length)
        reports = [
            self._report(level, layouts, logits.get(image))
            for image, (level, layouts) in enumerate(zip(chosen, plan.layouts, strict=True))
        ]
        return [EncodedRow(row, [reports[image] for image in owned]) for row, owned in zip(spliced, plan.owners, strict=True)]

    def _logits_where_asked(
        self, rows: Sequence[PromptRow], features: Sequence[Tensor], plan: RoutingPlan, timer: Timer, always_route: bool
    ) -> dict[int, Tensor]:
        """The router's (G,) logits by image, for the rows whose granularity is still open."""
        if self.model.router is None:
            return {}
        asked = [index for index, owned in enumerate(plan.owners) if owned and (always_route or plan.asks_router(index))]
        if not asked:
            return {}
        images = [image for index in asked for image in plan.owners[index]]
        with timer("router"):
            logits = self._route_rows([rows[index] for index in asked], [features[image] for image in images]).detach().float().cpu()
        return dict(zip(images, logits, strict=True))

    def _report(self, level: int, layouts: Sequence[MergedLayout], logits: Tensor | None) -> RoutingReport:
        costs = {granularity.tokens: layout.num_tokens for granularity, layout in zip(self.levels, layouts, strict=True)}
        return RoutingReport(
            logits=logits,
            probabilities=None if logits is None else logits.softmax(-1),
            granularity=self.levels[level].tokens,
            num_visual_tokens=layouts[level].num_tokens,
            full_visual_tokens=layouts[-1].num_tokens,
            tokens_per_level=costs,
        )

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
        """One routing report per image, without generating: what the router says and what would be spent."""
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
        """LLaVA's door: (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

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
            images: N images in reading order over the batch, see `prepare_views`; text-only rows have none.
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


def _size(size: Sequence[int] | None) -> Size | None:
    return None if size is None else (int(size[0]), int(size[1]))
