"""What a stage trains, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llava.train.stages import PARTS, STAGES, apply_stage, get_stage, log_training_table, part_of


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_gradients_follow_the_table(stage: Any, tiny_model: Any) -> None:
    summaries = apply_stage(tiny_model, stage)
    training = {part_of(name) for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    assert training == stage.trains == {line.part for line in summaries if line.trainable}
    assert sum(line.parameters for line in summaries) == sum(p.numel() for p in tiny_model.parameters())


def test_what_no_feature_depends_on_stays_frozen(tiny_model: Any) -> None:
    tower = tiny_model.get_vision_tower()
    tower.choose_layer(1)
    summaries = {line.part: line for line in apply_stage(tiny_model, STAGES["instruct"])}
    encoder = tower.vision_tower.vision_model
    frozen = [*encoder.encoder.layers[1:].parameters(), *encoder.post_layernorm.parameters()]
    assert {id(p) for p in tower.parameters() if not p.requires_grad} == {id(p) for p in frozen}
    line = summaries["vision_tower"]
    assert line.trainable == line.parameters - sum(parameter.numel() for parameter in frozen)


def test_a_part_can_be_frozen_and_the_table_says_so(tiny_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("llava").propagate = True
    summaries = apply_stage(tiny_model, STAGES["instruct"], frozen={"vision_tower"})
    with caplog.at_level(logging.INFO, logger="llava.train.stages"):
        log_training_table(STAGES["instruct"], summaries, dict.fromkeys(PARTS, 2e-5), 0.05)
    lines = {line.split()[0]: line.split() for line in caplog.text.splitlines() if line.split()[:1]}
    assert lines["vision_tower"][2:] == ["0", "-", "-"]
    assert lines["llm"][3:] == ["2e-05", "0.05"]


def test_refusals(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="choose one of align, instruct"):
        get_stage("stage5")
    with pytest.raises(ValueError, match="stage align trains nothing"):
        apply_stage(tiny_model, STAGES["align"], frozen={"projector"})
    tiny_model.model.router = None
    with pytest.raises(ValueError, match="stage rglf trains router"):
        apply_stage(tiny_model, STAGES["rglf"])
