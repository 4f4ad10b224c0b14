"""Flags: LLaVA's names work, stages set defaults, contradictions are refused together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava.train.arguments import check_arguments, ignored_flags
from llava.train.run import parse_arguments

Flags = Callable[..., list[str]]


def test_published_flags_of_stage3(tmp_path: Path, run_flags: Flags) -> None:
    """The flags that LLaVA's scripts pass, by their names."""
    flags = {
        "version": "v1", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[48, 96], [96, 48]]",
        "mm_patch_merge_type": "spatial_unpad", "group_by_modality_length": True, "unfreeze_mm_vision_tower": True,
        "mm_vision_tower_lr": 3e-5, "mm_projector_lr": 4e-5, "vis_token_granularity": "36,72,144,288,576",
        "tune_mm_mlp_adapter": False, "tune_router": False, "router_select": False, "evaluation_strategy": "no",
        "warmup_ratio": 0.05, "lazy_preprocess": True, "is_multimodal": True, "model_max_length": 512,
        "weight_decay": 0.0, "gradient_checkpointing": True, "dataloader_num_workers": 0, "save_total_limit": 1,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    model_args, data_args, training_args = parse_arguments(run_flags(tmp_path, "multi_granularity", **flags))
    assert model_args.granularities == [36, 72, 144, 288, 576] and data_args.canvases == [[48, 96], [96, 48]]
    assert training_args.warmup_steps == 0.05 and training_args.eval_strategy == "no"
    rates = training_args.learning_rates
    assert (rates["llm"], rates["vision_tower"], rates["projector"]) == (1e-5, 3e-5, 4e-5)


@pytest.mark.parametrize(
    ("flags", "stage", "rate", "tower"),
    [
        ({"tune_mm_mlp_adapter": True}, "align", 1e-3, 1e-3),
        ({}, "instruct", 2e-5, 2e-6),
        ({"tune_router": True}, "rglf", 1e-3, 1e-3),
        ({"stage": "multi_granularity"}, "multi_granularity", 1e-5, 2e-5),
    ],
)
def test_stage_and_published_rates(
    flags: dict[str, object], stage: str, rate: float, tower: float, tmp_path: Path, run_flags: Flags
) -> None:
    changes = {"warmup_ratio": None, **{name: value for name, value in flags.items() if name != "stage"}}
    given = flags.get("stage")
    _, _, args = parse_arguments(run_flags(tmp_path, given, **changes))
    assert args.stage == stage and args.learning_rates["llm"] == rate and args.learning_rates["vision_tower"] == tower
    assert (args.margin, args.rank_loss_weight, args.ce_loss_weight) == (1.0, 1.0, 0.1)
    assert args.warmup_steps == 0.03 and args.lr_scheduler_type == "cosine"


def test_flags_of_the_published_stage_4_that_change_nothing(tmp_path: Path, run_flags: Flags) -> None:
    """Its script unfreezes the tower and gives it a rate, though the stage trains the router alone."""
    flags = {"tune_router": True, "router_select": True, "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3}
    training_args = parse_arguments(run_flags(tmp_path, None, **flags))[2]
    assert training_args.stage == "rglf" and training_args.stage_plan.trains == {"router"}
    ignored = ignored_flags(training_args)
    assert ignored == ["--unfreeze_mm_vision_tower True", "--mm_vision_tower_lr"]
    training_args = parse_arguments(run_flags(tmp_path, "multi_granularity", unfreeze_mm_vision_tower=True))[2]
    assert ignored_flags(training_args) == []


def test_every_contradiction_is_named_at_once(tmp_path: Path, run_flags: Flags) -> None:
    flags = run_flags(
        tmp_path, "align", tune_router=True, unfreeze_mm_vision_tower=True, granularity_scores="x.parquet",
        on_bad_sample="ignore", image_grid_pinpoints="48,96", vis_token_granularity="9,3", margin=-1,
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        parse_arguments(flags)
    for flag in (
        "--tune_router True", "--unfreeze_mm_vision_tower True", "--granularity_scores", "--on_bad_sample",
        "--image_grid_pinpoints", "--vis_token_granularity", "--margin",
    ):  # fmt: skip
        assert flag in str(error.value)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("stage9", {}, "choose one of align"),
        ("rglf", {"router_select": False}, "--router_select False contradicts"),
        ("instruct", {"cache_image_features_gb": 1}, "freeze it with --unfreeze_mm_vision_tower False"),
        ("rglf", {"rank_loss_weight": 0, "ce_loss_weight": 0}, "both 0"),
        ("align", {"freeze_mm_mlp_adapter": True}, "freeze all of it"),
        ("rglf", {"mm_projector_lr": 1e-3}, "does not train the projector"),
        ("instruct", {"tune_mm_mlp_adapter": True}, "belongs to stage align"),
        ("instruct", {"is_multimodal": False}, "--image_folder is given"),
        ("align", {"mm_vision_tower_lr": 1e-5}, "--mm_vision_tower_lr is given, but stage align does not train"),
        ("instruct", {"on_nonfinite_loss": "ignore"}, "--on_nonfinite_loss is 'ignore'; choose raise or skip"),
    ],
)
def test_refusals(stage: str, flags: dict[str, object], message: str, tmp_path: Path, run_flags: Flags) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(run_flags(tmp_path, stage, **flags))


def test_what_deepspeed_cannot_do_is_refused(tmp_path: Path, run_flags: Flags) -> None:
    arguments = parse_arguments(run_flags(tmp_path, "rglf", cache_image_features_gb=1, on_nonfinite_loss="skip"))
    arguments[2].deepspeed = "zero3.json"
    with pytest.raises(ValueError, match="(?s)gradients that DeepSpeed keeps.*call the vision tower unequally often"):
        check_arguments(*arguments)
