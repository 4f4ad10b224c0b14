"""The loss of each stage for one batch, from rows and images.

    views ── features (once) ──┬── every row at every granularity ── language model ── (B, G) answer losses ── mean
                               └── router ── logits ── ranked by the losses of every granularity

Each stage is a function of the same arguments, and they share their parts. Vocabulary logits are computed at supervised positions
only. Every process of a distributed run makes the same calls of the same modules, whatever its rows hold: under ZeRO-3 each call
gathers weights from all processes. B rows, N images, G granularities, T supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.generic import is_flash_attention_requested

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.crops import pixel_table, pixel_values
from llava.model.splice import SplicedRow
from llava.train.distributed import forward_replaced
from llava.train.features import FeatureCache
from llava.train.losses import cost_adjusted, mean_over, rglf_losses, router_feedback, token_losses_in_chunks, tokens_at_once
from llava.train.packing import PADDING_OWNER, pack
from llava.train.shared_prefix import hidden_states_behind_a_prefix, reads_behind_a_prefix, shared_prefix

Batch = dict[str, Any]


@dataclass(frozen=True)
class RouterSettings:
    """How the router is trained; see `llava.train.losses`.

    Attributes:
        scores: rows -> ((B, G) answer losses, (B, G) visual tokens) computed beforehand; `None` scores online.
    """

    margin: float = 1.0
    rank_loss_weight: float = 1.0
    ce_loss_weight: float = 0.1
    granularity_cost_weight: float = 0.0
    scores: Callable[[Sequence[int]], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class StageLoss:
    """The loss of one batch in a stage.

    Attributes:
        loss: scalar to differentiate.
        metrics: name -> (sum, weight); the log shows sum / weight over all batches since the last line.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor | float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerLosses:
    """Cross-entropy of the answers of a batch at every granularity.

    Attributes:
        sums: (B, G) cross-entropy summed over the supervised tokens of each row.
        labels: (B,) supervised tokens of each row.
        positions: positions that the language model processed.
        padding: how many of them were padding.
    """

    sums: Tensor
    labels: Tensor
    positions: int
    padding: int


def image_features(model: Any, batch: Batch, cache: FeatureCache | None = None) -> list[Tensor]:
    """Projected features of every image of a batch, (C, P, D) each, from one pass of the vision tower.

    A batch without images gives the features of one blank view, which no row refers to: the tower and the projector are then
    called as often as in other processes, and their gradients are zero instead of missing.

    Pixels become the values that the tower reads here, on its device; views that are of a floating type have them already.

    With a cache, images are encoded one at a time, and once where several rows are about one, so that cached features never depend on the
    rest of the batch and a resumed run sees the same bits.

    Args:
        model: the multimodal language model.
        batch: from `Collator`.
        cache: tower features by image key; the tower must be frozen.
    """
    tower = model.get_vision_tower()
    table = pixel_table(tower.image_processor).to(tower.device)
    if not batch["images"]:
        side = model.config.view_side
        return model.encode_views([torch.zeros(1, 3, side, side)])
    if cache is None:
        return model.encode_views([pixel_values(views.to(tower.device), table) for views in batch["images"]])
    encoded: dict[str, Tensor] = {}
    for views, key, size in zip(batch["images"], batch["image_keys"], batch["image_sizes"], strict=True):
        if key not in encoded:
            encoded[key] = _tower_features(tower, table, views, key, size, cache)
    projected = model.model.mm_projector(torch.cat(list(encoded.values())))
    by_key = dict(zip(encoded, projected.split([len(views) for views in encoded.values()]), strict=True))
    return [by_key[key] for key in batch["image_keys"]]


def _tower_features(
    tower: Any, table: Tensor, views: Tensor | None, key: str, size: tuple[int, int], cache: FeatureCache
) -> Tensor:
    if key in cache:
        return cache.get(key).to(tower.device)
    assert views is not None, f"image {key} has neither views nor cached features"
    with torch.no_grad():
        features = tower(pixel_values(views.to(tower.device), table).to(tower.dtype))
    cache.put(key, features, size)
    return features


def reads_in_one_pass(model: Any) -> bool:
    """Whether rows of all granularities go through the language model together.

    They do where an attention kernel for sequences of unequal length (flash attention) makes that free, and where every pass has to
    gather the weights (ZeRO-3). Otherwise packed rows need a mask as large as the square of their length, which costs more than packing
    saves, so each granularity is a pass of its own, over rows of about equal length.
    """
    return is_flash_attention_requested(config=model.config) or is_deepspeed_zero3_enabled()


def answer_losses(model: Any, batch: Batch, features: Sequence[Tensor], levels: Sequence[int]) -> AnswerLosses:
    """Cross-entropy of every row's answer at some granularities.

    A row without images is the same at every granularity and is computed once, with the finest.

    Args:
        features: tensors (C, P, D) from `image_features`, the batch's images first.
        levels: visual tokens per view of G granularities.
    """
    blank = _blank(batch, features, model)
    spliced = model.splice_levels(
        batch["input_ids"], batch["attention_mask"], batch["labels"], features[: len(batch["images"])], batch["image_sizes"], levels
    )
    per_row, columns, finest = batch["images_per_row"], range(len(levels)), len(levels) - 1
    read_at = [[row for row, images in enumerate(per_row) if images or column == finest] for column in columns]
    found = AnswerLosses(features[0].new_zeros(len(per_row) * len(levels), dtype=torch.float32), batch["labels"][:, 0], 0, 0)
    for together in [columns] if reads_in_one_pass(model) else [[column] for column in columns]:
        cells = [(row, column) for column in together for row in read_at[column]]
        rows = [spliced[column][row] for row, column in cells] or [_one_position(spliced[finest][0])]
        found = _read(model, rows, [row * len(levels) + column for row, column in cells], found, blank)
    source = torch.tensor([list(columns) if images else [finest] * len(levels) for images in per_row], device=found.sums.device)
    sums = found.sums.view(len(per_row), len(levels)).gather(1, source)
    return AnswerLosses(sums, (batch["labels"] != IGNORE_INDEX).sum(dim=1), found.positions, found.padding)


def _read(
    model: Any, rows: Sequence[SplicedRow], cells: Sequence[int], before: AnswerLosses, blank: Tensor | None
) -> AnswerLosses:
    """One pass of the language model over some rows; their summed losses are added to `cells` of the losses `before`.

    `blank` is a zero to add to the embeddings, or `None`.
    """
    packed = pack(rows, one_row=is_flash_attention_requested(config=model.config))
    embeddings = packed.inputs_embeds if blank is None else packed.inputs_embeds + blank.to(packed.inputs_embeds.dtype)
    hidden = model.model(
        inputs_embeds=embeddings, attention_mask=None, position_ids=packed.position_ids, use_cache=False
    ).last_hidden_state
    line, column = torch.nonzero(packed.labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    losses = _losses_of_head(model, hidden[line, column], packed.labels[line, column + 1])
    owners = packed.owners[line, column + 1]
    # Without supervised tokens the sum is 0 but still depends on every weight, so the backward pass goes through this pass too.
    sums = before.sums + 0.0 * losses.sum()
    sums = sums.index_add(0, torch.tensor(cells, dtype=torch.long, device=sums.device)[owners], losses)
    padding = int((packed.owners == PADDING_OWNER).sum())
    return AnswerLosses(sums, before.labels, before.positions + packed.owners.numel(), before.padding + padding)


def _losses_of_head(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """The losses (T,) of hidden states (T, D), from one call of the head however many chunks that takes: each call gathers the weights
    under ZeRO-3, and the number of chunks depends on the batch."""
    head, chunk = model.lm_head, tokens_at_once(model.config.vocab_size)
    forward = head.forward

    def logits(states: Tensor) -> Tensor:
        return model.of_answers(forward(states))

    with forward_replaced(head, lambda states: token_losses_in_chunks(logits, states, targets, chunk)):
        return head(hidden)


def _one_position(row: SplicedRow) -> SplicedRow:
    """The shortest possible row: one position, not supervised."""
    return SplicedRow(row.inputs_embeds[:1], torch.full_like(row.labels[:1], IGNORE_INDEX))


def granularities(model: Any) -> list[int]:
    """Tokens per view of every level of the model, coarse to fine."""
    return [level.tokens for level in model.levels]


def count_items(batch: Batch, loss_name: str) -> int:
    """How many items the loss of a batch is a mean over: supervised tokens, or in stage 4 images of rows with an answer."""
    if loss_name == "rglf":
        answered = (batch["labels"] != IGNORE_INDEX).any(dim=1).tolist()
        return sum(images for images, answer in zip(batch["images_per_row"], answered, strict=True) if answer)
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def token_mean_loss(
    model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings, items: float | None = None
) -> StageLoss:
    """Stages 1 and 2: the mean loss over the supervised tokens, at full granularity.

    Args:
        items: supervised tokens of the whole step, of all processes and accumulated batches; this batch's own by default.
    """
    answers = answer_losses(model, batch, features, granularities(model)[-1:])
    items = count_items(batch, "token_mean") if items is None else items
    return StageLoss(mean_over(answers.sums.sum(), items), _padding_metrics(answers))


def multi_granularity_loss(
    model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings, items: float | None = None
) -> StageLoss:
    """Stage 3: the plain mean over the granularities of the token mean; arguments as in `token_mean_loss`.

    The features, and the gradient into tower and projector, are shared by all granularities: one vision pass, one pass of the
    language model, one backward pass.
    """
    levels = granularities(model)
    answers = answer_losses(model, batch, features, levels)
    own = count_items(batch, "multi_granularity")
    items = own if items is None else items
    sums = answers.sums.sum(dim=0)
    metrics: dict[str, tuple[Tensor | float, float]] = {
        f"loss_{level}": (total.detach(), float(own)) for level, total in zip(levels, sums, strict=True)
    }
    loss = mean_over(sums.mean(), items)
    return StageLoss(loss, metrics | _padding_metrics(answers))


def rglf_loss(
    model: Any, batch: Batch, features: Sequence[Tensor], settings: RouterSettings, items: float | None = None
) -> StageLoss:
    """Stage 4: the router learns to rank the granularities as the frozen language model's losses do.

    Rows without images or without labels are skipped and counted. All images of a row share its losses.

    Args:
        items: images of rows with an answer in the whole step; this batch's own by default.
    """
    per_row = batch["images_per_row"]
    row_of_image = torch.tensor([row for row, count in enumerate(per_row) for _ in range(count)], dtype=torch.long)
    answered = (batch["labels"] != IGNORE_INDEX).any(dim=1).cpu()
    usable = answered[row_of_image].nonzero().flatten()
    skipped = sum(not (answered[row] and count) for row, count in enumerate(per_row))
    known = settings.scores(batch["rows"]) if settings.scores is not None else score_rows(model, batch, features)
    logits = _route(model, batch, features)
    own = logits[usable.to(logits.device)]
    losses, tokens = (table[row_of_image[usable].to(table.device)].to(own.device) for table in known)
    ranked = cost_adjusted(losses, tokens, settings.granularity_cost_weight)
    parts = rglf_losses(own, ranked, settings.margin, settings.rank_loss_weight, settings.ce_loss_weight)
    # The blank view of a batch without images has logits too; they add nothing to the loss but keep its gradients defined.
    loss = mean_over(parts.total.sum(), len(own) if items is None else items) + 0.0 * logits.sum()
    metrics = _router_metrics(granularities(model), own, ranked, losses, tokens)
    metrics["router_rows_skipped"] = (float(skipped), 1.0)
    metrics["ranking_loss"] = (parts.ranking.sum(), float(len(own)))
    metrics["cross_entropy"] = (parts.cross_entropy.sum(), float(len(own)))
    return StageLoss(loss, metrics)


def _route(model: Any, batch: Batch, features: Sequence[Tensor]) -> Tensor:
    """(N, G) logits; those of the blank view for a batch without images."""
    if batch["images"]:
        return model.route_logits(batch["input_ids"], batch["attention_mask"], batch["labels"], features)
    blank_prompt = torch.tensor([[batch["input_ids"][0, 0].item(), IMAGE_TOKEN_INDEX]], device=features[0].device)
    return model.route_logits(blank_prompt, None, None, features)


STAGE_LOSSES: dict[str, Callable[..., StageLoss]] = {
    "token_mean": token_mean_loss,
    "multi_granularity": multi_granularity_loss,
    "rglf": rglf_loss,
}
"""Loss name of a stage (`Stage.loss`) -> the function that computes it."""


@torch.no_grad()
def score_rows(model: Any, batch: Batch, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Answer losses and visual tokens of a batch at every granularity; dropout is off.

    Each row's losses are summed and divided by its labels. As in the published code, labels are counted before the one-step shift,
    which differs from the number of predicted tokens only where a row's very first token is supervised.

    Returns:
        (B, G) answer losses, nan for rows without labels, and (B, G) visual tokens of all images of each row.
    """
    detached = [image.detach() for image in features]
    with evaluating(model):
        answers = answer_losses(model, batch, detached, granularities(model))
    return answers.sums / answers.labels[:, None].to(answers.sums.device), visual_token_counts(model, batch, detached)


@torch.no_grad()
def score_rows_of_one_image(model: Any, batch: Batch, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `score_rows`, up to rounding; what rows about the same images have in common is read once per granularity."""
    prefix = shared_prefix(batch)
    tokens = visual_token_counts(model, batch, features)
    longest = int(batch["attention_mask"].sum(dim=1).max() + tokens.max())
    if not prefix or not reads_behind_a_prefix(model, longest):
        return score_rows(model, batch, features)
    levels = granularities(model)
    sums = features[0].new_zeros(len(tokens), len(levels), dtype=torch.float32)
    with evaluating(model):
        for row, column, hidden, ids in hidden_states_behind_a_prefix(model, batch, features, levels, prefix):
            sums[row, column] = _losses_of_head(model, hidden, ids).sum()
    labels = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
    return sums / labels[:, None].to(sums.device), tokens


def visual_token_counts(model: Any, batch: Batch, features: Sequence[Tensor]) -> Tensor:
    """(B, G) visual tokens of all images of each row, newlines included."""
    levels = granularities(model)
    costs = [
        [model.num_visual_tokens(size, level, len(views)) for level in levels]
        for size, views in zip(batch["image_sizes"], features, strict=False)
    ]
    counts = torch.zeros(len(batch["images_per_row"]), len(levels), dtype=torch.long)
    image = 0
    for row, images in enumerate(batch["images_per_row"]):
        for _ in range(images):
            counts[row] += torch.tensor(costs[image])
            image += 1
    return counts


def _blank(batch: Batch, features: Sequence[Tensor], model: Any) -> Tensor | None:
    """For a batch without images, a zero that depends on the newline vector and on the modules behind the features; otherwise `None`.

    It is computed before the rows are spliced, then added to their embeddings: under ZeRO-3 every process gathers the newline vector at
    the same moment, and its gradient and those of projector and tower arrive in the same order as in processes with images.
    """
    if batch["images"]:
        return None
    newline = model.newline
    blank = (0.0 * features[0]).sum()  # a sum of features may leave float16, and 0 * inf is nan
    return blank if newline is None else blank + 0.0 * newline.sum()


def _padding_metrics(answers: AnswerLosses) -> dict[str, tuple[Tensor | float, float]]:
    return {"padding_share": (float(answers.padding), float(answers.positions))}


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
