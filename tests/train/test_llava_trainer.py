"""Parameter groups equal the recorded ones, and four AdamW steps over them give the recorded losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.model.router import name_in_memory
from llava.train.llava_trainer import LlavaTrainer, optimizer_groups
from llava.train.objectives import STAGE_LOSSES, RouterSettings, StageLoss, image_features
from llava.train.stages import STAGES, apply_stage

RECORDS = json.loads((Path(__file__).parents[1] / "oracle" / "optimizer_groups.json").read_text())
STAGE_OF = {
    "stage3_script": "multi_granularity",
    "stage3_with_decay_and_projector_lr": "multi_granularity",
    "stage3_single_lr": "multi_granularity",
    "stage4_script": "rglf",
    "stage4_with_decay": "rglf",
}


@pytest.mark.parametrize("name", list(STAGE_OF))
def test_recorded_groups(name: str, tiny_model: Any) -> None:
    record = RECORDS[name]
    apply_stage(tiny_model, STAGES[STAGE_OF[name]])
    rates = {"projector": record["mm_projector_lr"], "vision_tower": record["mm_vision_tower_lr"]}
    own = {part: rate for part, rate in rates.items() if rate is not None}
    groups = optimizer_groups(tiny_model, record["learning_rate"], own, record["weight_decay"])
    # The predecessor also made groups without parameters, which some optimizers refuse.
    # It also trained, without ever a gradient, what no feature depends on.
    unread = {id(weight) for weight in tiny_model.get_vision_tower().unused_weights()}
    unread_names = {name for name, weight in tiny_model.named_parameters() if id(weight) in unread}
    expected = [{**group, "names": sorted(set(map(name_in_memory, group["names"])) - unread_names)} for group in record["groups"]]
    expected = [group for group in expected if group["names"]]
    assert [(sorted(g["names"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (g["names"], g["lr"], g["weight_decay"]) for g in expected
    ]
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize(("stage", "name"), [("stage3", "multi_granularity"), ("stage4", "rglf")])
def test_recorded_steps(stage: str, name: str, tiny_model: Any, recorded_batch: Callable[[str], Any]) -> None:
    record = RECORDS["adamw_steps"][stage]
    settings = record["adamw"]
    apply_stage(tiny_model, STAGES[name], frozen={"vision_tower"})
    groups = optimizer_groups(tiny_model, settings["lr"], {"vision_tower": settings["vis"]}, settings["wd"])
    optimizer = torch.optim.AdamW(
        [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
    )
    batch = recorded_batch(record["batch"])
    losses = []
    for _ in record["losses_at_steps_0_to_3"]:
        loss = STAGE_LOSSES[name](tiny_model, batch, image_features(tiny_model, batch), RouterSettings()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(record["losses_at_steps_0_to_3"], rel=5e-4)


@pytest.mark.parametrize(("processes", "total", "share"), [(1, 12, 12.0), (4, 12, 3.0), (4, 2, 0.5), (4, None, None)])
def test_a_process_divides_by_its_share_of_the_steps_items(processes: int, total: int | None, share: float | None) -> None:
    """Gradients are averaged over the processes afterwards: with N of them each has to count its sum N times."""
    model, asked = torch.nn.Identity(), []

    def stage_loss(bare: Any, batch: Any, items: float | None) -> StageLoss:
        asked.append(items)
        return StageLoss(torch.tensor(1.0))

    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped, num_processes=processes),
        _stage_loss=stage_loss, _check_finite=lambda loss, batch: None, _record=lambda loss, prefix: None,
    )  # fmt: skip
    items = None if total is None else torch.tensor(float(total))
    assert LlavaTrainer.compute_loss(trainer, model, {}, num_items_in_batch=items).item() == 1.0
    assert asked == [share]
