"""Composes the model from its steps: start here.

    images ── cut into views ──> ImageInput ──with_features──> features ──router_logits──> logits ──RoutingPlan.choose──> a level per image
                                                                  │                                                       │
                                                                  └──────────────visual_tokens (pool, merge)<─────────────┘
    prompt ids ──prompt_rows──> rows ──splice_at──> embeddings and labels of each row ──pad_rows──> the language model

`Composer.compose` is the one path from prompts and images to the language model's inputs and a report per image. Generation, evaluation
and serving all take it; training takes its steps one by one, with a loss at the end. An image is encoded once, however many granularities
are then read from it. Each step is a file of its own that imports none of its neighbours; there is no arithmetic here, and nothing that
depends on how a prompt marks an image's place (`prompt_rows` knows that) or on what the language model is.

Legend: B rows, N images of a batch, C views of an image, P patches, T visual tokens, G granularities, D width, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.messages import RoutingRequest
from llava.model.answers import in_answers
from llava.model.config import GranularityFields
from llava.model.granularity import Granularity, pool
from llava.model.merge import MergedLayout, merge_views, merged_layout
from llava.model.router import GranularityRouter, select_text
from llava.model.routing import RoutingReport, allowed_levels, check_budget, choose_levels, levels_per_image
from llava.model.splice import PromptRow, SplicedRow, images_of_rows, splice_rows

Size = tuple[int, int]
Timer = Callable[[str], AbstractContextManager[None]]


def untimed(stage: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image on its way through the model.

    tensor: its views (C, 3, S, S); once it is encoded, their features (C, P, D). Without the axis C it is a single view that is laid out
        flat, without a newline vector, whatever the configuration's merge type.
    size: (width, height) in pixels; needed only for images with tiles.
    is_encoded: whether `tensor` holds features.
    """

    tensor: Tensor
    size: Size | None = None
    is_encoded: bool = False

    @property
    def is_flat(self) -> bool:
        return self.tensor.ndim == (2 if self.is_encoded else 3)

    @property
    def views(self) -> Tensor:
        """`tensor` with the axis C: (C, 3, S, S) or (C, P, D)."""
        return self.tensor[None] if self.is_flat else self.tensor

    @property
    def features(self) -> Tensor:
        """(C, P, D)."""
        assert self.is_encoded, "the image has not been encoded"
        return self.views

    def encoded(self, features: Tensor) -> ImageInput:
        """The same image with its features (C, P, D)."""
        return replace(self, tensor=features[0] if self.is_flat else features, is_encoded=True)


@dataclass(frozen=True)
class ComposedRow:
    """One prompt as the language model reads it, before padding, and one report per image in it."""

    row: SplicedRow
    reports: list[RoutingReport]


@dataclass(frozen=True)
class RoutingPlan:
    """What is known about B rows and their N images before anything is computed.

    owners: for each row, the indices of its images. requests: one routing request per row. allowed: level indices each row may take.
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

    def cost_ranges(self, row: int) -> list[tuple[int, int]]:
        """The fewest and the most visual tokens that each image of a row may get."""
        open_costs = [[costs[level] for level in levels] for costs, levels in zip(self.costs(row), self.levels(row), strict=True)]
        return [(min(costs), max(costs)) for costs in open_costs]

    def asks_router(self, row: int) -> bool:
        """Whether there is an image in a row whose level is the router's to choose."""
        return any(len(levels) > 1 and self.requests[row].detail_of(image) is None for image, levels in enumerate(self.levels(row)))

    def choose(self, logits: Mapping[int, Tensor]) -> list[int]:
        """The level of each of the N images, given the router's (G,) logits for some of them, by image."""
        chosen: list[int] = []
        for row, owned in enumerate(self.owners):
            row_logits = [logits[image].tolist() if image in logits else None for image in owned]
            chosen += choose_levels(row_logits, self.costs(row), self.allowed[row], self.requests[row])
        return chosen


class Composer:
    """Mixed into a model that has these parts; composes its inputs.

    config: its multimodal fields. router: `None` where it has none. newline: (D,) the vector that ends a row of tiles, or `None`.
    encode_images: views (N, 3, S, S) to projected features (N, P, D). embed_text: token ids (L,) to embeddings (L, D).
    """

    config: GranularityFields
    router: GranularityRouter | None
    newline: Tensor | None
    encode_images: Callable[[Tensor], Tensor]
    embed_text: Callable[[Tensor], Tensor]

    @property
    def levels(self) -> tuple[Granularity, ...]:
        """The granularities of this model, coarse to fine."""
        return self.config.levels

    # ---- the whole path ------------------------------------------------------------------------------------------------------

    def compose(
        self,
        rows: Sequence[PromptRow],
        images: Sequence[ImageInput],
        requests: RoutingRequest | Sequence[RoutingRequest] | None = None,
        timer: Timer = untimed,
        always_route: bool = False,
    ) -> list[ComposedRow]:
        """Prompts and images become the language model's rows: plan, encode, route, choose, pool, merge, splice, report.

        Args:
            rows: B prompts, from `prompt_rows`.
            images: their N images in reading order, encoded or not; an object that appears several times is encoded once.
            requests: one for all rows, or one per row; by default the router chooses.
            timer: called with `vision`, `router` and `splice` around the three parts.
            always_route: ask the router even where a request leaves it no choice.

        Raises:
            ValueError: counts that disagree, a granularity or budget that cannot be met, or a row longer than the context.
        """
        plan = self.plan(rows, images, requests)
        with timer("vision"):
            images = self.with_features(images)
        logits = self.logits_where_asked(rows, images, plan, timer, always_route)
        levels = plan.choose(logits)
        with timer("splice"):
            spliced = self.splice_at(rows, images, levels, plan.layouts)
        reports = [self.report(level, plan.layouts[image], logits.get(image)) for image, level in enumerate(levels)]
        return [ComposedRow(row, [reports[image] for image in owned]) for row, owned in zip(spliced, plan.owners, strict=True)]

    def plan(
        self,
        rows: Sequence[PromptRow],
        images: Sequence[ImageInput],
        requests: RoutingRequest | Sequence[RoutingRequest] | None = None,
    ) -> RoutingPlan:
        """Check B prompts, their N images and the routing requests against each other, before anything is computed.

        Raises:
            ValueError: counts that disagree, or a granularity or budget that cannot be met.
        """
        requests = requests or RoutingRequest()
        per_row = [requests] * len(rows) if isinstance(requests, RoutingRequest) else list(requests)
        owners = images_of_rows(rows, len(images))
        names = [level.tokens for level in self.levels] if images else []
        allowed = [
            allowed_levels(names, request, has_router=self.router is not None) if owned else []
            for request, owned in zip(per_row, owners, strict=True)
        ]
        plan = RoutingPlan(owners, per_row, allowed, [self.layouts(len(image.views), image.size, image.is_flat) for image in images])
        for row, request in enumerate(per_row):
            plan.levels(row)
            check_budget(plan.costs(row), allowed[row], request)
        return plan

    # ---- images to features: once per image ----------------------------------------------------------------------------------

    def with_features(self, images: Sequence[ImageInput]) -> list[ImageInput]:
        """The images, encoded: those that are not yet, together in one call of the tower, each object once."""
        new = list({id(image): image for image in images if not image.is_encoded}.values())
        features = self.encode_views([image.views for image in new])
        found = {id(image): image.encoded(own) for image, own in zip(new, features, strict=True)}
        return [found.get(id(image), image) for image in images]

    def encode_views(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Encode all views of all images in one call of the tower: (C_i, 3, S, S) each -> (C_i, P, D) each."""
        if not views:
            return []
        return list(self.encode_images(torch.cat(list(views))).split([len(view) for view in views]))

    # ---- features to a granularity -------------------------------------------------------------------------------------------

    def router_logits(self, rows: Sequence[PromptRow], features: Sequence[Tensor]) -> Tensor:
        """The router's logits for every image.

        Args:
            rows: B prompts, whose answers are hidden from the router.
            features: (C, P, D) of their N images.

        Returns:
            (N, G), coarse to fine.

        Raises:
            ValueError: the model has no router, or images and placeholders disagree.
        """
        if self.router is None:
            raise ValueError("This model has no router; give a vis_token_granularity.")
        slots, fill = self.config.filtered_text_num, self.config.router_text_fill == "answer"
        selected: list[Tensor] = []
        for row, text, owned in zip(rows, self._text_of_rows(rows), images_of_rows(rows, len(features)), strict=True):
            eligible = ~self._answers(row)[~row.is_image]
            selected += [select_text(text, eligible, features[image][0], slots, fill) for image in owned]
        return self.router(pad_sequence(list(features), batch_first=True), torch.stack(selected), [len(image) for image in features])

    def _answers(self, row: PromptRow) -> Tensor:
        """(L,) true on answers: between the template's marks, or, in a row without any of them, where labels are."""
        found = in_answers(row.ids, self.config.answer_start or (), self.config.answer_end or ())
        return row.labels >= 0 if found is None else found

    def _text_of_rows(self, rows: Sequence[PromptRow]) -> list[Tensor]:
        """Each row's text as embeddings, (its ids beside placeholders, D)."""
        if all(row.embeds is not None for row in rows):
            return [row.embeds[~row.is_image] for row in rows]  # type: ignore[index]
        text_ids = [row.ids[~row.is_image] for row in rows]
        return list(self.embed_text(torch.cat(text_ids)).split([len(ids) for ids in text_ids]))

    def logits_where_asked(
        self,
        rows: Sequence[PromptRow],
        images: Sequence[ImageInput],
        plan: RoutingPlan,
        timer: Timer = untimed,
        always_route: bool = False,
    ) -> dict[int, Tensor]:
        """The router's (G,) logits by image, for the rows whose granularity is still open."""
        if self.router is None:
            return {}
        asked = [row for row, owned in enumerate(plan.owners) if owned and (always_route or plan.asks_router(row))]
        if not asked:
            return {}
        of_asked = [image for row in asked for image in plan.owners[row]]
        with timer("router"):
            logits = self.router_logits([rows[row] for row in asked], [images[image].features for image in of_asked])
            logits = logits.detach().float().cpu()
        return dict(zip(of_asked, logits, strict=True))

    def layouts(self, num_views: int, image_size: Size | None, is_flat: bool = False) -> list[MergedLayout]:
        """What an image keeps at each level, coarse to fine.

        Args:
            num_views: its views, the whole view included.
            image_size: (width, height) in pixels; needed only for images with tiles.
            is_flat: see `ImageInput`.
        """
        config = self.config
        merge_type, tiles = "flat" if is_flat else config.mm_patch_merge_type, None
        if num_views > 1 and merge_type != "flat":
            if image_size is None:
                raise ValueError(f"An image of {num_views} views came without its size; give image_sizes=[(width, height), ...].")
            across, down = config.tiles_of(image_size)
            tiles = (down, across)
        return [
            merged_layout(level, num_views, tiles, image_size or (1, 1), merge_type, config.unpad_rule) for level in self.levels
        ]

    def num_visual_tokens(self, image_size: Size, granularity: int, num_views: int) -> int:
        """What an image costs at one granularity, newlines included."""
        return self.layouts(num_views, image_size)[self.level_of(granularity)].num_tokens

    def level_of(self, granularity: int) -> int:
        """The index of the level with this many tokens per view.

        Raises:
            ValueError: the model has no such level.
        """
        names = [level.tokens for level in self.levels]
        if granularity not in names:
            raise ValueError(f"The granularity is {granularity}, but this model has {names} tokens per view; choose from these.")
        return names.index(granularity)

    # ---- a granularity to rows -----------------------------------------------------------------------------------------------

    def visual_tokens(self, features: Tensor, level_index: int, layout: MergedLayout) -> Tensor:
        """One image's (C, P, D) features at one level: (T, D)."""
        level = self.levels[level_index]
        newline = features.new_zeros(0) if self.newline is None else self.newline
        return merge_views(pool(features, self.config.patch_grid, level), level, layout, newline)

    def splice_at(
        self, rows: Sequence[PromptRow], images: Sequence[ImageInput], levels: Sequence[int], layouts: Sequence[Sequence[MergedLayout]]
    ) -> list[SplicedRow]:
        """The rows with every image at a given level, before padding.

        Args:
            images: N encoded images. levels: a level index per image. layouts: what each image keeps at each level.

        Raises:
            ContextLengthError: a row longer than the context.
        """
        tokens = [
            self.visual_tokens(image.features, level, layout[level]) for image, level, layout in zip(images, levels, layouts, strict=True)
        ]
        return splice_rows(rows, tokens, self.embed_text, self.config.context_length)

    def report(self, level: int, layouts: Sequence[MergedLayout], logits: Tensor | None) -> RoutingReport:
        """What was decided for an image that has these layouts, by the index of its level; `logits` (G,) where a router was asked."""
        costs = {granularity.tokens: layout.num_tokens for granularity, layout in zip(self.levels, layouts, strict=True)}
        return RoutingReport(
            logits=logits,
            probabilities=None if logits is None else logits.softmax(-1),
            granularity=self.levels[level].tokens,
            num_visual_tokens=layouts[level].num_tokens,
            full_visual_tokens=layouts[-1].num_tokens,
            tokens_per_level=costs,
        )
