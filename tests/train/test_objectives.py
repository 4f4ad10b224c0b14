"""Losses and gradients of stages 3 and 4 equal the recorded ones; the tower learns exactly when it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llava.crops import cut_into_views
from llava.images import load_image
from llava.model.router import name_in_memory
from llava.train import losses, objectives
from llava.train.features import FeatureCache
from llava.train.losses import rglf_losses
from llava.train.objectives import (
    STAGE_LOSSES,
    RouterSettings,
    answer_losses,
    count_items,
    granularities,
    image_features,
    multi_granularity_loss,
    rglf_loss,
    score_rows,
    token_mean_loss,
)
from llava.train.stages import STAGES, apply_stage
from tests.stage_runs import ORACLE

BATCHES = ["A_two_images", "B_padded_three", "C_mixed_text", "D_text_only", "E_no_labels_row", "F_single", "G_short_instruction"]
Recorded = Callable[[str], dict[str, Any]]
DEFAULT = RouterSettings()


@pytest.fixture(params=["at once", "token by token"])
def scored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary logits of a whole batch at once, or of one token at a time."""
    if request.param == "token by token":
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)


def _norms_match(model: Any, record: dict[str, float | None]) -> None:
    parameters = dict(model.named_parameters())
    for name, norm in record.items():
        gradient = parameters[name_in_memory(name)].grad
        found = 0.0 if gradient is None else float(gradient.norm())
        assert found == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-6), name


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize("name", BATCHES)
def test_recorded_stage3(name: str, tiny_model: Any, recorded_batch: Recorded, training_records: Any) -> None:
    record = training_records["stage3"][name]
    apply_stage(tiny_model, STAGES["multi_granularity"], frozen={"vision_tower"})
    batch = recorded_batch(name)
    found = multi_granularity_loss(tiny_model, batch, image_features(tiny_model, batch), DEFAULT)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(record["loss"], rel=1e-4)
    for level, loss in record["per_granularity_loss"].items():
        total, weight = found.metrics[f"loss_{level}"]
        assert float(total) / weight == pytest.approx(loss, rel=1e-4)
    _norms_match(tiny_model, record["grad_norm_by_param"])


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize("name", ["A_two_images", "B_padded_three", "F_single", "G_short_instruction"])
def test_recorded_stage4(name: str, tiny_model: Any, recorded_batch: Recorded, training_records: Any) -> None:
    record = training_records["stage4"]["script_settings"]["batches"][name]
    apply_stage(tiny_model, STAGES["rglf"])
    batch = recorded_batch(name)
    features = [image.detach() for image in image_features(tiny_model, batch)]
    found = rglf_loss(tiny_model, batch, features, RouterSettings(margin=1.0))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(record["loss"], rel=1e-4)
    assert found.metrics["router_rows_skipped"][0] == 0
    for name, part in (("ranking_loss", "rank_part"), ("cross_entropy", "ce_part")):
        total, count = found.metrics[name]
        assert float(total) / count == pytest.approx(record[part], rel=1e-4)
    _norms_match(tiny_model, record["grad_norm_by_param"])
    assert all(p.grad is None for n, p in tiny_model.named_parameters() if "router" not in n)


@pytest.mark.parametrize("name", BATCHES)
def test_recorded_answer_losses(name: str, tiny_model: Any, recorded_batch: Recorded, training_records: Any) -> None:
    record = training_records["stage4"]["script_settings"]["batches"][name]
    batch = recorded_batch(name)
    losses, tokens = score_rows(tiny_model, batch, image_features(tiny_model, batch))
    recorded = torch.tensor([[float(value) for value in row] for row in record["llm_loss_rows_samples_cols_granularities"]])
    torch.testing.assert_close(losses, recorded, rtol=1e-4, atol=0, equal_nan=True)
    assert tokens.shape == losses.shape and tiny_model.training


@pytest.mark.parametrize("name", ["C_mixed_text", "D_text_only", "E_no_labels_row"])
def test_rows_that_cannot_train_the_router(
    name: str, tiny_model: Any, recorded_batch: Recorded, training_records: Any
) -> None:
    record = training_records["stage4"]["script_settings"]["batches"][name]
    apply_stage(tiny_model, STAGES["rglf"])
    batch = recorded_batch(name)
    features = [image.detach() for image in image_features(tiny_model, batch)]
    found = rglf_loss(tiny_model, batch, features, RouterSettings(margin=1.0))
    found.loss.backward()
    assert all(p.grad is not None for p in tiny_model.model.router.parameters())
    rows = {"C_mixed_text": [0, 2], "D_text_only": [], "E_no_labels_row": [0]}[name]
    logits = torch.tensor([record["router_logits"][row] for row in rows]).reshape(len(rows), 5)
    losses = torch.tensor(
        [[float(value) for value in record["llm_loss_rows_samples_cols_granularities"][row]] for row in rows]
    )
    expected = rglf_losses(logits, losses.reshape(len(rows), 5), 1.0).total.sum().item() / max(len(rows), 1)
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)
    assert found.metrics["router_rows_skipped"][0] == len(batch["rows"]) - len(rows)


def naive_loss(model: Any, batch: dict[str, Any], level: int) -> torch.Tensor:
    """The stock path: the model's own forward with labels, images encoded again, rows padded."""
    keys = ("input_ids", "attention_mask", "labels", "image_sizes")
    images = batch["images"] or None
    return model(**{key: batch[key] for key in keys}, images=images, vis_token_granularity=level).loss


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["A_two_images", "B_padded_three", "C_mixed_text"])
def test_equals_a_naive_loop_and_reaches_the_tower(
    name: str, one_pass: bool, tiny_model: Any, recorded_batch: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "reads_in_one_pass", lambda model: one_pass)
    apply_stage(tiny_model, STAGES["multi_granularity"])
    tiny_model.double()
    batch = recorded_batch(name)
    calls: list[str] = []
    parts = {"tower": tiny_model.get_vision_tower(), "llm": tiny_model.model.layers[0], "words": tiny_model.lm_head}
    handles = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    found = multi_granularity_loss(tiny_model, batch, image_features(tiny_model, batch), DEFAULT)
    found.loss.backward()
    passes = 1 if one_pass else 5
    assert sorted(calls) == ["llm"] * passes + ["tower"] + ["words"] * passes
    for handle in handles:
        handle.remove()
    gradients = {n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None}
    tiny_model.zero_grad()
    expected = 0.0
    for level in granularities(tiny_model):
        loss = naive_loss(tiny_model, batch, level) / 5
        loss.backward()
        expected += loss.item()
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)
    for name_, parameter in tiny_model.named_parameters():
        if parameter.grad is None:
            assert name_ not in gradients
        else:
            torch.testing.assert_close(gradients[name_], parameter.grad, rtol=1e-4, atol=1e-7)
    tower = [name for name in gradients if "vision_tower" in name]
    assert any("layers.0" in name for name in tower) and any("patch_embedding" in name for name in tower)
    assert not any("router" in name for name in gradients)


@pytest.mark.parametrize("stage", ["align", "instruct", "multi_granularity"])
def test_a_batch_without_images_leaves_zero_gradients_and_calls_every_part(
    stage: str, tiny_model: Any, recorded_batch: Recorded
) -> None:
    apply_stage(tiny_model, STAGES[stage])
    batch = recorded_batch("D_text_only")
    calls: list[int] = []
    tiny_model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    tiny_model.lm_head.register_full_backward_hook(lambda *_: calls.append(2))
    found = STAGE_LOSSES[STAGES[stage].loss](tiny_model, batch, image_features(tiny_model, batch), DEFAULT)
    found.loss.backward()
    assert calls == [1] + [2] * (5 if stage == "multi_granularity" else 1)
    assert found.loss.item() == pytest.approx(naive_loss(tiny_model, batch, 144).item(), rel=1e-4)
    for name, parameter in tiny_model.named_parameters():
        if parameter.requires_grad and ("mm_projector" in name or "patch_embedding" in name or "image_newline" in name):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_batch_counts_by_its_share_of_the_step(tiny_model: Any, recorded_batch: Recorded) -> None:
    apply_stage(tiny_model, STAGES["rglf"])
    batch = recorded_batch("C_mixed_text")
    features = [image.detach() for image in image_features(tiny_model, batch)]
    assert [count_items(batch, loss) for loss in ("token_mean", "rglf")] == [int((batch["labels"] != -100).sum()), 2]
    for name in STAGE_LOSSES:
        own = count_items(batch, name)
        whole = STAGE_LOSSES[name](tiny_model, batch, features, DEFAULT).loss.item()
        assert STAGE_LOSSES[name](tiny_model, batch, features, DEFAULT, 4 * own).loss.item() == pytest.approx(whole / 4, rel=1e-5)


def test_full_granularity_equals_the_models_own_loss(tiny_model: Any, recorded_batch: Recorded) -> None:
    batch = recorded_batch("C_mixed_text")
    found = token_mean_loss(tiny_model, batch, image_features(tiny_model, batch), DEFAULT)
    own = tiny_model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        images=batch["images"],
        image_sizes=batch["image_sizes"],
        vis_token_granularity=144,
    ).loss
    assert found.loss.item() == pytest.approx(own.item(), rel=1e-5)
    single = answer_losses(tiny_model, batch, image_features(tiny_model, batch), [144])
    assert single.sums.sum().item() / int(single.labels.sum()) == pytest.approx(own.item(), rel=1e-5)


def test_known_scores_give_the_same_loss(tiny_model: Any, recorded_batch: Recorded) -> None:
    apply_stage(tiny_model, STAGES["rglf"])
    batch = recorded_batch("C_mixed_text")
    features = [image.detach() for image in image_features(tiny_model, batch)]
    online = RouterSettings(granularity_cost_weight=0.02)
    offline = RouterSettings(granularity_cost_weight=0.02, scores=lambda rows: known)
    known = score_rows(tiny_model, batch, features)
    forwards: list[int] = []
    expected = STAGE_LOSSES["rglf"](tiny_model, batch, features, online)
    tiny_model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    found = STAGE_LOSSES["rglf"](tiny_model, batch, features, offline)
    assert found.loss.item() == expected.loss.item() and not forwards


def test_pixels_become_values_on_the_way_to_the_tower(tiny_model: Any, recorded_batch: Recorded) -> None:
    batch, config = recorded_batch("A_two_images"), tiny_model.config
    processor = tiny_model.get_vision_tower().image_processor
    files = [load_image(ORACLE / "images" / name) for name in batch["image_keys"]]
    cut = [cut_into_views(image, processor, config.image_aspect_ratio, config.image_grid_pinpoints) for image in files]
    assert all(views.dtype == torch.uint8 for views in cut)
    caches = (None, FeatureCache(limit_bytes=2**20))
    for cache in caches:
        found = image_features(tiny_model, {**batch, "images": cut}, cache)
        expected = image_features(tiny_model, batch, None if cache is None else FeatureCache(limit_bytes=2**20))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_cached_features_are_encoded_once_and_equal(tiny_model: Any, recorded_batch: Recorded) -> None:
    batch = recorded_batch("B_padded_three")
    cache = FeatureCache(10_000_000)
    calls: list[int] = []
    tiny_model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    first = image_features(tiny_model, batch, cache)
    assert len(calls) == 3 == len(cache)
    again = image_features(tiny_model, {**batch, "images": [None] * 3}, cache)
    assert len(calls) == 3
    for one, two, plain in zip(first, again, image_features(tiny_model, batch), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, plain, atol=3e-5, rtol=0)
    full = FeatureCache(10)
    image_features(tiny_model, batch, full)
    assert len(full) == 0


def test_a_rows_losses_are_divided_by_its_labels_before_the_shift(tiny_model: Any, recorded_batch: Recorded) -> None:
    """As in the published code: a supervised first token, which nothing predicts, adds no loss but counts as a label."""
    batch = recorded_batch("A_two_images")
    before, _ = score_rows(tiny_model, batch, image_features(tiny_model, batch))
    labels = int((batch["labels"][0] != -100).sum())
    assert batch["labels"][0, 0] == -100
    batch["labels"][0, 0] = batch["input_ids"][0, 0]
    after, _ = score_rows(tiny_model, batch, image_features(tiny_model, batch))
    torch.testing.assert_close(after[0], before[0] * labels / (labels + 1))
    torch.testing.assert_close(after[1:], before[1:])
