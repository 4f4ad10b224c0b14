"""LoRA and QLoRA: what learns, adapter folders that come back exactly, runs that resume and train on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.router import name_in_checkpoint
from llava.train.checkpoint import publish_into, restore_weights, write_manifest
from llava.train.llava_trainer import optimizer_groups
from llava.train.run import make_trainer, parse_arguments, train
from llava.train.stages import part_of

pytest.importorskip("peft")
ORACLE = Path(__file__).parents[1] / "oracle"
BASE = ORACLE / "checkpoint"
Flags = Callable[..., list[str]]
LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
FILES = {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors", "config.json", "tokenizer.json"}


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    ids, side = torch.tensor([[1, 5, -200, 7, 9]]), model.config.vision_config["image_size"]
    return _no_grad(model.eval(), ids, [torch.randn(3, 3, side, side)], [(2 * side - 4, side)])


@torch.no_grad()
def _no_grad(model: Any, ids: torch.Tensor, images: Any, sizes: Any) -> torch.Tensor:
    return model(ids, images=images, image_sizes=sizes, vis_token_granularity=model.levels[-1].tokens).logits.float()


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "non_lora_trainables.safetensors")


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, run_flags: Flags) -> tuple[Path, Any]:
    """A folder trained for two steps of stage 2, and the model that is still in memory."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return folder, train(run_flags(folder, "instruct", **LORA)).model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose widths 4-bit weights can be packed for the CPU."""
    folder = tmp_path_factory.mktemp("wide")
    fields = {**LlavaConfig.get_config_dict(BASE)[0], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    for name in ("architectures", "dtype", "torch_dtype", "model_type"):
        fields.pop(name, None)
    config = LlavaConfig(**{**fields, "mm_vision_tower": str(ORACLE / "tiny-clip"), **_tower_fields()})
    torch.manual_seed(0)
    LlavaLlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(BASE / name, folder)
    return folder


def _tower_fields() -> dict[str, Any]:
    config = LlavaLlamaForCausalLM.from_pretrained(BASE).config
    return {"vision_config": config.vision_config, "image_processor": config.image_processor}


def test_what_learns_and_at_which_rate(tmp_path: Path, run_flags: Flags, caplog: pytest.LogCaptureFixture) -> None:
    """Adapter, projector, newline and tower get gradients; the language model, its head and the router do not."""
    logging.getLogger("llava").propagate = True
    flags = run_flags(tmp_path, "instruct", mm_projector_lr=3e-3, mm_vision_tower_lr=4e-4, weight_decay=0.1, **LORA)
    with caplog.at_level(logging.INFO, logger="llava.train.stages"):
        trainer = make_trainer(parse_arguments(flags))
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model.train(), batch).backward()
    learning = {"lora", "projector", "newline", "vision_tower"}
    assert {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad} == learning
    moved = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == learning
    matrices = [name for name, _ in model.named_parameters() if part_of(name) == "lora"]
    assert len(matrices) == 2 * 7 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in matrices) and type(model) is LlavaLlamaForCausalLM
    table = {line.split()[0]: line.split() for line in caplog.text.splitlines() if line.split()[:1]}
    count = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == "lora")
    assert table["lora"][1:] == [f"{count:,}", f"{count:,}", "0.01", "0.1"] and table["llm"][2:] == ["0", "-", "-"]
    groups = optimizer_groups(model, trainer.args.learning_rates["llm"], trainer.own_rates(), 0.1)
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert {rates[name] for name in matrices} == {(1e-2, 0.1)}
    assert rates["model.mm_projector.0.weight"] == (3e-3, 0.1) and rates["model.image_newline"][0] == 1e-2


def test_a_folder_gives_back_the_model_that_was_trained(adapter: tuple[Path, Any]) -> None:
    folder, trained = adapter
    assert FILES <= {file.name for file in folder.iterdir()} and not list(folder.glob("model*.safetensors"))
    own = {name: tensor for name, tensor in trained.state_dict().items() if part_of(name) != "llm"}
    stored = {name.removeprefix("base_model.model."): tensor for name, tensor in _stored(folder).items()}
    assert _same({name_in_checkpoint(name.replace(".default", "")): tensor for name, tensor in own.items()}, stored)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE.resolve()) and (config["r"], config["lora_alpha"]) == (4, 8)
    expected = _logits(trained)
    before = LlavaLlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert (expected - _logits(before)).abs().max() > 1e-2
    for base in (str(BASE), None):
        tokenizer, model, _, _ = load_pretrained_model(str(folder), base, "any-name", device="cpu", dtype=torch.float32)
        assert not any("lora" in name for name, _ in model.named_parameters())
        # Sums in another order: W x + s B A x against (W + s B A) x, in float32. The worst of three seeds was 9e-6, of logits up to 19.
        torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=2e-5)
    assert tokenizer("Where is the man?").input_ids[0] == 1 and model.config.conv_version == "v1"


@pytest.mark.parametrize("bits", [16, 4])
def test_resuming_changes_nothing(bits: int, tmp_path: Path, run_flags: Flags, wide: Path) -> None:
    """Losses and the finished adapter of a resumed run equal an unbroken one's bit for bit; the dropout of LoRA is on."""
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = {**LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.3, "model": wide, "bits": bits}
    train(run_flags(whole, "instruct", **flags))
    assert FILES <= {file.name for file in (whole / "checkpoint-2").iterdir()}
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    (resumed / ".unfinished-checkpoint-3").mkdir()
    train(run_flags(resumed, "instruct", resume_from_checkpoint=True, **flags))
    assert _losses(resumed) == _losses(whole) and len(_losses(whole)) == 4
    assert _same(_stored(whole), _stored(resumed)) and not list(resumed.glob(".unfinished-*"))


def test_over_a_plain_language_model(language_model: Path, tmp_path: Path, run_flags: Flags) -> None:
    """LLaVA's usual way: Vicuna, a tower and a projector; the folder then needs them no more than by name."""
    new = {
        "vision_tower": ORACLE / "tiny-clip", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[[48, 96], [96, 48], [96, 96]]", "vis_token_granularity": "9,18,36,72,144",
    }  # fmt: skip
    for tower in (True, False):
        folder = tmp_path / str(tower)
        flags = run_flags(folder, "multi_granularity", language_model, unfreeze_mm_vision_tower=tower, **new, **LORA)
        trained = train(flags).model
        assert any("vision_tower" in name for name in _stored(folder)) is tower
        model = load_pretrained_model(str(folder), str(language_model), "x", device="cpu", dtype=torch.float32)[1]
        torch.testing.assert_close(_logits(model), _logits(trained), rtol=1e-5, atol=2e-5)


def test_training_on(adapter: tuple[Path, Any], tmp_path: Path, run_flags: Flags) -> None:
    """Both ways continue from the same weights, keep the adapter's rank, and keep a tower that no longer learns."""
    folder, _ = adapter
    ways = ({"model": folder}, {"lora_weight_path": folder})
    for number, way in enumerate(ways):
        out = tmp_path / str(number)
        flags = {"lora_enable": True, "learning_rate": 1e-2, "unfreeze_mm_vision_tower": False, **way}
        trainer = make_trainer(parse_arguments(run_flags(out, "multi_granularity", **flags)))
        trainer.model.save_pretrained(out / "start")
        assert _same(_stored(folder), _stored(out / "start"))
        trainer.train()
        trainer.save_final()
        new, old = _stored(out), _stored(folder)
        changed = {part_of(name.removeprefix("base_model.model.")) for name in new if not torch.equal(new[name], old[name])}
        assert new.keys() == old.keys() and changed == {"lora", "projector", "newline"}
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(BASE.resolve())
    for name in ("lora_r", "lora_alpha"):
        with pytest.raises(ValueError, match=f"--{name} is 3, but the adapter"):
            make_trainer(parse_arguments(run_flags(tmp_path, "instruct", folder, lora_enable=True, **{name: 3})))


@pytest.mark.parametrize("given", [None, 0.25, 0.0])
def test_dropout_is_the_stored_one_unless_the_flag_says_another(
    given: float | None, adapter: tuple[Path, Any], tmp_path: Path, run_flags: Flags
) -> None:
    """Rank and scale belong to the matrices; dropout to the run, so that a stored adapter takes another, 0 as well, into its layers."""
    stored = json.loads((adapter[0] / "adapter_config.json").read_text())["lora_dropout"]
    assert stored not in (0.25, 0.0)
    flags = {"lora_enable": True} if given is None else {"lora_enable": True, "lora_dropout": given}
    model = make_trainer(parse_arguments(run_flags(tmp_path, "instruct", adapter[0], **flags))).model
    expected = stored if given is None else given
    assert model.peft_config["default"].lora_dropout == expected
    layers = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert layers and {getattr(layer, "p", 0.0) for layer in layers} == {expected}


def test_the_next_stage_merges_an_adapter(adapter: tuple[Path, Any], tmp_path: Path, run_flags: Flags) -> None:
    """Without --lora_enable a stage starts from the merged model and leaves a full one, also where an adapter lay before."""
    folder, trained = adapter
    out = shutil.copytree(folder, tmp_path / "out")
    model = train(run_flags(out, "rglf", folder, overwrite_output_dir=True)).model
    torch.testing.assert_close(_logits(model), _logits(trained), rtol=1e-5, atol=2e-5)
    names = {file.name for file in out.iterdir()}
    assert "model.safetensors" in names and not names & (FILES - {"config.json", "tokenizer.json"})
    torch.testing.assert_close(_logits(load_pretrained_model(str(out), device="cpu")[1]), _logits(model), rtol=0, atol=0)


def test_an_adapter_replaces_a_full_model(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "staging").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json"):
        (tmp_path / "staging" / name).write_text("new")
    write_manifest(tmp_path / "staging", "instruct", 1)
    publish_into(tmp_path / "staging", tmp_path)
    names = ["adapter_config.json", "adapter_model.safetensors", "checkpoint.json", "config.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize(("bits", "quant_type", "double"), [(4, "nf4", True), (4, "fp4", False), (8, "nf4", True)])
def test_qlora_trains(bits: int, quant_type: str, double: bool, wide: Path, tmp_path: Path, run_flags: Flags) -> None:
    """Only the language model's layers are quantised; the rest learns through them, the tower too; the folder loads both ways."""
    pytest.importorskip("bitsandbytes")
    flags = {**LORA, "bits": bits, "quant_type": quant_type, "double_quant": double, "max_steps": 3}
    trainer = make_trainer(parse_arguments(run_flags(tmp_path / "out", "instruct", wide, **flags)))
    packed = {name for name, p in trainer.model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert packed and all(name.startswith("model.layers.") for name in packed)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {part_of(name) for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora", "projector", "newline", "vision_tower"}
    trainer.save_final()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = _logits(trainer.model)
    option = {"load_4bit": True} if bits == 4 else {"load_8bit": True}
    model = load_pretrained_model(str(tmp_path / "out"), device="cpu", dtype=torch.float32, **option)[1]
    assert any("lora_A" in name for name, _ in model.named_parameters()) and not model.training
    if (quant_type, double) == ("nf4", True):  # what load_pretrained_model quantises with, so the same numbers
        torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
    whole = load_pretrained_model(str(tmp_path / "out"), device="cpu", dtype=torch.float32)[1]
    assert torch.cosine_similarity(_logits(whole).flatten(), expected.flatten(), dim=0) > 0.9


def test_4bit_on_the_cpu_is_refused_where_it_cannot_be_packed(tmp_path: Path, run_flags: Flags) -> None:
    with pytest.raises(ValueError, match="multiples of 64, but .* has {'hidden_size': 32}"):
        make_trainer(parse_arguments(run_flags(tmp_path, "instruct", bits=4, **LORA)))


def test_a_frozen_language_model_is_held_in_16_bits(tmp_path: Path, run_flags: Flags) -> None:
    """With --bf16 what learns stays float32; gradient checkpointing changes nothing about what gets a gradient."""
    flags = {**LORA, "bf16": True, "gradient_checkpointing": True}
    trainer = make_trainer(parse_arguments(run_flags(tmp_path, "multi_granularity", **flags)))
    kinds = {(part_of(name), p.dtype) for name, p in trainer.model.named_parameters() if part_of(name) != "router"}
    assert kinds == {("llm", torch.bfloat16)} | {(part, torch.float32) for part in ("lora", "projector", "newline", "vision_tower")}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {part_of(name) for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora", "projector", "newline", "vision_tower"}


def test_the_best_checkpoint_comes_back(tmp_path: Path, run_flags: Flags) -> None:
    """The one with the larger loss is asked for here, which is not the last one."""
    flags = {
        **LORA, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "eval_data_path": ORACLE / "train_data.json", "load_best_model_at_end": True, "learning_rate": 10.0,
        "lr_scheduler_type": "constant", "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    train(run_flags(tmp_path, "instruct", **flags))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = max(evaluated, key=lambda step: evaluated[step])
    assert best == 1 and len(evaluated) == 2 and _same(_stored(tmp_path / f"checkpoint-{best}"), _stored(tmp_path))
    assert not _same(_stored(tmp_path / "checkpoint-1"), _stored(tmp_path / "checkpoint-2"))


def test_checkpoints_of_other_runs_are_refused(adapter: tuple[Path, Any], tiny_model: Any, tmp_path: Path, run_flags: Flags) -> None:
    folder, _ = adapter
    with pytest.raises(ValueError, match="holds an adapter, but this run trains a full model"):
        restore_weights(tiny_model, folder)
    other = make_trainer(parse_arguments(run_flags(tmp_path, "instruct", **{**LORA, "lora_alpha": 16}))).model
    with pytest.raises(ValueError, match="holds a full model, but this run trains an adapter"):
        restore_weights(other, BASE)
    with pytest.raises(ValueError, match="has lora_alpha 8, but this run has 16"):
        restore_weights(other, folder)
    other.peft_config["default"].lora_alpha = 8
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(part_of(name) != "vision_tower")
    with pytest.raises(ValueError, match="differ in .* parameters, model.vision_tower"):
        restore_weights(other, folder)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("instruct", {"bits": 3}, "--bits is 3; choose 16, 8 or 4"),
        ("instruct", {"bits": 4}, "add --lora_enable True"),
        ("align", {"bits": 8}, "add --lora_enable True"),
        ("instruct", {"lora_r": 8}, "--lora_r is given without --lora_enable True"),
        ("instruct", {"lora_weight_path": "x"}, "--lora_weight_path is given without"),
        ("instruct", {"quant_type": "int4"}, "choose nf4 or fp4"),
        ("instruct", {"lora_enable": True, "quant_type": "fp4"}, "give --bits 4"),
        ("instruct", {"lora_enable": True, "lora_bias": "all"}, "--lora_bias is 'all'"),
        ("instruct", {"lora_enable": True, "lora_r": 0}, "give 1 or more"),
        ("instruct", {"lora_enable": True, "lora_alpha": 0}, "give more than 0"),
        ("instruct", {"lora_enable": True, "lora_dropout": 1}, "from 0 to below 1"),
        ("instruct", {"lora_enable": True, "freeze_backbone": True}, "--freeze_backbone True freezes"),
        ("instruct", {"lora_enable": True, "lora_weight_path": "nowhere"}, "not an adapter folder"),
        ("align", {"lora_enable": True}, "which stage align does not train"),
        ("rglf", {"lora_enable": True}, "which stage rglf does not train"),
    ],
)
def test_refusals(stage: str, flags: dict[str, object], message: str, tmp_path: Path, run_flags: Flags) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(run_flags(tmp_path, stage, **flags))


def test_refusals_about_the_start(adapter: tuple[Path, Any], language_model: Path, tmp_path: Path, run_flags: Flags) -> None:
    folder, _ = adapter
    with pytest.raises(ValueError, match="both name an adapter"):
        parse_arguments(run_flags(tmp_path, "instruct", folder, lora_enable=True, lora_weight_path=folder))
    with pytest.raises(ValueError, match="would replace the projector that came with --model_name_or_path"):
        parse_arguments(run_flags(tmp_path, "instruct", folder, lora_enable=True, pretrain_mm_mlp_adapter=folder))
    with pytest.raises(ValueError, match="an adapter cannot change towers"):
        make_trainer(parse_arguments(run_flags(tmp_path, "instruct", vision_tower=ORACLE / "tiny-clip", **LORA)))
    with pytest.raises(ValueError, match="adds 3 rows to the vocabulary|adds 2 rows to the vocabulary"):
        make_trainer(parse_arguments(run_flags(tmp_path, "instruct", mm_use_im_start_end=True, **LORA)))


def test_zero3_cannot_share_out_quantised_weights(tmp_path: Path, run_flags: Flags) -> None:
    from llava.train.arguments import TrainingArguments, lora_errors

    class ZeRO3:
        def is_zero3(self) -> bool:
            return True

    args = TrainingArguments(output_dir=str(tmp_path), lora_enable=True, bits=8, report_to="none", use_cpu=True)
    args.hf_deepspeed_config = ZeRO3()
    assert [error for error in lora_errors(args, "x", False) if "use a ZeRO-2 configuration" in error]
