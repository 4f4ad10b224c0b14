"""The estimate against hand computed cases, real models, PyTorch's operation counter, and what autograd and Adam really hold."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llava.model import LlavaLlamaForCausalLM
from llava.model.config import LlavaConfig
from llava.model.granularity import granularity_levels
from llava.model.projector import build_projector
from llava.model.router import GranularityRouter
from llava.model.vision_tower import CLIPVisionTower
from llava.train import estimate as est
from llava.train.estimate import EstimateArguments, RouterShape, Step, TowerShape, estimate, measure, read_config
from llava.train.stages import PARTS, STAGES, apply_stage, part_of

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "oracle"
MICRO = ROOT / "playground" / "avg-llava-micro"
GIB = 2**30
TOWER = {"hidden_size": 24, "intermediate_size": 80, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 8}


@pytest.fixture(scope="module")
def vicuna() -> est.ModelShape:
    return measure(read_config(None, "vicuna-7b"))


# --- published numbers


def test_the_numbers_that_everybody_quotes(vicuna: est.ModelShape) -> None:
    assert est.tower_work(vicuna.tower, views=1, layers=24).total == pytest.approx(0.38e12, rel=0.01)
    assert est.tower_work(vicuna.tower, views=1).total == pytest.approx(0.366e12, rel=0.001)  # the last layer is not run
    assert est.language_operations_per_token(vicuna.language) == pytest.approx(12.95e9, rel=1e-3)
    assert est.kv_cache_bytes(vicuna.language, positions=1) == 2**19
    assert vicuna.image_size == (672, 672) and vicuna.views == 5
    assert vicuna.visual_tokens == (192, 384, 744, 1488, 2928)
    assert vicuna.parameters["router"] == pytest.approx(117e6, rel=0.01)
    assert vicuna.router is not None and est.router_work(vicuna.router, views=5).total == pytest.approx(1.35e12, rel=0.01)
    assert vicuna.parameters["llm"] == 6_738_415_616  # Llama 2 7B
    assert vicuna.parameters["vision_tower"] == 303_507_456  # the vision half of openai/clip-vit-large-patch14-336


@pytest.mark.parametrize(("preset", "parameters"), [("vicuna-13b", 13_015_864_320), ("mistral-7b", 7_241_732_096)])
def test_other_presets_have_the_published_parameters(preset: str, parameters: int) -> None:
    assert measure(read_config(None, preset)).parameters["llm"] == parameters


def test_visual_tokens_equal_the_recorded_ones() -> None:
    config = read_config(None, "vicuna-7b")
    config.unpad_rule = "pooled_grid"
    model = est.build_on_meta(config)
    for case in json.loads((ORACLE / "token_counts_real.json").read_text())["cases"]:
        size = tuple(case["size_wh"])
        assert est.number_of_views(config, size) == 1 + case["grid_wh"][0] * case["grid_wh"][1]
        assert list(est.visual_tokens(model, config, size)) == [line["total"] for line in case["by_granularity"].values()]


# --- parameters


@pytest.mark.parametrize("folder", [ORACLE / "checkpoint", MICRO], ids=["recorded", "micro"])
def test_parameters_equal_the_stored_ones(folder: Path) -> None:
    counts = dict.fromkeys(PARTS, 0)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                counts[part_of(name)] += torch.Size(tensors.get_slice(name).get_shape()).numel()
    found = measure(read_config(str(folder), None)).parameters
    buffers = {"vision_tower": sum(buffer.numel() for name, buffer in _stored_buffers(folder))}
    assert found == {part: count - buffers.get(part, 0) for part, count in counts.items() if count}


def _stored_buffers(folder: Path) -> list[tuple[str, Tensor]]:
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found += [(name, tensors.get_tensor(name)) for name in tensors.keys() if name.endswith("position_ids")]
    return found


def test_the_micro_preset_is_the_shipped_model() -> None:
    """If a micro model of another shape is shipped, its shape belongs into `PRESETS`."""
    assert measure(read_config(None, "micro")) == measure(read_config(str(MICRO), None))


def test_no_weights_are_made() -> None:
    model = est.build_on_meta(read_config(None, "vicuna-13b"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_adapters_are_counted_as_peft_makes_them() -> None:
    from peft import LoraConfig, get_peft_model

    config = _tiny_config(layers=2, key_heads=2)
    model = est.build_on_meta(config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = [f"model.layers.{layer}.{kind}.{name}" for layer in range(2) for kind in ("self_attn", "mlp") for name in names]
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=targets))
    real = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert est.lora_parameters(est._language_shape(config), rank=5) == real


# --- operations


def _tiny_config(layers: int, key_heads: int = 4, **changes: Any) -> LlavaConfig:
    fields = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": key_heads, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlavaConfig(**{**fields, **changes})


def _counted(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_language_operations_equal_the_counter(trained: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention keeps its scores, so its backward pass is twice the forward."""
    monkeypatch.setattr(est, "ATTENTION_BACKWARD", 2.0)
    config = _tiny_config(2, key_heads)
    config._attn_implementation = "eager"
    model = LlavaLlamaForCausalLM(config).requires_grad_(trained)
    shape = est._language_shape(config)
    inputs = torch.randn(3, 96, 64, requires_grad=True)
    hidden: list[Tensor] = []

    def forward() -> None:
        hidden.append(model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -10:])
        hidden.append(model.lm_head(hidden[0]))

    work = est.language_work(shape, [96] * 3) + est.head_work(shape, 30)
    assert _counted(forward) == pytest.approx(work.total, rel=2e-3)
    assert _counted(lambda: hidden[1].sum().backward()) == pytest.approx(est.backward_operations(work, trained), rel=2e-3)


def test_tower_and_projector_operations_equal_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real widths on the meta device, fewer layers."""
    monkeypatch.setattr(est, "ATTENTION_BACKWARD", 2.0)
    config = read_config(None, "vicuna-7b")
    config.vision_config = {**config.vision_config, "num_hidden_layers": 4}
    config.num_hidden_layers = 1
    model, shape = est.build_on_meta(config), measure(config)
    model.get_vision_tower().vision_tower.vision_model.set_attn_implementation("eager")
    features: list[Tensor] = []
    tower = est.tower_work(shape.tower, views=2)
    assert _counted(lambda: features.append(model.get_vision_tower()(torch.empty(2, 3, 336, 336, device="meta")))) == tower.total
    assert _counted(lambda: features[0].sum().backward()) == pytest.approx(est.backward_operations(tower, True), rel=0.01)
    projector = est.projector_work(shape.projector, 2 * 576)
    for tower_learns in (True, False):
        inputs = torch.empty(2, 576, 1024, device="meta", requires_grad=tower_learns)
        assert _counted(lambda inputs=inputs: features.append(model.model.mm_projector(inputs))) == projector.total  # type: ignore[misc]
        backward = _counted(lambda: features.pop().sum().backward())
        assert backward == est._projector_backward(shape, projector, tower_learns)


@pytest.mark.parametrize("narrow", [None, 32], ids=["released", "narrow"])
def test_router_operations_equal_the_counter(narrow: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(est, "ATTENTION_BACKWARD", 2.0)
    config = read_config(None, "vicuna-7b")
    config.router_hidden_size, config.num_hidden_layers = narrow, 1
    shape = measure(config).router
    assert shape is not None
    router = est.build_on_meta(config).model.router
    logits: list[Tensor] = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        features, text = torch.empty(1, 5, 576, 4096, device="meta"), torch.empty(1, 32, 4096, device="meta")
        forward = _counted(lambda: logits.append(_route(router, features, text)))
        backward = _counted(lambda: logits[0].sum().backward())
    work = est.router_work(shape, views=5)
    assert forward == pytest.approx(work.total, rel=0.01)
    assert backward == pytest.approx(est.router_backward_operations(shape, views=5), rel=0.01)


def _route(router: Any, features: Tensor, text: Tensor) -> Tensor:
    return router(features, text)


def test_operations_of_the_stages(vicuna: est.ModelShape) -> None:
    """By hand: each stage runs each part as often as its table says."""
    step = Step(rows=2, text_tokens=100, answer_tokens=40)
    lines = {name: est.step_operations(vicuna, stage, step) for name, stage in STAGES.items()}
    per_token = 12.952e9
    finest, total = 2928 + 100, sum(vicuna.visual_tokens) + 500
    attention = {length: 4 * length**2 * 4096 * 32 for length in (tokens + 100 for tokens in vicuna.visual_tokens)}
    head = 2 * 4096 * 32000 * 40
    assert lines["instruct"].language_forward == pytest.approx(2 * (finest * per_token + attention[finest] + head), rel=1e-3)
    stage3 = 2 * (total * per_token + sum(attention.values()) + 5 * head)
    assert lines["multi_granularity"].language_forward == pytest.approx(stage3, rel=1e-3)
    assert lines["rglf"].language_forward == lines["multi_granularity"].language_forward
    assert lines["rglf"].language_backward == lines["rglf"].vision_backward == lines["align"].vision_backward == 0
    assert lines["align"].language_backward < lines["instruct"].language_backward
    assert {line.vision_forward for line in lines.values()} == {est.tower_work(vicuna.tower, 10).total}  # once a step in every stage
    assert lines["rglf"].router_backward > 0 == lines["instruct"].router_forward
    offline = est.step_operations(vicuna, STAGES["rglf"], step, offline=True)
    assert offline.language_forward == 0 and offline.total < 0.2 * lines["rglf"].total
    again = est.step_operations(vicuna, STAGES["instruct"], dataclasses.replace(step, checkpointing=True))
    assert again.recomputed == pytest.approx(again.language_forward + again.vision_forward, rel=0.01)
    adapted = est.step_operations(vicuna, STAGES["instruct"], dataclasses.replace(step, lora_rank=64))
    assert lines["align"].language_backward < adapted.language_backward < lines["instruct"].language_backward


# --- memory: what autograd keeps

PRECISIONS = {
    "fp32": (torch.float32, False, est.precision_of("fp32", "0")),
    "bf16": (torch.bfloat16, False, est.precision_of("bf16", "3")),
    "autocast": (torch.float32, True, est.precision_of("bf16", "0")),
}


def _kept(module: nn.Module, run: Callable[[], Any], autocast: bool) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, parameters and their 16-bit copies aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    shapes = {tuple(parameter.shape) for parameter in module.parameters() if parameter.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no later storage gets the same address
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", list(PRECISIONS))
def test_a_language_layer_keeps_what_the_formula_says(name: str, trained: bool, key_heads: int) -> None:
    dtype, autocast, precision = PRECISIONS[name]
    kept = []
    for layers in (1, 3):
        config = _tiny_config(layers, key_heads)
        config._attn_implementation = "sdpa"
        model = LlavaLlamaForCausalLM(config).to(dtype).train().requires_grad_(trained)
        inputs = torch.randn(1, 256, 64, dtype=dtype, requires_grad=True)
        kept.append(_kept(model, lambda model=model, inputs=inputs: model.model(inputs_embeds=inputs, use_cache=False), autocast))  # type: ignore[misc]
    per_position = (kept[1] - kept[0]) / 2 / 256
    assert per_position == pytest.approx(est.language_layer_kept(est._language_shape(config), precision, trained), rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    kept = []
    for layers in (2, 4):
        model = LlavaLlamaForCausalLM(_tiny_config(layers)).train()
        model.gradient_checkpointing_enable()
        inputs = torch.randn(1, 256, 64, requires_grad=True)
        kept.append(_kept(model, lambda model=model, inputs=inputs: model.model(inputs_embeds=inputs, use_cache=False), False))  # type: ignore[misc]
    assert (kept[1] - kept[0]) / 2 / 256 == pytest.approx(est.layers_kept(1, 0, 4 * 64, True), rel=0.01)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_a_tower_layer_keeps_what_the_formula_says(name: str) -> None:
    dtype, autocast, precision = PRECISIONS[name]
    kept = []
    for layers in (1, 3):
        tower = CLIPVisionTower({**TOWER, "num_hidden_layers": layers}, select_layer=-1).to(dtype).train()
        kept.append(_kept(tower, lambda tower=tower: tower(torch.randn(8, 3, 32, 32)), autocast))  # type: ignore[misc]
    shape = TowerShape(layers=1, hidden=24, feed_forward=80, heads=4, patches=16, patch_inputs=192)
    assert (kept[1] - kept[0]) / 2 / (8 * 17) == pytest.approx(est.tower_layer_kept(shape, precision), rel=0.01)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_projector_and_router_keep_what_the_formulas_say(name: str) -> None:
    dtype, autocast, precision = PRECISIONS[name]
    projector = build_projector("mlp2x_gelu", 24, 64).to(dtype)
    inputs = torch.randn(500, 24, dtype=dtype)
    kept = _kept(projector, lambda: projector(inputs), autocast)
    assert kept / 500 == pytest.approx(est.projector_kept([(24, 64), (64, 64)], precision), rel=0.01)
    levels = granularity_levels((4, 4), [4, 8, 16])
    router = GranularityRouter(64, (4, 4), levels, 6, "views", dropout=0.0).to(dtype).train()
    features, text = torch.randn(8, 5, 16, 64, dtype=dtype), torch.randn(8, 6, 64, dtype=dtype)
    kept = _kept(router, lambda: _route(router, features, text), autocast)
    shape = RouterShape(64, 64, 34, 6, 16, 3, reduces=False, dropout=False)
    assert kept / (8 * 5 * 34) == pytest.approx(est.router_kept(shape, precision), rel=0.06)


def test_logits_are_counted_where_they_are_learnt_from() -> None:
    precision = est.precision_of("bf16", "2")
    head = nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    logits = head(hidden)
    as_float = logits.float()
    log_softmax = as_float.log_softmax(-1)
    assert sum(tensor.nbytes for tensor in (logits, as_float, log_softmax)) == est.logits_bytes(50, 100, precision)


# --- memory: weights, gradients, optimizer


def test_adam_holds_sixteen_bytes_per_parameter() -> None:
    """Measured on tensors: float32 with Adam, and 16-bit weights beside a float32 copy that Adam updates."""
    model = LlavaLlamaForCausalLM(_tiny_config(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model.model(input_ids=torch.arange(8)[None], use_cache=False).last_hidden_state.sum().backward()
    (model.lm_head.weight.sum()).backward()
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    averages = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    held = sum(parameter.nbytes + parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None) + averages
    assert held == count * est.precision_of("fp32", "0").states == 16 * count
    mixed = est.precision_of("bf16", "2")
    halves = [parameter.detach().bfloat16() for parameter in model.parameters()]
    copies = [parameter.detach().float() for parameter in halves]
    assert sum(2 * half.nbytes for half in halves) + sum(copy.nbytes for copy in copies) + averages == count * mixed.states
    assert mixed.states == est.precision_of("fp16", "3").states == 16


def test_zero_divides_what_its_paper_says(vicuna: est.ModelShape) -> None:
    """By hand for Vicuna-7B on 8 GPUs: 7.18 G weights of which 7.06 G train; activations do not depend on the setting."""
    step, stage = Step(rows=1, text_tokens=64, answer_tokens=32), STAGES["instruct"]
    total, trained = 7_180_414_091, 6_738_415_616 + 20_979_712 + 4_096 + 303_507_456
    zero, two, three, offload = (est.memory(vicuna, stage, step, name, "bf16", 8) for name in est.ZERO_SETTINGS)
    assert (zero.weights, zero.gradients, zero.optimizer) == (4 * total, 4 * trained, 8 * trained)
    assert (two.weights, two.gradients, two.optimizer) == (2 * total, 2 * trained / 8, 12 * trained / 8)
    assert (three.weights, three.gradients, three.optimizer) == (2 * total / 8, 2 * trained / 8, 12 * trained / 8)
    assert (offload.weights, offload.gradients, offload.optimizer) == (0, 0, 0)
    assert offload.host == 2 * total + 16 * trained
    assert two.activations == three.activations == offload.activations < zero.activations
    assert zero.total > two.total > three.total > offload.total
    assert three.buffers - two.buffers == 2 * 10**9  # at most a thousand million gathered weights
    alone = est.memory(vicuna, stage, step, "3", "bf16", 1)
    assert alone.weights + alone.gradients + alone.optimizer == 2 * total + 14 * trained


def test_activations_of_a_known_case(vicuna: est.ModelShape) -> None:
    """By hand: one row of 3,000 positions in bf16 keeps (24 * 4096 + 8 * 11008 + 136) bytes per position and layer."""
    assert est.language_layer_kept(vicuna.language, est.precision_of("bf16", "3"), trained=True) == 24 * 4096 + 8 * 11008 + 136
    step, stage = Step(rows=1, text_tokens=72, answer_tokens=0), STAGES["instruct"]
    precision = est.precision_of("bf16", "3")
    whole = est.activation_bytes(vicuna, stage, step, precision)
    language = 3000 * 32 * (24 * 4096 + 8 * 11008 + 136)
    tower = 5 * 577 * 23 * (16 * 1024 + 6 * 4096 + 80)
    assert language + tower < whole < 1.05 * (language + tower)
    again = est.activation_bytes(vicuna, stage, dataclasses.replace(step, checkpointing=True), precision)
    assert again < 0.15 * whole
    frozen = est.activation_bytes(vicuna, STAGES["align"], step, precision)
    ranking = est.activation_bytes(vicuna, STAGES["rglf"], step, precision)
    assert ranking < frozen < whole


def test_adapters_and_quantised_weights_save_memory(vicuna: est.ModelShape) -> None:
    stage, step = STAGES["instruct"], Step(rows=1, text_tokens=64, answer_tokens=32, checkpointing=True)
    whole = est.memory(vicuna, stage, step, "2", "bf16", 1)
    adapted = est.memory(vicuna, stage, dataclasses.replace(step, lora_rank=128), "2", "bf16", 1)
    packed = est.memory(vicuna, stage, dataclasses.replace(step, lora_rank=128, bits=4), "2", "bf16", 1)
    assert packed.total < adapted.total < whole.total
    alone = [est.weight_bytes(vicuna, stage, dataclasses.replace(step, lora_rank=8), est.precision_of("bf16", zero)) for zero in "02"]
    adapters, others = est.lora_parameters(vicuna.language, 8), 7_180_414_091 - 6_738_415_616
    assert alone == [2 * 6_738_415_616 + 4 * (others + adapters), 2 * (7_180_414_091 + adapters)]
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert adapted.weights - packed.weights == pytest.approx(matrices * (2 - 4.127 / 8))


# --- the program


def test_largest_batch_is_the_last_that_fits(vicuna: est.ModelShape) -> None:
    stage, step = STAGES["multi_granularity"], Step(1, 256, 256, checkpointing=True)
    most = est.largest_batch(vicuna, stage, step, "3", "bf16", 8, 80 * GIB)
    needed = [est.memory(vicuna, stage, dataclasses.replace(step, rows=most + more), "3", "bf16", 8).total for more in (0, 1)]
    assert [est.verdict(total, 80 * GIB) for total in needed] == ["fits", "tight"]
    assert est.verdict(81 * GIB, 80 * GIB) == "no"
    assert est.largest_batch(vicuna, stage, step, "0", "bf16", 8, 80 * GIB) == 0


def test_the_stages_of_a_model_with_one_granularity() -> None:
    config = read_config(None, "vicuna-7b")
    config.vis_token_granularity, config.router_select = None, False
    shape = measure(config)
    assert set(shape.trained) == {"align", "instruct"} and shape.levels == (576,) and shape.router is None


def test_trained_parts_are_the_trainers() -> None:
    config = read_config(str(ORACLE / "checkpoint"), None)
    model = est.build_on_meta(config)
    result = estimate(EstimateArguments(model_name_or_path=str(ORACLE / "checkpoint")))
    for stage in STAGES.values():
        assert result.trained_parameters[stage.name] == sum(line.trainable for line in apply_stage(model, stage))


def test_command_line_writes_tables_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "estimate.json"
    command = ["estimate", "--model_name_or_path", str(MICRO), "--stage", "rglf", "--image_size", "128x64", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    est.main()
    text = capsys.readouterr().out
    assert "Picture 128x64 (3 views)" in text and "computed from shapes, not measured" in text
    assert all(f"ZeRO {name}" in text for name in est.ZERO_SETTINGS) and "rglf, scored before" in text
    stored = json.loads(file.read_text())
    assert stored["settings"]["image_size"] == [128, 64] and set(stored["memory"]) == set(est.ZERO_SETTINGS)
    assert [line["tokens_per_view"] for line in stored["granularities"]] == [4, 8, 16, 32, 64]
    assert set(stored["operations"]) == {*STAGES, "rglf, scored before"}
    monkeypatch.setattr(sys, "argv", ["estimate", "--preset", "vicuna"])
    with pytest.raises(SystemExit, match="estimate stopped: --preset is 'vicuna'; choose one of vicuna-7b"):
        est.main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stage": "rank"}, "--stage is 'rank'"),
        ({"dtype": "int8"}, "--dtype is 'int8'"),
        ({"zero": "1"}, "--zero is '1'"),
        ({"bits": 4}, "--bits 4: quantised weights cannot be trained in stage multi_granularity; give --lora_r"),
        ({"bits": 4, "lora_r": 8, "zero": "3"}, "quantised weights are not divided"),
        ({"lora_r": 8, "stage": "rglf"}, "stage rglf does not train the language model"),
        ({"answer_tokens": 300}, "--answer_tokens is 300"),
        ({"num_gpus": 0}, "--num_gpus is 0"),
        ({"image_size": "672"}, "--image_size is '672'"),
        ({"model_name_or_path": "here"}, "either --model_name_or_path or --preset"),
    ],
)
def test_flags_that_cannot_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(EstimateArguments(**{"preset": "micro", **flags}))


def test_quantised_runs_list_only_what_can_be() -> None:
    result = estimate(EstimateArguments(preset="micro", lora_r=8, bits=4))
    assert list(result.memory) == ["0", "2"]
