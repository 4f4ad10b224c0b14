"""Costs against published numbers, hand computed cases, PyTorch's operation counter, and what autograd and Adam really hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llava.model import LlavaLlamaForCausalLM
from llava.model.adapter import attach_adapter
from llava.model.config import LlavaConfig
from llava.model.granularity import granularity_levels
from llava.model.memory import kv_cache_bytes
from llava.model.projector import build_projector
from llava.model.router import GranularityRouter
from llava.model.vision_tower import CLIPVisionTower
from llava.train import costs
from llava.train.build import model_outline, read_model_config
from llava.train.costs import Step
from llava.train.estimation import largest_canvas, preset_config
from llava.train.flags import ZERO_SETTINGS
from llava.train.lora import new_lora_config
from llava.train.losses import tokens_at_once
from llava.train.stages import STAGES, PartSummary, apply_stage

ORACLE = Path(__file__).parents[1] / "oracle"
GIB = 2**30
TOWER = {"hidden_size": 24, "intermediate_size": 80, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 8}
CANVAS = (672, 672)


@pytest.fixture(scope="module")
def vicuna() -> Any:
    return model_outline(preset_config("vicuna-7b"))


def parts_of(model: Any, stage: str = "instruct") -> list[PartSummary]:
    return apply_stage(model, STAGES[stage])


def needs(model: Any, step: Step, zero: str, gpus: int = 8, stage: str = "instruct") -> costs.Memory:
    return costs.memory(model, parts_of(model, stage), STAGES[stage], step, zero, "bf16", gpus)


UNREAD = 12_596_224 + 2_048
"""Of ViT-L: its last layer, behind the selected one, and the norm after it; no stage trains them."""


# --- published numbers


def test_the_numbers_that_everybody_quotes(vicuna: Any) -> None:
    parameters = {part.part: part.parameters for part in parts_of(vicuna)}
    assert parameters["router"] == pytest.approx(117e6, rel=0.01)
    assert parameters["llm"] == 6_738_415_616  # Llama 2 7B
    assert parameters["vision_tower"] == 303_507_456  # the vision half of openai/clip-vit-large-patch14-336
    assert kv_cache_bytes(vicuna.config, positions=1) == 2**19
    assert 2 * costs.language_matrices(vicuna) == pytest.approx(12.95e9, rel=1e-3)  # operations per token
    assert largest_canvas(vicuna.config) == CANVAS == (672, 672)
    load = costs.workload(vicuna, STAGES["align"], Step(1, 0, 0, CANVAS))
    assert load.views == 5 and load.visual_tokens == (192, 384, 744, 1488, 2928) == load.lengths and load.levels == (4,)


def test_a_view_costs_the_tower_what_everybody_quotes() -> None:
    tower = short_vicuna(layers=1).get_vision_tower()
    with FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, 336, 336, device="meta"))
    assert tower.num_layers_used == 23 and counter.get_total_flops() == pytest.approx(0.366e12, rel=1e-3)
    assert counter.get_total_flops() * 24 / 23 == pytest.approx(0.38e12, rel=0.01)  # with the last layer, which is not run


# --- operations


def _tiny_config(layers: int, key_heads: int = 4, **changes: Any) -> LlavaConfig:
    fields = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": key_heads, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlavaConfig(**{**fields, **changes})


def test_operations_on_meta_equal_those_of_a_real_step() -> None:
    """The recorded model with real tensors: tower, projector and every granularity, forward and backward."""
    config = read_model_config(str(ORACLE / "checkpoint"))
    real = LlavaLlamaForCausalLM.from_pretrained(str(ORACLE / "checkpoint"), dtype=torch.float32)
    real.set_attn_implementation("eager")
    step = Step(1, 20, 8, (96, 96))
    for model in (real, outline := model_outline(config)):
        apply_stage(model, STAGES["multi_granularity"])
    found = costs.count_operations(outline, STAGES["multi_granularity"], step)
    load = costs.workload(real, STAGES["multi_granularity"], step)
    with FlopCounterMode(display=False) as forward:
        features = real.encode_views([torch.zeros(load.views, 3, 48, 48)])[0]
        inputs = [torch.zeros(1, length, config.hidden_size) + features.sum() for length in load.lengths]
        hidden = [real.model(inputs_embeds=each, use_cache=False)[0] for each in inputs]
        total = torch.stack([real.lm_head(each[:, :8]).sum() for each in hidden]).sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    assert found.vision + sum(found.language) == forward.get_total_flops()
    assert found.backward == backward.get_total_flops() and found.router == found.recomputed == 0


def short_vicuna(layers: int = 2) -> Any:
    config = preset_config("vicuna-7b")
    config.num_hidden_layers = layers
    return model_outline(config)


def test_operations_of_the_stages() -> None:
    """By hand, for two layers: each stage runs each part as often as its table says."""
    model, step = short_vicuna(), Step(1, 100, 40, CANVAS)
    lines = {name: costs.count_operations(model, stage, step) for name, stage in STAGES.items() if parts_of(model, name)}
    lengths = [tokens + 100 for tokens in (192, 384, 744, 1488, 2928)]
    by_hand = [length * 2 * 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * length**2 * 4096 * 2 + 2 * 4096 * 32000 * 40 for length in lengths]
    for line in lines.values():
        assert line.language == pytest.approx(by_hand, rel=1e-3)
        assert line.vision == pytest.approx(5 * (0.366e12 + 2 * 576 * (1024 + 4096) * 4096), rel=1e-3)  # once in every stage
    assert lines["rglf"].router == pytest.approx(1.35e12, rel=0.01) and lines["instruct"].router == 0
    assert lines["rglf"].backward == pytest.approx(2.12e12, rel=0.01)
    forward, finest = lines["instruct"].vision + by_hand[-1], lengths[-1]
    assert lines["instruct"].backward == pytest.approx(2 * forward, rel=0.02)
    # stage 1: frozen matrices pass gradients on, attention twice; of the projector the first matrix needs no gradient of its input
    passed = by_hand[-1] + 4 * finest**2 * 4096 * 2 + 5 * 2 * 576 * (1024 + 2 * 4096) * 4096
    assert lines["align"].backward == pytest.approx(passed, rel=1e-3) and lines["align"].backward < lines["instruct"].backward
    again = costs.count_operations(model, STAGES["rglf"], dataclasses.replace(step, checkpointing=True))
    assert again.recomputed == 0


def test_checkpointing_and_adapters_change_the_operations() -> None:
    model, stage, step = short_vicuna(), STAGES["instruct"], Step(1, 100, 40, CANVAS, checkpointing=True)
    apply_stage(model, STAGES["align"])
    frozen = costs.count_operations(model, STAGES["align"], step)
    apply_stage(model, stage)
    whole = costs.count_operations(model, stage, step)
    assert whole.recomputed == pytest.approx(whole.vision + whole.language[-1], rel=0.05)
    attach_adapter(model, new_lora_config(model, 64, 16, 0.05), torch.bfloat16)
    apply_stage(model, stage)
    adapted = costs.count_operations(model, stage, step)
    assert frozen.backward < adapted.backward < whole.backward and adapted.language[-1] == pytest.approx(whole.language[-1], rel=0.05)


# --- memory: what autograd keeps

PRECISIONS = {
    "fp32": (torch.float32, False, costs.precision_of("fp32", "0")),
    "bf16": (torch.bfloat16, False, costs.precision_of("bf16", "3")),
    "autocast": (torch.float32, True, costs.precision_of("bf16", "0")),
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
    assert per_position == pytest.approx(costs.language_layer_kept(config, precision, trained), rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    kept = []
    for layers in (2, 4):
        model = LlavaLlamaForCausalLM(_tiny_config(layers)).train()
        model.gradient_checkpointing_enable()
        inputs = torch.randn(1, 256, 64, requires_grad=True)
        kept.append(_kept(model, lambda model=model, inputs=inputs: model.model(inputs_embeds=inputs, use_cache=False), False))  # type: ignore[misc]
    assert (kept[1] - kept[0]) / 2 / 256 == pytest.approx(costs.layers_kept(1, 0, 4 * 64, True), rel=0.01)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_a_tower_layer_keeps_what_the_formula_says(name: str) -> None:
    dtype, autocast, precision = PRECISIONS[name]
    kept = []
    for layers in (1, 3):
        tower = CLIPVisionTower({**TOWER, "num_hidden_layers": layers}, select_layer=-1).to(dtype).train()
        kept.append(_kept(tower, lambda tower=tower: tower(torch.randn(8, 3, 32, 32)), autocast))  # type: ignore[misc]
    assert (kept[1] - kept[0]) / 2 / (8 * 17) == pytest.approx(costs.tower_layer_kept(TOWER, precision), rel=0.01)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_projector_and_router_keep_what_the_formulas_say(name: str) -> None:
    dtype, autocast, precision = PRECISIONS[name]
    projector = build_projector("mlp2x_gelu", 24, 64).to(dtype)
    inputs = torch.randn(500, 24, dtype=dtype)
    kept = _kept(projector, lambda: projector(inputs), autocast)
    assert kept / 500 == pytest.approx(costs.projector_kept([(24, 64), (64, 64)], precision), rel=0.01)
    levels = granularity_levels((4, 4), [4, 8, 16])
    router = GranularityRouter(64, (4, 4), levels, 6, "views", dropout=0.0).to(dtype).train()
    features, text = torch.randn(8, 5, 16, 64, dtype=dtype), torch.randn(8, 6, 64, dtype=dtype)
    kept = _kept(router, lambda: router(features, text), autocast)
    assert kept / (8 * 5 * 34) == pytest.approx(costs.router_kept(64, 0.0, precision), rel=0.06)


def test_logits_are_counted_where_they_are_supervised(vicuna: Any) -> None:
    head = nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)
    logits = head(torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True))
    as_float = logits.float()
    kept = sum(tensor.nbytes for tensor in (logits, as_float, as_float.log_softmax(-1)))
    assert needs(vicuna, Step(5, 20, 10, CANVAS), "2").logits == kept * 32000 / 100
    at_once = tokens_at_once(32000)
    assert needs(vicuna, Step(5, 20, 10 * at_once, CANVAS), "2").logits == kept / 50 / 100 * 32000 * at_once


# --- memory: weights, gradients, optimizer


def _states(precision: costs.Precision) -> int:
    return precision.weight + precision.gradient + precision.optimizer


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
    assert held == count * _states(costs.precision_of("fp32", "0")) == 16 * count
    mixed = costs.precision_of("bf16", "2")
    halves = [parameter.detach().bfloat16() for parameter in model.parameters()]
    copies = [parameter.detach().float() for parameter in halves]
    assert sum(2 * half.nbytes for half in halves) + sum(copy.nbytes for copy in copies) + averages == count * _states(mixed)
    assert _states(mixed) == _states(costs.precision_of("fp16", "3")) == 16


def test_zero_divides_what_its_paper_says(vicuna: Any) -> None:
    """By hand for Vicuna-7B on 8 GPUs: 7.18 G weights of which 7.06 G train; activations do not depend on the setting."""
    step = Step(1, 64, 32, CANVAS)
    total, trained = 7_180_414_091, 6_738_415_616 + 20_979_712 + 4_096 + 303_507_456 - UNREAD
    zero, two, three, offload = (needs(vicuna, step, name) for name in ZERO_SETTINGS)
    assert (zero.weights, zero.gradients, zero.optimizer) == (4 * total, 4 * trained, 8 * trained)
    assert (two.weights, two.gradients, two.optimizer) == (2 * total, 2 * trained / 8, 12 * trained / 8)
    assert (three.weights, three.gradients, three.optimizer) == (2 * total / 8, 2 * trained / 8, 12 * trained / 8)
    assert (offload.weights, offload.gradients, offload.optimizer) == (0, 0, 0)
    assert offload.host == 2 * total + 16 * trained
    assert two.activations == three.activations == offload.activations < zero.activations
    assert zero.total > two.total > three.total > offload.total
    assert three.buffers - two.buffers == 2 * 10**9  # at most a thousand million gathered weights
    alone = needs(vicuna, step, "3", gpus=1)
    assert alone.weights + alone.gradients + alone.optimizer == 2 * total + 14 * trained


def test_activations_of_a_known_case(vicuna: Any) -> None:
    """By hand: one row of 3,000 positions in bf16 keeps (24 * 4096 + 8 * 11008 + 136) bytes per position and layer."""
    precision = costs.precision_of("bf16", "3")
    assert costs.language_layer_kept(vicuna.config, precision, trained=True) == 24 * 4096 + 8 * 11008 + 136
    step = Step(1, 72, 0, CANVAS)
    whole = costs.activation_bytes(vicuna, STAGES["instruct"], step, precision)
    language = 3000 * 32 * (24 * 4096 + 8 * 11008 + 136)
    tower = 5 * 577 * 23 * (16 * 1024 + 6 * 4096 + 80)
    assert language + tower < whole < 1.05 * (language + tower)
    again = costs.activation_bytes(vicuna, STAGES["instruct"], dataclasses.replace(step, checkpointing=True), precision)
    assert again < 0.15 * whole
    frozen, ranking = (costs.activation_bytes(vicuna, STAGES[stage], step, precision) for stage in ("align", "rglf"))
    assert ranking < frozen < whole


def test_adapters_and_quantised_weights_save_memory() -> None:
    model, step = model_outline(preset_config("vicuna-7b")), Step(1, 64, 32, CANVAS, checkpointing=True)
    whole = needs(model, step, "2", gpus=1)
    attach_adapter(model, new_lora_config(model, 8, 16, 0.05), torch.bfloat16)
    adapted = needs(model, dataclasses.replace(step, lora_rank=8), "2", gpus=1)
    packed = needs(model, dataclasses.replace(step, lora_rank=8, bits=4), "2", gpus=1)
    assert packed.total < adapted.total < whole.total
    adapters, others = 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)), 7_180_414_091 - 6_738_415_616
    assert adapted.weights == 2 * (7_180_414_091 + adapters) and adapted.optimizer == 12 * (adapters + others - UNREAD - 117_507_211)
    plain = needs(model, dataclasses.replace(step, lora_rank=8), "0", gpus=1)
    assert plain.weights == 2 * 6_738_415_616 + 4 * (others + adapters)
    assert adapted.weights - packed.weights == pytest.approx(32 * (4 * 4096**2 + 3 * 4096 * 11008) * (2 - 4.127 / 8))


# --- what fits


def test_largest_batch_is_the_last_that_fits(vicuna: Any) -> None:
    step = Step(1, 256, 256, CANVAS, checkpointing=True)

    def of_rows(zero: str) -> Callable[[int], costs.Memory]:
        return lambda rows: needs(vicuna, dataclasses.replace(step, rows=rows), zero, stage="multi_granularity")

    most = costs.largest_batch(of_rows("3"), 80 * GIB)
    assert [costs.verdict(of_rows("3")(most + more).total, 80 * GIB) for more in (0, 1)] == ["fits", "tight"] and most == 13
    assert costs.verdict(81 * GIB, 80 * GIB) == "no"
    assert costs.largest_batch(of_rows("0"), 80 * GIB) == 0
