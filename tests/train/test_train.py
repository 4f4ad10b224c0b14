"""Runs of the real program at toy size: every stage, one after the other, resumed, scored offline, refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.train import distributed, llava_trainer
from llava.train.flags import ScoreArguments
from llava.train.run import make_trainer, parse_arguments, train
from llava.train.scores import model_fingerprint, parts_of_rows, score

ORACLE = Path(__file__).parents[1] / "oracle"
Flags = Callable[..., list[str]]
NEW_MODEL = {
    "vision_tower": ORACLE / "tiny-clip",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[[48, 96], [96, 48], [96, 96]]",
}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded rows that stage 1 can use: one image, one answer."""
    rows = json.loads((ORACLE / "train_data.json").read_text())
    usable = [row for row in rows if "image" in row and len(row["conversations"]) == 2]
    file = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in usable))
    return file


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _changed_parts(before: Path, after: Path) -> set[str]:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    prefixes = ("model.mm_projector", "model.image_newline", "model.vision_tower", "model.router")
    return {next((prefix for prefix in prefixes if name.startswith(prefix)), "llm") for name in changed}


def test_four_stages_in_a_row(language_model: Path, captions: Path, tmp_path: Path, run_flags: Flags) -> None:
    """Each stage starts from the one before, changes what its table says, and loads for inference."""
    one, two, three, four = (tmp_path / name for name in ("one", "two", "three", "four"))
    train(run_flags(one, "align", language_model, data_path=captions, **NEW_MODEL))
    fast = {"learning_rate": 1e-2, "group_by_modality_length": True}
    train(run_flags(two, "instruct", one, eval_data_path=captions, eval_strategy="steps", eval_steps=2, **fast))
    train(run_flags(three, "multi_granularity", two, vis_token_granularity="9,18,36,72,144", **fast))
    train(run_flags(four, "rglf", three, router_hidden_size=16, **fast))
    assert (one / "mm_projector.safetensors").is_file()
    everything = {"llm", "model.mm_projector", "model.image_newline", "model.vision_tower"}
    assert _changed_parts(one, two) == everything == _changed_parts(two, three)
    assert _changed_parts(three, four) == {"model.router"}
    history = json.loads((two / "trainer_state.json").read_text())["log_history"]
    assert any(math.isfinite(entry.get("eval_loss", math.nan)) for entry in history)
    logged = json.loads((four / "trainer_state.json").read_text())["log_history"][0]
    assert {"loss_9", "chosen_144", "agreement", "regret", "visual_tokens", "router_rows_skipped"} <= set(logged)
    assert "loss_9" in json.loads((three / "trainer_state.json").read_text())["log_history"][0]
    tokenizer, model, processor, context = load_pretrained_model(str(four), None, "x", device="cpu")
    assert context == 1024 and processor is not None and model.model.router is not None
    assert model.config.conv_version == "v1" and model.config.vis_token_granularity == [9, 18, 36, 72, 144]
    assert tokenizer("Where is the man?").input_ids[0] == 1


def test_align_can_start_from_a_projector(language_model: Path, captions: Path, tmp_path: Path, run_flags: Flags) -> None:
    train(run_flags(tmp_path / "a", "align", language_model, data_path=captions, **NEW_MODEL))
    adapter = {"pretrain_mm_mlp_adapter": tmp_path / "a"}
    arguments = parse_arguments(run_flags(tmp_path / "b", "instruct", language_model, **NEW_MODEL, **adapter))
    projector = make_trainer(arguments).model.model.mm_projector
    saved = load_file(tmp_path / "a" / "mm_projector.safetensors")
    assert torch.equal(projector[0].weight, saved["model.mm_projector.0.weight"])


@pytest.mark.parametrize("stage", ["multi_granularity", "rglf"])
def test_resuming_changes_nothing(stage: str, tmp_path: Path, run_flags: Flags) -> None:
    """Losses and final weights of a resumed run equal an unbroken one's bit for bit (dropout of the router is on)."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    flags |= {"group_by_modality_length": stage == "rglf"}
    train(run_flags(whole, stage, **flags))
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    (resumed / ".unfinished-checkpoint-4").mkdir()
    train(run_flags(resumed, stage, resume_from_checkpoint=True, **flags))
    assert _losses(resumed) == _losses(whole) and len(_losses(whole)) == 5
    one, two = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not list(resumed.glob(".unfinished-*"))


def test_offline_scores_train_the_same_router(tmp_path: Path, run_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring resumes by parts; the router learns the same from its file, without the language model."""
    file = tmp_path / "scores.parquet"
    arguments = ScoreArguments(
        str(ORACLE / "checkpoint"), str(ORACLE / "train_data.json"), str(file), str(ORACLE / "images"),
        version="v1", batch_size=2, part_rows=2, device="cpu",
    )  # fmt: skip
    import llava.train.scores as scoring

    original, scored = scoring.score_part, []

    def interrupted(model: Any, dataset: Any, rows: Any, *rest: Any) -> Any:
        scored.append(list(rows))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return original(model, dataset, rows, *rest)

    monkeypatch.setattr(scoring, "score_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(arguments)
    assert not file.exists() and len(list(file.with_name("scores.parquet.parts").glob("part-*"))) == 1
    score(arguments)
    assert scored[1] == scored[2] and sorted(row for part in [scored[0], *scored[2:]] for row in part) == list(range(7))
    assert file.is_file() and not file.with_name("scores.parquet.parts").exists()

    flags = {"max_steps": 3, "granularity_cost_weight": 0.05}
    train(run_flags(tmp_path / "online", "rglf", **flags))
    offline = make_trainer(parse_arguments(run_flags(tmp_path / "off", "rglf", granularity_scores=file, **flags)))
    offline.model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the language model ran"))
    offline.train()
    online_losses = _losses(tmp_path / "online")
    found = [entry["loss"] for entry in offline.state.log_history if "loss" in entry]
    assert found == pytest.approx(online_losses, rel=1e-4)

    rows = tmp_path / "other.json"
    rows.write_text(json.dumps(json.loads((ORACLE / "train_data.json").read_text())[:3]))
    with pytest.raises(ValueError, match="are for another data than"):
        make_trainer(parse_arguments(run_flags(tmp_path / "x", "rglf", granularity_scores=file, data_path=rows)))
    with pytest.raises(ValueError, match="there is no score file"):
        make_trainer(parse_arguments(run_flags(tmp_path / "x", "rglf", granularity_scores=tmp_path / "none")))


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    from llava.train.scores import SCHEMA, GranularityScores, _metadata, _write

    columns = {"row": [0], "id": ["a"], "losses": [[1.0, 2.0]], "visual_tokens": [[3, 6]]}
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata(_metadata("m", "d", [9, 18]))
    _write(table, tmp_path / "s.parquet")
    losses, tokens = GranularityScores.load(tmp_path / "s.parquet", "m", "d", [9, 18]).lookup([0, 0])
    assert losses.tolist() == [[1.0, 2.0]] * 2 and tokens.tolist() == [[3, 6]] * 2
    with pytest.raises(ValueError, match="another model and granularities than"):
        GranularityScores.load(tmp_path / "s.parquet", "n", "d", [9, 36])


def test_rows_about_one_image_are_scored_together() -> None:
    rows = [{"image": "b"}, {"image": "a"}, {"image": "b"}, {}, {"image": "b"}, {"image": "a"}]
    assert parts_of_rows(rows, 2) == [[3, 1, 5], [0, 2, 4]]


def test_cached_features_train_the_same(tmp_path: Path, run_flags: Flags) -> None:
    flags = {"unfreeze_mm_vision_tower": False, "max_steps": 4}
    plain = train(run_flags(tmp_path / "plain", "instruct", **flags))
    cached = train(run_flags(tmp_path / "cached", "instruct", cache_image_features_gb=0.1, **flags))
    assert len(cached.feature_cache or ()) == 5 and plain.feature_cache is None
    assert _losses(tmp_path / "cached") == pytest.approx(_losses(tmp_path / "plain"), rel=1e-4)


def test_router_without_instruction_saves_a_model_that_needs_none(
    tmp_path: Path, run_flags: Flags, language_model: Path, captions: Path
) -> None:
    granular = {"vis_token_granularity": "9,18,36,72,144", **NEW_MODEL}
    train(run_flags(tmp_path, "rglf", language_model, data_path=captions, router_without_instruction=True, **granular))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["filtered_text_num"] == 0 and config["router_select"]
    load_pretrained_model(str(tmp_path), None, "x", device="cpu")


def test_non_finite_loss_names_step_and_rows(tmp_path: Path, run_flags: Flags) -> None:
    trainer = make_trainer(parse_arguments(run_flags(tmp_path, "instruct")))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"nan at step 1, rows \['s\d', 's\d'\]"):
        trainer.train()


def test_a_step_without_anything_to_train_on_is_reported(tmp_path: Path, run_flags: Flags, caplog: pytest.LogCaptureFixture) -> None:
    """A loss of 0 is never silent: rows without an answer are counted before the first step, and a step of such rows is named."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    rows = [{"id": "one", "conversations": turns}, {"id": "two", "conversations": [turns[0], {"from": "gpt", "value": ""}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {"data_path": tmp_path / "rows.json", "per_device_train_batch_size": 1, "max_steps": 4}
    trainer = make_trainer(parse_arguments(run_flags(tmp_path / "out", "instruct", **changes)))
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry].count(0) == trainer.steps_without_items == 2
    assert "1 of 2 rows have no answer and add nothing to the loss; the first is row 1" in caplog.text
    assert caplog.text.count("a loss of 0 and trains nothing, because rows ['two'] have nothing to train on in stage instruct") == 1
    assert "2 steps trained nothing" in caplog.text


def test_flags_reach_the_modules_of_a_checkpoint(tmp_path: Path, run_flags: Flags) -> None:
    flags = {"router_dropout": 0.25, "mm_vision_select_layer": -1}
    model = make_trainer(parse_arguments(run_flags(tmp_path, "rglf", **flags))).model
    merger = model.model.router.merger
    assert {merger.dropout.p, merger.self_attn.dropout.p} == {0.25}
    tower = model.get_vision_tower()
    assert tower.num_layers_used == tower.config.num_hidden_layers and model.config.mm_vision_select_layer == -1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"image_aspect_ratio": "pad"}, "was trained with image_aspect_ratio 'anyres', but --image_aspect_ratio is 'pad'"),
        ({"image_grid_pinpoints": "[[48, 48]]"}, "was trained with image_grid_pinpoints [[48, 96], "),
        ({"mm_vision_select_layer": -1}, "was trained with mm_vision_select_layer -2, but --mm_vision_select_layer is -1"),
        ({"image_aspect_ratio": "anyres", "mm_vision_select_layer": -2}, None),
    ],
)
def test_flags_that_change_what_trained_weights_see(
    flags: dict[str, object], told: str | None, tmp_path: Path, run_flags: Flags, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(parse_arguments(run_flags(tmp_path, "instruct", **flags)))
    warned = [record.getMessage() for record in caplog.records if "was trained with" in record.getMessage()]
    assert len(warned) == (told is not None) and (told is None or told in warned[0])


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path: Path, run_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"max_steps": 3, "learning_rate": 1e-3, "on_nonfinite_loss": "skip"}
    trainer = make_trainer(parse_arguments(run_flags(tmp_path, "instruct", **flags)))
    compute, seen, weights = llava_trainer.STAGE_LOSSES["token_mean"], [], []

    def broken_at_second(*arguments: Any) -> Any:
        seen.append(arguments[1]["ids"])
        weights.append(trainer.model.lm_head.weight.detach().clone())
        found = compute(*arguments)
        return dataclasses.replace(found, loss=found.loss * torch.nan) if len(seen) == 2 else found

    monkeypatch.setitem(llava_trainer.STAGE_LOSSES, "token_mean", broken_at_second)
    trainer.train()
    assert len(seen) == 3 and trainer.steps_skipped == 1
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert torch.isfinite(trainer.model.lm_head.weight).all()
    assert [entry["steps_skipped"] for entry in trainer.state.log_history if "loss" in entry] == [0, 1, 1]


def test_a_broken_batch_takes_its_whole_step_along(tmp_path: Path, run_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accumulation the other batches of the step are dropped too, and it counts once."""
    flags = {"max_steps": 2, "learning_rate": 1e-3, "on_nonfinite_loss": "skip", "gradient_accumulation_steps": 3}
    trainer = make_trainer(parse_arguments(run_flags(tmp_path, "instruct", per_device_train_batch_size=1, **flags)))
    compute, seen, weights = llava_trainer.STAGE_LOSSES["token_mean"], [], []

    def broken_at_second(*arguments: Any) -> Any:
        seen.append(1)
        weights.append(trainer.model.lm_head.weight.detach().clone())
        found = compute(*arguments)
        return dataclasses.replace(found, loss=found.loss * torch.nan) if len(seen) == 2 else found

    monkeypatch.setitem(llava_trainer.STAGE_LOSSES, "token_mean", broken_at_second)
    trainer.train()
    assert trainer.steps_skipped == 1 and torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[3], trainer.model.lm_head.weight)


@pytest.mark.parametrize("stage", ["instruct", "rglf"])
def test_the_evaluation_loss_is_a_mean_over_items(stage: str, tmp_path: Path, run_flags: Flags) -> None:
    """Whatever the batch size, rows without an image or an answer included."""
    losses = []
    for size in (1, 3, 7):
        flags = {"eval_data_path": ORACLE / "train_data.json", "eval_strategy": "steps", "per_device_eval_batch_size": size}
        trainer = make_trainer(parse_arguments(run_flags(tmp_path / str(size), stage, **flags)))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] > 0 and losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_an_earlier_runs_checkpoints_are_neither_mixed_in_nor_lost_unasked(tmp_path: Path, run_flags: Flags) -> None:
    flags = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-9 of an earlier run; resume it"):
        train(run_flags(tmp_path, "rglf", **flags))
    assert (tmp_path / "checkpoint-9").is_dir()
    train(run_flags(tmp_path, "rglf", overwrite_output_dir=True, **flags))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path, run_flags: Flags) -> None:
    flags = {"eval_data_path": ORACLE / "train_data.json", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    flags |= {"save_steps": 1, "max_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    train(run_flags(tmp_path, "rglf", **flags))
    for state in [*tmp_path.glob("checkpoint-*/trainer_state.json"), tmp_path / "trainer_state.json"]:
        best = json.loads(state.read_text())["best_model_checkpoint"]
        assert Path(best).is_dir() and Path(best).parent == tmp_path


def test_the_sampler_learns_which_epoch_begins(tmp_path: Path, run_flags: Flags) -> None:
    trainer = make_trainer(parse_arguments(run_flags(tmp_path, "rglf", group_by_modality_length=True)))
    sampler = trainer._get_train_sampler()
    for epoch, expected in ((None, 0), (0.4, 0), (1.0, 1), (1.43, 1), (1.9999999, 2)):
        trainer.state.epoch = epoch
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        assert sampler.epoch == expected


def test_scores_of_another_layer_are_of_another_model() -> None:
    _, model, _, _ = load_pretrained_model(str(ORACLE / "checkpoint"), None, "x", device="cpu")
    before = model_fingerprint(model)
    model.config.mm_vision_select_layer = -1
    assert model_fingerprint(model) != before


def test_the_log_tells_speed_padding_and_memory(tmp_path: Path, run_flags: Flags) -> None:
    train(run_flags(tmp_path, "multi_granularity", max_steps=1))
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert logged["tokens_per_second"] > 0 and logged["memory_gb"] > 0.1 and 0 <= logged["padding_share"] < 0.5


@pytest.mark.parametrize("stage", ["instruct", "rglf"])
def test_accumulated_batches_train_as_one_batch_does(stage: str, tmp_path: Path, run_flags: Flags) -> None:
    """The mean is over the step's tokens (stage 4: images), not over the means of its batches."""
    flags = {"max_steps": 2, "learning_rate": 1e-2, "router_dropout": 0.0, "dataloader_drop_last": True, "optim": "sgd"}
    together, apart = tmp_path / "together", tmp_path / "apart"
    train(run_flags(together, stage, per_device_train_batch_size=3, **flags))
    train(run_flags(apart, stage, per_device_train_batch_size=1, gradient_accumulation_steps=3, **flags))
    assert _losses(apart) == pytest.approx(_losses(together), rel=1e-4)
    one, two = load_file(together / "model.safetensors"), load_file(apart / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-3)


def test_work_enters_by_the_wrappers_forward() -> None:
    bare = torch.nn.Linear(2, 1)
    entered: list[str] = []

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = bare

        def forward(self) -> torch.Tensor:
            entered.append("wrapper")
            return self.module()

    bare.register_forward_pre_hook(lambda *_: entered.append("bare"))
    result = distributed.call_through(Wrapper(), bare, lambda: bare.weight.sum())
    assert entered == ["wrapper", "bare"] and result.item() == bare.weight.sum().item()
    assert "forward" not in bare.__dict__ and bare(torch.zeros(1, 2)).shape == (1, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vis_token_granularity": "36,72,144"}, "trained with other values.*vis_token_granularity"),
        ({"router_hidden_size": 16}, "router_hidden_size"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"model_max_length": 4096}, "built for 2048"),
        ({"version": "v9"}, "--version is 'v9'"),
    ],
)
def test_flags_that_do_not_fit_the_checkpoint(flags: dict[str, object], message: str, tmp_path: Path, run_flags: Flags) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(parse_arguments(run_flags(tmp_path, "rglf", **flags)))


def test_a_language_model_needs_its_eyes(language_model: Path, tmp_path: Path, run_flags: Flags) -> None:
    with pytest.raises(ValueError, match="give --vision_tower and --mm_projector_type"):
        make_trainer(parse_arguments(run_flags(tmp_path, "align", language_model)))
    with pytest.raises(ValueError, match="compares granularities, but the model has 1"):
        make_trainer(parse_arguments(run_flags(tmp_path, "multi_granularity", language_model, **NEW_MODEL)))


def test_published_entry_point_stops_with_a_sentence(tmp_path: Path, run_flags: Flags) -> None:
    program = Path(__file__).parents[2] / "llava" / "train" / "train_mem.py"
    command = [sys.executable, str(program), *run_flags(tmp_path, "align", tune_router=True)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}, check=False)
    assert done.returncode == 1 and "training stopped: these flags cannot work together" in done.stderr
    assert not list(tmp_path.iterdir())
