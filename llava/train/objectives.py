"""What one batch teaches: from rows and pictures to the loss of a stage.

    views ── features (once) ──┬── splice at a granularity ── language model ── token losses ── mean
                               └── router ── logits ── ranked by the losses of every granularity

Each stage is a function of the same three arguments, and they share their parts. Vocabulary logits are made at supervised
positions only. B rows, N images, G granularities, T supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.train.features import FeatureCache
from llava.train.losses import (
    SupervisedTokens,
    cost_adjusted,
    per_sample_losses,
    rglf_loss,
    router_feedback,
    supervised_tokens,
    token_losses,
    token_mean,
)

Batch = dict[str, Any]


@dataclass(frozen=True)
class RouterSettings:
    """How the router is taught; see `llava.train.losses`.

    Attributes:
        scores: rows -> ((B, G) answer losses, (B, G) visual tokens) known beforehand; `None` scores online.
    """

    margin: float = 1.0
    rank_loss_weight: float = 1.0
    ce_loss_weight: float = 0.1
    granularity_cost_weight: float = 0.0
    scores: Callable[[Sequence[int]], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Lesson:
    """What a batch taught.

    Attributes:
        loss: scalar to differentiate.
        metrics: name -> (sum, weight); the log shows sums over weights.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor | float, float]] = field(default_factory=dict)


def image_features(model: Any, batch: Batch, cache: FeatureCache | None = None) -> list[Tensor]:
    """Projected features of every picture of a batch, (C, P, D) each, from one pass of the vision tower.

    With a cache, pictures are encoded one at a time, so that what is stored never depends on a picture's neighbours and a
    resumed run sees the same bits.

    Args:
        model: the multimodal language model.
        batch: from `Collator`.
        cache: tower features by picture name; the tower must be frozen.
    """
    if cache is None:
        return model.encode_views(batch["images"])
    if not batch["images"]:
        return []
    encoded = [
        _tower_features(model, views, key, size, cache)
        for views, key, size in zip(batch["images"], batch["image_keys"], batch["image_sizes"], strict=True)
    ]
    projected = model.model.mm_projector(torch.cat(encoded))
    return list(projected.split([len(views) for views in encoded]))


def _tower_features(model: Any, views: Tensor | None, key: str, size: tuple[int, int], cache: FeatureCache) -> Tensor:
    tower = model.get_vision_tower()
    if key in cache:
        return cache.get(key).to(tower.device)
    assert views is not None, f"picture {key} has neither views nor cached features"
    with torch.no_grad():
        features = tower(views.to(tower.device, tower.dtype))
    cache.put(key, features, size)
    return features


def language_losses(model: Any, batch: Batch, features: Sequence[Tensor], granularity: int) -> tuple[Tensor, SupervisedTokens]:
    """Cross-entropy of every supervised token of a batch at one granularity.

    Args:
        features: N tensors (C, P, D) from `image_features`.
        granularity: visual tokens per view.

    Returns:
        (T,) losses and the positions they belong to.
    """
    inputs = model.splice(
        batch["input_ids"],
        batch["attention_mask"],
        batch["labels"],
        features,
        batch["image_sizes"],
        [granularity] * len(features),
    )
    hidden = model.model(
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        use_cache=False,
    ).last_hidden_state
    tokens = supervised_tokens(inputs.labels)
    return token_losses(model.lm_head(tokens.gather(hidden)), tokens), tokens


def granularities(model: Any) -> list[int]:
    """Tokens per view of every level of the model, coarse to fine."""
    return [level.tokens for level in model.levels]


def token_mean_lesson(model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings) -> Lesson:
    """Stages 1 and 2: the mean loss over the batch's supervised tokens, at full granularity."""
    losses, _ = language_losses(model, batch, features, granularities(model)[-1])
    return Lesson(token_mean(losses))


def multi_granularity_lesson(model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings) -> Lesson:
    """Stage 3: the plain mean over the granularities of the batch's token mean.

    The features, and the gradient into tower and projector, are shared by all granularities: one vision pass, one
    backward pass. A batch without pictures is the same at every granularity and is computed once.
    """
    levels = granularities(model)
    if not features:
        return token_mean_lesson(model, batch, features, settings)
    means = [token_mean(language_losses(model, batch, features, level)[0]) for level in levels]
    metrics: dict[str, tuple[Tensor | float, float]] = {
        f"loss_{level}": (mean.detach(), 1.0) for level, mean in zip(levels, means, strict=True)
    }
    return Lesson(torch.stack(means).mean(), metrics)


def rglf_lesson(model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings) -> Lesson:
    """Stage 4: the router learns to rank the granularities as the frozen language model's losses do.

    Rows without a picture or without labels teach it nothing and are counted. All pictures of a row share its losses.
    """
    per_row = batch["images_per_row"]
    row_of_image = torch.tensor([row for row, count in enumerate(per_row) for _ in range(count)], dtype=torch.long)
    if settings.scores is None:
        answer_losses, visual_tokens = score_rows(model, batch, features)
    else:
        answer_losses, visual_tokens = settings.scores(batch["rows"])
    usable_rows = torch.isfinite(answer_losses).all(dim=1).cpu()
    usable = usable_rows[row_of_image].nonzero().flatten()
    skipped = sum(not (usable_rows[row] and count) for row, count in enumerate(per_row))
    if not len(features):
        nothing = torch.stack([parameter.sum() for parameter in model.model.router.parameters()]).sum() * 0.0
        return Lesson(nothing, {"router_rows_skipped": (float(skipped), 1.0)})
    logits = model.route_logits(batch["input_ids"], batch["attention_mask"], batch["labels"], features)
    logits = logits[usable.to(logits.device)]
    rows = row_of_image[usable]
    tokens = visual_tokens[rows.to(visual_tokens.device)].to(logits.device)
    losses = answer_losses[rows.to(answer_losses.device)].to(logits.device)
    ranked = cost_adjusted(losses, tokens, settings.granularity_cost_weight)
    taught = rglf_loss(logits, ranked, settings.margin, settings.rank_loss_weight, settings.ce_loss_weight)
    metrics = _router_metrics(granularities(model), logits, ranked, losses, tokens)
    metrics["router_rows_skipped"] = (float(skipped), 1.0)
    metrics["ranking_loss"] = (taught.ranking, 1.0)
    metrics["cross_entropy"] = (taught.cross_entropy, 1.0)
    return Lesson(taught.loss, metrics)


LESSONS: dict[str, Callable[[Any, Batch, Sequence[Tensor], RouterSettings], Lesson]] = {
    "token_mean": token_mean_lesson,
    "multi_granularity": multi_granularity_lesson,
    "rglf": rglf_lesson,
}
"""Loss name of a stage -> how its batches are taught."""


@torch.no_grad()
def score_rows(model: Any, batch: Batch, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the answers of a batch cost at every granularity; dropout is off.

    Returns:
        (B, G) answer losses, nan for rows without labels, and (B, G) visual tokens of each row's pictures together.
    """
    levels = granularities(model)
    detached = [image.detach() for image in features]
    with evaluating(model):
        losses = torch.stack(
            [per_sample_losses(*language_losses(model, batch, detached, level)) for level in levels], dim=1
        )
    return losses, visual_token_counts(model, batch, detached)


def visual_token_counts(model: Any, batch: Batch, features: Sequence[Tensor]) -> Tensor:
    """(B, G) visual tokens of each row's pictures together, newlines included."""
    levels = granularities(model)
    costs = [
        [model.num_visual_tokens(size, level, len(views)) for level in levels]
        for size, views in zip(batch["image_sizes"], features, strict=True)
    ]
    counts = torch.zeros(len(batch["images_per_row"]), len(levels), dtype=torch.long)
    image = 0
    for row, images in enumerate(batch["images_per_row"]):
        for _ in range(images):
            counts[row] += torch.tensor(costs[image])
            image += 1
    return counts


def num_supervised(batch: Batch) -> int:
    """Supervised labels of a batch."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation and back to what each was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _router_metrics(
    levels: Sequence[int], logits: Tensor, ranked: Tensor, losses: Tensor, tokens: Tensor
) -> dict[str, tuple[Tensor | float, float]]:
    """Loss per granularity, chosen shares, agreement with the best, regret and mean tokens."""
    if logits.shape[0] == 0:
        return {}
    feedback = router_feedback(logits, ranked, tokens)
    weight = float(feedback.rows)
    metrics: dict[str, tuple[Tensor | float, float]] = {
        f"loss_{level}": (losses[:, index].sum(), weight) for index, level in enumerate(levels)
    }
    metrics |= {f"chosen_{level}": (float(count), weight) for level, count in zip(levels, feedback.chosen, strict=True)}
    metrics["agreement"] = (float(feedback.agreements), weight)
    metrics["regret"] = (feedback.regret, weight)
    metrics["visual_tokens"] = (feedback.visual_tokens, weight)
    return metrics
