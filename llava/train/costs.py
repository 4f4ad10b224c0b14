"""What a training step costs: operations, counted by PyTorch on a model without storage, and GPU memory, computed from shapes.

Operations are those of matrix products, attention included, as `torch.utils.flop_counter` counts them (one multiply-add is two) while the
model's own modules run on the meta device. Memory follows the formulas below, which the tests hold against what autograd keeps at toy
size; no figure for a whole GPU was measured on one. Padding and the allocator's fragmentation are in no formula.

Legend: C views of an image, L positions of a row, D width, F feed-forward width, P patches of a view.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llava.model.memory import head_width
from llava.model.memory import weight_bytes as stored_bytes
from llava.train.losses import tokens_at_once
from llava.train.rows import num_views, visual_token_costs
from llava.train.stages import PartSummary, Stage

GIB = 2**30

MAX_LIVE_PARAMETERS = 10**9
"""`stage3_max_live_parameters` of `scripts/zero3.json`: how many gathered weights ZeRO-3 may hold at a time."""

RESERVED_BYTES = int(1.5 * GIB)
"""Assumed for the CUDA context, its libraries and NCCL on every GPU."""

TIGHT_SHARE = 0.9
"""Above this share of the GPU a setting counts as tight."""


@dataclass(frozen=True)
class Step:
    """What one process does in a step.

    Attributes:
        rows: rows of the batch, each with one image.
        text_tokens: text positions of a row.
        answer_tokens: how many of them are supervised.
        image_size: (width, height) of the image.
        checkpointing: layers are run again in the backward pass instead of kept.
        lora_rank: of an adapter on the language model; 0 for none.
        bits: of the language model's matrices: 16 (not quantised), 8 or 4.
    """

    rows: int
    text_tokens: int
    answer_tokens: int
    image_size: tuple[int, int]
    checkpointing: bool = False
    lora_rank: int = 0
    bits: int = 16


@dataclass(frozen=True)
class Workload:
    """What a model has to process in a step of a stage.

    Attributes:
        views: C of the image.
        visual_tokens: of the image at every granularity, coarse to fine.
        levels: indices of the granularities that the stage runs: all where it compares them, otherwise the finest.
        lengths: L of a row at every granularity.
    """

    views: int
    visual_tokens: tuple[int, ...]
    levels: tuple[int, ...]
    lengths: tuple[int, ...]


def workload(model: Any, stage: Stage, step: Step) -> Workload:
    """What the model processes in this step."""
    visual = tuple(visual_token_costs(model, step.image_size))
    levels = tuple(range(len(visual))) if stage.needs_granularities else (len(visual) - 1,)
    return Workload(num_views(model.config, step.image_size), visual, levels, tuple(tokens + step.text_tokens for tokens in visual))


# ---- operations


@dataclass(frozen=True)
class Operations:
    """Operations of one row in a step.

    Attributes:
        vision: forward, tower and projector.
        language: forward at every granularity, vocabulary logits of the supervised positions included.
        router: forward, where the stage trains it.
        backward: of all that trains and all that gradients pass through.
        recomputed: what checkpointing runs a second time.
    """

    vision: float
    language: tuple[float, ...]
    router: float
    backward: float
    recomputed: float


def count_operations(model: Any, stage: Stage, step: Step) -> Operations:
    """Run one row of a stage on the meta device and count.

    Attention runs eagerly, whose backward pass is twice its forward; a kernel that recomputes the scores (flash attention) spends half
    a forward pass more on it (Dao et al. 2022, arXiv 2205.14135, algorithm 4). Causal kernels skip up to half of the square counted here.

    Args:
        model: on the meta device, after `apply_stage`.
    """
    load, config = workload(model, stage, step), model.config
    model.set_attn_implementation("eager")
    ranks = stage.loss == "rglf"
    side, width = config.view_side, config.get_text_config().hidden_size
    tower, features = _counted(model.get_vision_tower(), _meta(load.views, 3, side, side))
    projector, projected = _counted(model.model.mm_projector, features)
    language, layers_of_stage, losses = [], 0.0, []
    for index, length in enumerate(load.lengths):
        runs = index in load.levels
        with torch.set_grad_enabled(runs and not ranks):
            inputs = _meta(1, length, width) + projected.sum()
            mask = _meta(1, 1, length, length)  # used as it is; without one, positions would be inspected, which meta tensors do not have
            layers, output = _counted(model.model, inputs_embeds=inputs, attention_mask=mask, use_cache=False)
            hidden = output.last_hidden_state
            head, logits = _counted(model.lm_head, hidden[:, : step.answer_tokens])
        language.append(layers + head)
        if runs:
            layers_of_stage += layers
            losses.append(logits.sum() if step.answer_tokens else hidden.sum())
    router = 0.0
    if ranks:
        text = _meta(1, config.filtered_text_num, width)
        router, choice = _counted(model.model.router, projected[None], text)
        losses = [choice.sum()]
    tower_trains = any(parameter.requires_grad for parameter in model.get_vision_tower().parameters())
    recomputed = (layers_of_stage + tower_trains * tower) if step.checkpointing and not ranks else 0.0
    backward, _ = _counted(torch.stack(losses).sum().backward)
    model.zero_grad(set_to_none=True)
    return Operations(tower + projector, tuple(language), router, backward, recomputed)


def _counted(call: Callable[..., Any], *inputs: Any, **named: Any) -> tuple[float, Any]:
    """Operations of a call, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = call(*inputs, **named)
    return float(counter.get_total_flops()), result


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


# ---- memory


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Attributes:
        weight, gradient: of a weight and its gradient.
        optimizer: of Adam's two averages, and of the float32 copy of 16-bit weights.
        compute: of the operands of matrix products.
        residual: of the residual stream between layers.
        casts: autocast makes 16-bit copies of float32 weights and inputs, one per matrix that reads them.
    """

    weight: int
    gradient: int
    optimizer: int
    compute: int
    residual: int
    casts: bool


def precision_of(dtype: str, zero: str) -> Precision:
    """How a run holds its numbers.

    DeepSpeed holds 16-bit weights and gradients beside float32 weights and averages: 2 + 2 + 12 bytes (Rajbhandari et
    al. 2020, arXiv 1910.02054, section 3.1). Without it weights, gradients and averages are float32, 4 + 4 + 8, and
    autocast makes 16-bit copies. In float32 ZeRO-2 and offloading copy the weights, ZeRO-3 uses them as they are.
    """
    if dtype == "fp32":
        return Precision(4, 4, 12 if zero in ("2", "3-offload") else 8, 4, 4, False)
    if zero == "0":
        return Precision(4, 4, 8, 2, 4, True)
    return Precision(2, 2, 12, 2, 2, False)


def linears(module: nn.Module) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a module, those of an adapter aside."""
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and ".lora_" not in name]
    return [(layer.in_features, layer.out_features) for _, layer in found]


def language_matrices(model: Any) -> int:
    """Weights of the matrices in the language model's layers, which are what is quantised."""
    return model.config.get_text_config().num_hidden_layers * sum(inputs * outputs for inputs, outputs in linears(model.model.layers[0]))


def language_layer_kept(config: Any, precision: Precision, trained: bool) -> int:
    """Bytes that one language layer keeps of one position for its backward pass, without checkpointing.

    After Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for this layer: no dropout, a gated feed-forward, and attention that
    stores no scores but a float32 log-sum per head. Each of the two norms keeps its float32 input and a float32 scale; if its weight is
    trained, also the normalised vector; trained matrices keep their inputs (under autocast one copy per matrix). The feed-forward keeps
    gate, its activation, up, and if trained their product. Trained in bf16 with all heads: 24 D + 8 F.
    """
    d, f, c, heads = config.hidden_size, config.intermediate_size, precision.compute, config.num_attention_heads
    attention = 2 * c * head_width(config) * (heads + config.num_key_value_heads) + 4 * heads
    kept = 2 * (4 * d + 4) + attention + 3 * c * f
    if trained:
        kept += 2 * precision.residual * d + (5 if precision.casts else 2) * c * d + c * f
    return kept


def lora_layer_kept(matrices: Sequence[tuple[int, int]], precision: Precision, rank: int) -> int:
    """What adapters keep beside a frozen layer: for each matrix its input after dropout with a byte of mask each, and the
    `rank` numbers between its two matrices."""
    return sum((precision.compute + 1) * inputs + precision.compute * rank for inputs, _ in matrices)


def tower_layer_kept(vision: dict[str, Any], precision: Precision) -> int:
    """Bytes that one trained layer of the tower keeps of one position.

    Two layer norms keep their inputs and two float32 statistics; attention its inputs, query, key, value and result; the
    feed-forward its input, the hidden vector before, within and after quick GELU. In bf16: 16 D + 6 F.
    """
    d, f, c = vision["hidden_size"], vision["intermediate_size"], precision.compute
    inputs = 4 if precision.casts else 2
    return 2 * (precision.residual * d + 8) + inputs * c * d + 4 * c * d + 4 * vision["num_attention_heads"] + 3 * c * f


def projector_kept(matrices: Sequence[tuple[int, int]], precision: Precision) -> int:
    """Bytes that the trained projector keeps of one patch: every matrix's input, and what GELU reads."""
    return precision.compute * (sum(inputs for inputs, _ in matrices) + sum(outputs for _, outputs in matrices[:-1]))


def router_kept(width: int, dropout: float, precision: Precision) -> int:
    """Bytes that the trained router keeps of one position of one view: ten vectors of its layer and MLP, the inputs of its
    two norms, and where it has dropout one more vector and three masks of a byte."""
    c = precision.compute
    return width * (10 * c + 2 * max(c, precision.residual) + (c + 3 if dropout else 0))


def layers_kept(layers: int, layer: int, boundary: int, checkpointing: bool) -> int:
    """Bytes per position of a stack of layers: all that each keeps, or with checkpointing the input of each and what one
    layer keeps while it is run again (Chen et al. 2016, arXiv 1604.06174)."""
    return layers * boundary + layer if checkpointing else layers * layer


def activation_bytes(model: Any, stage: Stage, step: Step, precision: Precision) -> float:
    """What one process keeps of a step for its backward pass, and works with, without vocabulary logits.

    All granularities of a step are alive together, since one backward pass goes through them. The masks of packed rows (a byte or
    two per pair of positions, once for all layers) are left out.
    """
    config, load, c = model.config, workload(model, stage, step), precision.compute
    text = config.get_text_config()
    d, patches = text.hidden_size, config.patch_grid[0] * config.patch_grid[1]
    views, positions = step.rows * load.views, step.rows * sum(load.lengths[level] for level in load.levels)
    kept = views * (patches + 1) * _tower_memory(model, stage, step, precision) + views * patches * d * c
    kept += positions * (c * (3 * text.intermediate_size + 2 * d) + 4 * d)  # what a running layer works with
    if "router" in stage.trains:
        slots = sum(level.tokens for level in model.levels) + config.filtered_text_num
        return kept + views * slots * router_kept(config.router_hidden_size or d, config.router_dropout, precision)
    kept += views * patches * projector_kept(linears(model.model.mm_projector), precision)
    layer = language_layer_kept(text, precision, "llm" in stage.trains and not step.lora_rank)
    if step.lora_rank:
        layer += lora_layer_kept(linears(model.model.layers[0]), precision, step.lora_rank)
    final_norm = (4 + 2 * precision.residual) * d
    return kept + positions * (layers_kept(text.num_hidden_layers, layer, precision.residual * d, step.checkpointing) + final_norm)


def _tower_memory(model: Any, stage: Stage, step: Step, precision: Precision) -> int:
    """Bytes per position of the tower: what a running layer works with, and where it trains what is kept."""
    tower = model.get_vision_tower()
    d, inner = tower.hidden_size, max(outputs for _, outputs in linears(tower.encoder))  # the latter has no name that all towers share
    working = precision.compute * (2 * inner + 2 * d) + 4 * d
    if "vision_tower" not in stage.trains:
        return working
    vision = {"hidden_size": d, "intermediate_size": inner, "num_attention_heads": tower.config.num_attention_heads}
    return working + layers_kept(tower.num_layers_used, tower_layer_kept(vision, precision), precision.residual * d, step.checkpointing)


@dataclass(frozen=True)
class Memory:
    """GPU memory of one process in bytes, by cause, and host memory of all processes together.

    Attributes:
        buffers: gathered weights and communication buckets (ZeRO), or autocast's 16-bit copies of weights.
        logits: vocabulary logits and their loss, of as many tokens as are scored at a time.
        update: what only the optimizer's step needs, when activations are gone.
        host: of one machine with all the GPUs.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    update: float
    reserved: float
    host: float

    @property
    def held(self) -> float:
        """What is held throughout a step, whatever its rows; gradients are counted whole while activations are alive."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.reserved

    @property
    def total(self) -> float:
        """The peak."""
        return self.held + max(self.activations + self.logits, self.update)


def weight_bytes(model: Any, parts: Sequence[PartSummary], step: Step, precision: Precision) -> float:
    """All weights of the model. Under adapters the language model is held in the 16-bit type, or its matrices are quantised.

    Quantised ones as `llava.model.memory.weight_bytes` says.
    """
    language = sum(part.parameters for part in parts if part.part == "llm")
    others = sum(part.parameters for part in parts) - language
    if step.bits != 16:
        return stored_bytes(language + others, language_matrices(model), step.bits, precision.weight)
    return language * (precision.compute if step.lora_rank else precision.weight) + others * precision.weight


def autocast_copies(model: Any, parts: Sequence[PartSummary], stage: Stage, step: Step, precision: Precision) -> float:
    """16-bit copies of float32 weights: trained ones stay until the forward pass ends, and frozen ones that a gradient passes
    until the backward pass, unless checkpointing makes them again. Under adapters the language model needs none."""
    if not precision.casts:
        return 0.0
    copied = sum(part.trainable for part in parts)
    if not {"llm", "router"} & stage.trains and not step.checkpointing and step.bits == 16:
        copied += language_matrices(model)
    return float(precision.compute * copied)


def memory(model: Any, parts: Sequence[PartSummary], stage: Stage, step: Step, zero: str, dtype: str, num_gpus: int) -> Memory:
    """GPU and host memory of a stage under one ZeRO setting.

    ZeRO-2 divides gradients and optimizer among the GPUs, ZeRO-3 the weights too (arXiv 1910.02054, section 5);
    offloading moves all three to the host (arXiv 2101.06840). DeepSpeed turns the divided gradients to float32 for the
    update. Buckets are as `scripts/zero*.json` leave them: two of the width squared, or of the largest weight.

    Args:
        model: on the meta device, with its adapter where `step` has one.
        parts: what `apply_stage` returned for this model and stage.
        zero: one of `ZERO_SETTINGS`.
    """
    precision = precision_of(dtype, zero)
    total, trained = sum(part.parameters for part in parts), sum(part.trainable for part in parts)
    weights = weight_bytes(model, parts, step, precision)
    share = 1 if zero == "0" else num_gpus
    buffers = autocast_copies(model, parts, stage, step, precision)
    if zero != "0":
        largest = max(parameter.numel() for parameter in model.parameters())
        buffers += 2 * min(trained, max(model.config.get_text_config().hidden_size**2, largest)) * precision.gradient
    if zero.startswith("3"):
        buffers += min(total, MAX_LIVE_PARAMETERS) * precision.weight
    offloads = zero == "3-offload"
    on_gpu = 0 if offloads else 1
    supervised = step.rows * step.answer_tokens * len(workload(model, stage, step).levels)
    vocabulary = model.config.get_text_config().vocab_size
    scored = min(supervised, tokens_at_once(vocabulary))
    return Memory(
        weights=on_gpu * weights / (num_gpus if zero.startswith("3") else 1),
        gradients=on_gpu * trained * precision.gradient / share,
        optimizer=on_gpu * trained * precision.optimizer / share,
        buffers=buffers,
        activations=activation_bytes(model, stage, step, precision),
        logits=scored * vocabulary * (precision.compute + 8),  # as computed, in float32, and their log-softmax
        update=0.0 if zero == "0" or offloads else 4 * trained / share,
        reserved=RESERVED_BYTES,
        host=weights + trained * (precision.optimizer + 4) if offloads else 0.0,
    )


def verdict(needed: float, gpu_bytes: float) -> str:
    """`fits`, `tight` (above nine tenths of the GPU) or `no`."""
    if needed > gpu_bytes:
        return "no"
    return "tight" if needed > TIGHT_SHARE * gpu_bytes else "fits"


def largest_batch(needs: Callable[[int], Memory], gpu_bytes: float) -> int:
    """Most rows per GPU that fit and are not tight.

    Args:
        needs: the memory of a step of this many rows.
    """

    def is_too_much(rows: int) -> bool:
        return verdict(needs(rows).total, gpu_bytes) != "fits"

    above = 1
    while not is_too_much(above):
        above *= 2
    return bisect_left(range(above), True, lo=1, key=is_too_much) - 1
