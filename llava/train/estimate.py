"""What a run will need: parameters, operations and GPU memory, for a configuration and a machine, before anything is loaded.

    python -m llava.train.estimate --preset vicuna-7b --stage multi_granularity --num_gpus 8 --gpu_memory_gb 80 \
        --per_device_train_batch_size 4 --gradient_checkpointing True

Parameters are counted on the real model classes, built without storage (meta device). Operations and memory are *computed*
from the formulas below: operations agree with PyTorch's own counter and activations with what autograd keeps, both checked at
toy size in the tests; no figure for a whole GPU was measured on one. Take them as a guide with some ten per cent of doubt, more
where the allocator fragments.

Units: one multiply-add is two operations; memory is in bytes here and in GiB (2**30) or MiB where people read it.
Legend: B rows, C views of a picture, L positions of a row, D width, F feed-forward width, P patches of a view.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, HfArgumentParser

from llava.crops import get_anyres_image_grid_shape
from llava.durable import write_whole
from llava.log import setup_logging
from llava.model.builder import MODEL_CLASSES
from llava.model.loading import read_stored_config, read_tower_config, resolve_tower
from llava.train.stages import PARTS, STAGES, Stage, apply_stage, get_stage, part_of

logger = logging.getLogger(__name__)

GIB = 2**30
ZERO_SETTINGS = ("0", "2", "3", "3-offload")
"""0: every GPU holds everything (plain DDP); 2, 3 and 3 with optimizer and weights in host memory: `scripts/zero*.json`."""

DTYPES = ("bf16", "fp16", "fp32")
MAX_LIVE_PARAMETERS = 10**9
"""`stage3_max_live_parameters` of `scripts/zero3.json`: how many gathered weights ZeRO-3 may hold at a time."""

RESERVED_BYTES = int(1.5 * GIB)
"""Assumed for the CUDA context, its libraries and NCCL on every GPU."""

TIGHT_SHARE = 0.9
"""Above this share of the GPU a setting counts as tight: the allocator's fragmentation is in no formula."""

ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward pass over its forward pass for a kernel that makes the scores anew: five products
for two (Dao et al. 2022, arXiv 2205.14135, algorithm 4). A kernel that keeps them needs 2."""

CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "num_channels": 3, "projection_dim": 768,
}  # fmt: skip
"""openai/clip-vit-large-patch14-336, config.json (Radford et al. 2021, arXiv 2103.00020)."""

_AVG_LLAVA: dict[str, Any] = {
    "vision_config": CLIP_L_336,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "vis_token_granularity": [36, 72, 144, 288, 576],
    "router_select": True,
}
"""DeepLearnXMU/AVG-LLaVA, config.json and arXiv 2410.02745, section 4.1."""

_MICRO_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5,
    "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "num_channels": 3, "projection_dim": 128,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # lmsys/vicuna-7b-v1.5, config.json: Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288).
    "vicuna-7b": {
        "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, **_AVG_LLAVA,
    },
    # lmsys/vicuna-13b-v1.5, config.json: Llama 2 13B.
    "vicuna-13b": {
        "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "max_position_embeddings": 4096, **_AVG_LLAVA,
    },
    # mistralai/Mistral-7B-v0.1, config.json (Jiang et al. 2023, arXiv 2310.06825, table 1).
    "mistral-7b": {
        "model_type": "llava_mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, **_AVG_LLAVA,
    },
    # playground/avg-llava-micro/config.json, the model shipped with this repository.
    "micro": {
        "model_type": "llava_llama", "vocab_size": 640, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048,
        "vision_config": _MICRO_TOWER, "mm_vision_select_layer": -1,
        "image_grid_pinpoints": [[64, 64], [64, 128], [128, 64], [128, 128], [192, 64], [64, 192]],
        "vis_token_granularity": [4, 8, 16, 32, 64], "router_select": True, "router_hidden_size": 32,
        "router_dropout": 0.0, "filtered_text_num": 32,
    },
}  # fmt: skip
"""Name -> configuration, from the sources named at each."""


# --- the model as numbers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageShape:
    """A Llama-shaped language model: `layers` of width `hidden`, gated feed-forward of width `feed_forward`."""

    layers: int
    hidden: int
    query_width: int
    key_width: int
    feed_forward: int
    heads: int
    vocabulary: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the matrices of one layer: query, key, value, output, gate, up, down."""
        d, q, k, f = self.hidden, self.query_width, self.key_width, self.feed_forward
        return (d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d)

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices of all layers: what every position is multiplied with, and what is quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)


@dataclass(frozen=True)
class TowerShape:
    """A CLIP vision tower; `layers` are those that run, `patch_inputs` the numbers of one patch of the picture."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    patches: int
    patch_inputs: int

    @property
    def tokens(self) -> int:
        """Positions of one view, the class token included."""
        return self.patches + 1


@dataclass(frozen=True)
class RouterShape:
    """The granularity router: `width` of its inputs, `inner` width, `positions` per view, `choices`."""

    width: int
    inner: int
    positions: int
    text_slots: int
    patches: int
    choices: int
    reduces: bool
    dropout: bool


@dataclass(frozen=True)
class ModelShape:
    """All that the formulas read of a model.

    Attributes:
        parameters: part -> parameters, the parts of `llava.train.stages`.
        trained: stage -> the parts it trains, for the stages that this model can go through.
        largest_parameter: elements of the largest weight.
        projector: (inputs, outputs) of the projector's linear layers.
        levels: tokens per view of every granularity, coarse to fine.
        visual_tokens: what the picture costs at every level, newlines included.
        views: C of the picture.
        image_size: (width, height) of the picture.
    """

    parameters: dict[str, int]
    trained: dict[str, tuple[str, ...]]
    largest_parameter: int
    language: LanguageShape
    tower: TowerShape
    projector: tuple[tuple[int, int], ...]
    router: RouterShape | None
    levels: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    views: int
    image_size: tuple[int, int]


def read_config(name_or_path: str | None, preset: str | None) -> Any:
    """The configuration of a checkpoint (its config.json alone is read) or of a preset.

    Raises:
        ValueError: both or neither given, an unknown preset, or a model that is none of ours.
    """
    if (name_or_path is None) == (preset is None):
        raise ValueError("give either --model_name_or_path or --preset, one of the two.")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
        stored = PRESETS[preset]
        return MODEL_CLASSES[stored["model_type"]].config_class(
            **{name: value for name, value in stored.items() if name != "model_type"}
        )
    assert name_or_path is not None
    stored = read_stored_config(name_or_path)
    if stored.get("model_type") not in MODEL_CLASSES:
        raise ValueError(
            f"{name_or_path} is of model type {stored.get('model_type')!r}, expected one of {', '.join(MODEL_CLASSES)}; "
            "for a plain language model use the --preset of its shape."
        )
    config = MODEL_CLASSES[stored["model_type"]].config_class.from_dict(stored)
    if config.vision_config is None and config.mm_vision_tower is not None:
        config.vision_config, config.image_processor = read_tower_config(
            resolve_tower(config.mm_vision_tower, name_or_path)
        )
    if config.vision_config is None:
        raise ValueError(f"{name_or_path} names no vision tower; estimate a checkpoint that has one, or a --preset.")
    return config


def build_on_meta(config: Any) -> Any:
    """The model of a configuration without any storage: names and shapes only."""
    with torch.device("meta"):
        return MODEL_CLASSES[config.model_type](config)


def measure(config: Any, image_size: tuple[int, int] | None = None) -> ModelShape:
    """Read off a configuration, and the model built from it, all that the formulas need.

    Args:
        config: of one of our models.
        image_size: (width, height) of the picture; the largest canvas by default.
    """
    model = build_on_meta(config)
    counts = count_parameters(model)
    size = image_size or largest_canvas(config)
    levels = tuple(level.tokens for level in model.levels)
    trained = {
        stage.name: tuple(line.part for line in apply_stage(model, stage) if line.trainable)
        for stage in STAGES.values()
        if fits(stage, counts, levels)
    }
    return ModelShape(
        parameters=counts,
        trained=trained,
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        language=_language_shape(config),
        tower=_tower_shape(config, model.get_vision_tower().num_layers_used),
        projector=tuple(
            (module.in_features, module.out_features)
            for module in model.model.mm_projector.modules()
            if isinstance(module, torch.nn.Linear)
        ),
        router=_router_shape(config, levels) if model.model.router is not None else None,
        levels=levels,
        visual_tokens=visual_tokens(model, config, size),
        views=number_of_views(config, size),
        image_size=size,
    )


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of each part that the model has."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def visual_tokens(model: Any, config: Any, image_size: tuple[int, int]) -> tuple[int, ...]:
    """What a picture of (width, height) costs at every granularity, coarse to fine, newlines included."""
    views = number_of_views(config, image_size)
    return tuple(model.num_visual_tokens(image_size, level.tokens, views) for level in model.levels)


def fits(stage: Stage, parameters: dict[str, int], levels: Sequence[int]) -> bool:
    """Whether a model can go through a stage: several levels where it compares them, a router where it trains one."""
    if stage.needs_granularities and len(levels) < 2:
        return False
    return any(part in parameters for part in stage.trains)


def largest_canvas(config: Any) -> tuple[int, int]:
    """(width, height) of the canvas with most pixels; of one view where pictures are not tiled."""
    side = config.vision_config["image_size"]
    if config.image_aspect_ratio != "anyres":
        return side, side
    width, height = max(config.image_grid_pinpoints, key=lambda canvas: canvas[0] * canvas[1])
    return width, height


def number_of_views(config: Any, image_size: tuple[int, int]) -> int:
    """Views of a picture of (width, height): one, or the whole and its tiles."""
    if config.image_aspect_ratio != "anyres":
        return 1
    across, down = get_anyres_image_grid_shape(
        image_size, config.image_grid_pinpoints, config.vision_config["image_size"]
    )
    return 1 + across * down


def _language_shape(config: Any) -> LanguageShape:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LanguageShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query_width=head * config.num_attention_heads,
        key_width=head * config.num_key_value_heads,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
    )


def _tower_shape(config: Any, layers_used: int) -> TowerShape:
    vision = CLIPVisionConfig(**{name: value for name, value in config.vision_config.items() if name != "model_type"})
    height, width = config.patch_grid
    return TowerShape(
        layers=layers_used,
        hidden=vision.hidden_size,
        feed_forward=vision.intermediate_size,
        heads=vision.num_attention_heads,
        patches=height * width,
        patch_inputs=vision.num_channels * int(config.vision_config["patch_size"]) ** 2,
    )


def _router_shape(config: Any, levels: Sequence[int]) -> RouterShape:
    height, width = config.patch_grid
    return RouterShape(
        width=config.hidden_size,
        inner=config.router_hidden_size or config.hidden_size,
        positions=sum(levels) + config.filtered_text_num,
        text_slots=config.filtered_text_num,
        patches=height * width,
        choices=len(levels),
        reduces=config.router_hidden_size is not None,
        dropout=config.router_dropout > 0,
    )


# --- operations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass: of matrices with weights, and of attention between positions."""

    linear: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.linear + other.linear, self.attention + other.attention)

    def times(self, count: float) -> Work:
        """The work of `count` such passes."""
        return Work(self.linear * count, self.attention * count)


def linear_work(inputs: int, outputs: int, positions: float) -> Work:
    """A matrix on some positions: a multiply and an add per weight and position."""
    return Work(linear=2.0 * inputs * outputs * positions)


def attention_work(positions: int, width: int) -> Work:
    """Scores and their weighted sum over `positions`: two products of 2 L^2 D.

    The whole square is counted, as PyTorch's counter does; a causal kernel skips up to half of it.
    """
    return Work(attention=4.0 * positions**2 * width)


def backward_operations(forward: Work, trained: bool) -> float:
    """Operations of the backward pass that belongs to `forward`.

    A matrix needs one product as large as its forward one for the gradient of its input, and one more for that of its
    weight if it is trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    return forward.linear * (2 if trained else 1) + forward.attention * ATTENTION_BACKWARD


def language_operations_per_token(shape: LanguageShape) -> float:
    """Matrix operations of one prefilled position, without attention between positions and vocabulary logits.

    Vicuna-7B: 2 * 32 * (4 * 4096^2 + 3 * 4096 * 11008) = 12.95 G.
    """
    return 2.0 * shape.matrix_parameters


def language_work(shape: LanguageShape, lengths: Iterable[int]) -> Work:
    """The layers over sequences of these lengths, which do not see each other.

    Padding is not counted. Where sequences are packed side by side, a kernel that is told so by a mask works through the square
    of the whole row and spends more on attention than this.
    """
    work = Work()
    for length in lengths:
        attention = attention_work(length, shape.query_width).times(shape.layers)
        work += Work(linear=language_operations_per_token(shape) * length) + attention
    return work


def head_work(shape: LanguageShape, supervised: float) -> Work:
    """Vocabulary logits, made at supervised positions only."""
    return linear_work(shape.hidden, shape.vocabulary, supervised)


def lora_parameters(shape: LanguageShape, rank: int) -> int:
    """Two matrices of `rank` beside every matrix of the layers (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.linears)


def tower_work(shape: TowerShape, views: int, layers: int | None = None) -> Work:
    """The vision tower over some views.

    CLIP ViT-L/14-336 with all its 24 layers: 577 positions * 24 * 2 * (4 * 1024^2 + 2 * 1024 * 4096) + attention +
    patches = 0.38 T per view; the 23 layers whose output is the feature, 0.37 T.

    Args:
        layers: how many run; those that the features need by default.
    """
    d, f, tokens = shape.hidden, shape.feed_forward, shape.tokens
    layer = linear_work(d, 4 * d + 2 * f, tokens) + attention_work(tokens, d)
    patches = linear_work(shape.patch_inputs, d, shape.patches)
    return (layer.times(shape.layers if layers is None else layers) + patches).times(views)


def projector_work(linears: Sequence[tuple[int, int]], positions: float) -> Work:
    """The projector over some patches."""
    work = Work()
    for inputs, outputs in linears:
        work += linear_work(inputs, outputs, positions)
    return work


def router_work(shape: RouterShape, views: int) -> Work:
    """The router on one picture: seven R x R matrices (four of attention, two of its feed-forward, one of the MLP), the
    votes, attention over the picture's views, and the reduction of a narrow router (paper, section 3.2).

    The released router (R = D = 4096): 117 M parameters, 1.35 T for the five views of a 672 x 672 picture.
    """
    positions = shape.positions * views
    layer = linear_work(shape.inner, 7 * shape.inner + shape.choices, positions)
    attention = attention_work(views, shape.inner).times(shape.positions)
    return layer + attention + _reduction_work(shape, views)


def _reduction_work(shape: RouterShape, views: int) -> Work:
    """A narrow router's first matrix, which every patch and every text slot passes once."""
    return linear_work(shape.width, shape.inner, shape.patches * views + shape.text_slots) if shape.reduces else Work()


def router_backward_operations(shape: RouterShape, views: int) -> float:
    """The router's backward pass. Nothing in front of it learns, so its first matrix (the reduction, or query, key and value of
    the attention) needs no gradient of its input."""
    first = _reduction_work(shape, views)
    if not shape.reduces:
        first = linear_work(shape.inner, 3 * shape.inner, shape.positions * views)
    return backward_operations(router_work(shape, views), True) - first.total


@dataclass(frozen=True)
class StepOperations:
    """Operations of one step of one process, forward and backward; `recomputed` is what checkpointing does twice."""

    vision_forward: float = 0.0
    vision_backward: float = 0.0
    projector_forward: float = 0.0
    projector_backward: float = 0.0
    router_forward: float = 0.0
    router_backward: float = 0.0
    language_forward: float = 0.0
    language_backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Step:
    """What one process does in a step.

    Attributes:
        rows: rows of the batch, each with one picture.
        text_tokens: text positions of a row.
        answer_tokens: how many of them are learnt from.
        checkpointing: layers are run again in the backward pass instead of kept.
        lora_rank: of adapters in place of the language model's own weights; 0 for none.
        bits: of the language model's matrices: 16 (not quantised), 8 or 4.
    """

    rows: int
    text_tokens: int
    answer_tokens: int
    checkpointing: bool = False
    lora_rank: int = 0
    bits: int = 16


def stage_levels(shape: ModelShape, stage: Stage) -> tuple[int, ...]:
    """Indices of the granularities that one step of a stage reads: all of them where it compares them, else the finest."""
    return tuple(range(len(shape.levels))) if stage.needs_granularities else (len(shape.levels) - 1,)


def row_lengths(shape: ModelShape, step: Step, levels: Sequence[int]) -> list[int]:
    """Positions of one row, text and picture, at each of some granularities."""
    return [shape.visual_tokens[level] + step.text_tokens for level in levels]


def step_operations(
    shape: ModelShape, stage: Stage, step: Step, levels: Sequence[int] | None = None, offline: bool = False
) -> StepOperations:
    """Operations of one step of a stage, by part.

    Args:
        levels: indices of the granularities; the stage's own by default.
        offline: stage 4 from scores written beforehand: the language model does not run.
    """
    levels = stage_levels(shape, stage) if levels is None else levels
    trained = shape.trained[stage.name]
    ranks = "router" in trained
    tower = tower_work(shape.tower, shape.views).times(step.rows)
    projector = projector_work(shape.projector, shape.tower.patches * shape.views * step.rows)
    layers, head = _language_parts(shape, step, levels)
    if ranks and offline:
        layers, head = Work(), Work()
    router = shape.router if ranks else None
    tower_learns, language_learns = "vision_tower" in trained, "llm" in trained
    backward, recomputed = 0.0, 0.0
    if not ranks:
        backward = _language_backward(shape, step, layers, head, language_learns)
        recomputed = step.checkpointing * (layers.total + (tower.total if tower_learns else 0.0))
    return StepOperations(
        vision_forward=tower.total,
        vision_backward=backward_operations(tower, True) if tower_learns else 0.0,
        projector_forward=projector.total,
        projector_backward=_projector_backward(shape, projector, tower_learns) if "projector" in trained else 0.0,
        router_forward=router_work(router, shape.views).total * step.rows if router else 0.0,
        router_backward=router_backward_operations(router, shape.views) * step.rows if router else 0.0,
        language_forward=layers.total + head.total,
        language_backward=backward,
        recomputed=recomputed,
    )


def _language_parts(shape: ModelShape, step: Step, levels: Sequence[int]) -> tuple[Work, Work]:
    layers = language_work(shape.language, row_lengths(shape, step, levels)).times(step.rows)
    return layers, head_work(shape.language, step.answer_tokens * len(levels)).times(step.rows)


def _language_backward(shape: ModelShape, step: Step, layers: Work, head: Work, learns: bool) -> float:
    """Adapters add their own products to a frozen language model: one forward, two backward, counted together."""
    if not (learns and step.lora_rank):
        return backward_operations(layers, learns) + backward_operations(head, learns)
    share = lora_parameters(shape.language, step.lora_rank) / shape.language.matrix_parameters
    return backward_operations(layers + head, False) + 3 * layers.linear * share


def _projector_backward(shape: ModelShape, projector: Work, tower_learns: bool) -> float:
    """The first layer's input needs a gradient only where the tower learns."""
    whole = backward_operations(projector, True)
    if tower_learns or not shape.projector:
        return whole
    weights = [inputs * outputs for inputs, outputs in shape.projector]
    return whole - projector.linear * weights[0] / sum(weights)


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Attributes:
        weight, gradient: of a weight and its gradient.
        optimizer: of Adam's two averages, and of the float32 copy of 16-bit weights.
        compute: of what matrices multiply.
        residual: of what runs past the layers.
        casts: autocast turns float32 weights and inputs into 16-bit copies, one per matrix that reads them.
    """

    weight: int
    gradient: int
    optimizer: int
    compute: int
    residual: int
    casts: bool

    @property
    def states(self) -> int:
        """Bytes of one trained parameter: 16 in mixed precision with Adam."""
        return self.weight + self.gradient + self.optimizer


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


def quantised_bytes(parameters: int, bits: int) -> float:
    """Memory of quantised matrices.

    4 bits: nf4 with double quantisation adds 0.127 bits per weight (Dettmers et al. 2023, arXiv 2305.14314, section 3).
    8 bits: one byte; its scale per output row is left out.
    """
    return parameters * {4: (4 + 0.127) / 8, 8: 1.0}[bits]


def attention_kept(shape: LanguageShape, bytes_each: int) -> int:
    """Query, key, value and result of one position and layer; scores are never stored by SDPA or flash attention, which
    keep a float32 log-sum per head instead (Dao et al. 2022, arXiv 2205.14135)."""
    return bytes_each * 2 * (shape.query_width + shape.key_width) + 4 * shape.heads


def language_layer_kept(shape: LanguageShape, precision: Precision, trained: bool) -> int:
    """Bytes that one layer keeps of one position for its backward pass, without checkpointing.

    After Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for this layer: no dropout, no stored scores, a gated
    feed-forward. Each of the two norms keeps its float32 input and a float32 scale; if its weight is trained, also the
    normalised vector; trained matrices keep their inputs (under autocast one copy per matrix). The feed-forward keeps
    gate, its activation, up, and if trained their product. Trained in bf16 with all heads: 24 D + 8 F.
    """
    d, f, c = shape.hidden, shape.feed_forward, precision.compute
    kept = 2 * (4 * d + 4) + attention_kept(shape, c) + 3 * c * f
    if trained:
        kept += 2 * precision.residual * d + (5 if precision.casts else 2) * c * d + c * f
    return kept


def lora_layer_kept(shape: LanguageShape, precision: Precision, rank: int) -> int:
    """What adapters keep beside a frozen layer: for each matrix its input after dropout with a byte of mask each, and the
    `rank` numbers between its two matrices."""
    return sum((precision.compute + 1) * inputs + precision.compute * rank for inputs, _ in shape.linears)


def tower_layer_kept(shape: TowerShape, precision: Precision) -> int:
    """Bytes that one trained layer of the tower keeps of one position.

    Two layer norms keep their inputs and two float32 statistics; attention its inputs, query, key, value and result; the
    feed-forward its input, the hidden vector before, within and after quick GELU. In bf16: 16 D + 6 F.
    """
    d, f, c = shape.hidden, shape.feed_forward, precision.compute
    return 2 * (precision.residual * d + 8) + (4 if precision.casts else 2) * c * d + 4 * c * d + 4 * shape.heads + 3 * c * f


def projector_kept(linears: Sequence[tuple[int, int]], precision: Precision) -> int:
    """Bytes that the trained projector keeps of one patch: every matrix's input, and what GELU reads."""
    inner = sum(outputs for _, outputs in linears[:-1])
    return precision.compute * (sum(inputs for inputs, _ in linears) + inner)


def router_kept(shape: RouterShape, precision: Precision) -> int:
    """Bytes that the trained router keeps of one position of one view: ten vectors of its layer and MLP, the inputs of its
    two norms, and where it has dropout one more vector and three masks of a byte."""
    c = precision.compute
    return shape.inner * (10 * c + 2 * max(c, precision.residual) + (c + 3 if shape.dropout else 0))


def language_working(shape: LanguageShape, precision: Precision) -> int:
    """Bytes per position that a layer needs while it runs, forward or backward, and keeps nowhere."""
    return precision.compute * (3 * shape.feed_forward + 2 * shape.hidden) + 4 * shape.hidden


def tower_working(shape: TowerShape, precision: Precision) -> int:
    """As `language_working`, for the tower."""
    return precision.compute * (2 * shape.feed_forward + 2 * shape.hidden) + 4 * shape.hidden


def layers_kept(layers: int, layer: int, boundary: int, checkpointing: bool) -> int:
    """Bytes per position of a stack of layers: all that each keeps, or with checkpointing the input of each and what one
    layer keeps while it is run again (Chen et al. 2016, arXiv 1604.06174)."""
    return layers * boundary + layer if checkpointing else layers * layer


def logits_bytes(supervised: float, vocabulary: int, precision: Precision) -> float:
    """Vocabulary logits where they are learnt from: as the matrix gives them, in float32, and their float32 log-softmax."""
    return supervised * vocabulary * (precision.compute + 8)


def kv_cache_bytes(shape: LanguageShape, positions: int, bytes_each: int = 2) -> int:
    """Keys and values of some positions in all layers; Vicuna-7B: 0.5 MiB per position in bf16."""
    return positions * 2 * shape.layers * shape.key_width * bytes_each


def activation_bytes(
    shape: ModelShape, stage: Stage, step: Step, precision: Precision, levels: Sequence[int] | None = None
) -> float:
    """What one process keeps of a step for its backward pass, and works with, without vocabulary logits.

    All granularities of a step are alive together, since one backward pass goes through them. The masks of packed rows (a byte or
    two per pair of positions, once for all layers) and padding are left out.
    """
    levels = stage_levels(shape, stage) if levels is None else levels
    trained = shape.trained[stage.name]
    positions = step.rows * sum(row_lengths(shape, step, levels))
    views = step.rows * shape.views
    kept = _tower_memory(shape, step, precision, views, "vision_tower" in trained)
    kept += views * shape.tower.patches * shape.language.hidden * precision.compute
    kept += positions * language_working(shape.language, precision)
    if "router" in trained:
        assert shape.router is not None
        return kept + views * shape.router.positions * router_kept(shape.router, precision)
    kept += views * shape.tower.patches * projector_kept(shape.projector, precision)
    final_norm = 4 + 2 * precision.residual
    return kept + positions * (_language_kept(shape, step, precision, "llm" in trained) + final_norm * shape.language.hidden)


def _tower_memory(shape: ModelShape, step: Step, precision: Precision, views: int, trained: bool) -> float:
    tower = shape.tower
    memory = tower_working(tower, precision)
    if trained:
        boundary = precision.residual * tower.hidden
        memory += layers_kept(tower.layers, tower_layer_kept(tower, precision), boundary, step.checkpointing)
    return views * tower.tokens * memory


def _language_kept(shape: ModelShape, step: Step, precision: Precision, learns: bool) -> int:
    language = shape.language
    layer = language_layer_kept(language, precision, learns and not step.lora_rank)
    if learns and step.lora_rank:
        layer += lora_layer_kept(language, precision, step.lora_rank)
    return layers_kept(language.layers, layer, precision.residual * language.hidden, step.checkpointing)


@dataclass(frozen=True)
class Memory:
    """GPU memory of one process in bytes, by cause, and host memory of all processes together.

    Attributes:
        buffers: gathered weights and communication buckets (ZeRO), or autocast's 16-bit copies of weights.
        logits: vocabulary logits and their loss.
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
    def total(self) -> float:
        """The most that is held at a time: gradients are counted whole while activations are."""
        held = self.weights + self.gradients + self.optimizer + self.buffers + self.reserved
        return held + max(self.activations + self.logits, self.update)


def trained_parameters(shape: ModelShape, stage: Stage, step: Step) -> int:
    """Parameters that the optimizer of a stage holds; adapters stand for the language model."""
    counts = {part: shape.parameters[part] for part in shape.trained[stage.name]}
    if "llm" in counts and step.lora_rank:
        counts["llm"] = lora_parameters(shape.language, step.lora_rank)
    return sum(counts.values())


def weight_bytes(shape: ModelShape, stage: Stage, step: Step, precision: Precision) -> float:
    """All weights of the model. Under adapters the language model is held in the 16-bit type, or its matrices are quantised."""
    others = sum(count for part, count in shape.parameters.items() if part != "llm")
    language, matrices = shape.parameters["llm"], shape.language.matrix_parameters
    adapted = bool(step.lora_rank) and "llm" in shape.trained[stage.name]
    if adapted:
        others += lora_parameters(shape.language, step.lora_rank)
    if step.bits != 16:
        return quantised_bytes(matrices, step.bits) + (language - matrices + others) * precision.weight
    return language * (precision.compute if adapted else precision.weight) + others * precision.weight


def autocast_copies(shape: ModelShape, stage: Stage, step: Step, precision: Precision) -> float:
    """16-bit copies of float32 weights: trained ones stay until the forward pass ends, and frozen ones that a gradient passes
    until the backward pass, unless checkpointing makes them anew. Under adapters the language model needs none."""
    if not precision.casts:
        return 0.0
    trained = shape.trained[stage.name]
    copied = trained_parameters(shape, stage, step)
    if "llm" not in trained and "router" not in trained and not step.checkpointing and step.bits == 16:
        copied += shape.language.matrix_parameters
    return float(precision.compute * copied)


def memory(
    shape: ModelShape, stage: Stage, step: Step, zero: str, dtype: str, num_gpus: int, levels: Sequence[int] | None = None
) -> Memory:
    """GPU and host memory of a stage under one ZeRO setting.

    ZeRO-2 divides gradients and optimizer among the GPUs, ZeRO-3 the weights too (arXiv 1910.02054, section 5);
    offloading moves all three to the host (arXiv 2101.06840). DeepSpeed turns the divided gradients to float32 for the
    update. Buckets are as `scripts/zero*.json` leave them: two of the width squared, or of the largest weight.

    Args:
        zero: one of `ZERO_SETTINGS`.
        levels: indices of the granularities; the stage's own by default.
    """
    precision = precision_of(dtype, zero)
    levels = stage_levels(shape, stage) if levels is None else levels
    total, trained = sum(shape.parameters.values()), trained_parameters(shape, stage, step)
    weights = weight_bytes(shape, stage, step, precision)
    share = 1 if zero == "0" else num_gpus
    bucket = min(trained, max(shape.language.hidden**2, shape.largest_parameter))
    buffers = autocast_copies(shape, stage, step, precision)
    if zero != "0":
        buffers += 2 * bucket * precision.gradient
    if zero.startswith("3"):
        buffers += min(total, MAX_LIVE_PARAMETERS) * precision.weight
    offloads = zero == "3-offload"
    on_gpu = 0 if offloads else 1
    return Memory(
        weights=on_gpu * weights / (num_gpus if zero.startswith("3") else 1),
        gradients=on_gpu * trained * precision.gradient / share,
        optimizer=on_gpu * trained * precision.optimizer / share,
        buffers=buffers,
        activations=activation_bytes(shape, stage, step, precision, levels),
        logits=logits_bytes(step.rows * step.answer_tokens * len(levels), shape.language.vocabulary, precision),
        update=0.0 if zero == "0" or offloads else 4 * trained / share,
        reserved=RESERVED_BYTES,
        host=weights + trained * (precision.optimizer + 4) if offloads else 0.0,
    )


def verdict(needed: float, gpu_bytes: float) -> str:
    """`fits`, `tight` (above nine tenths of the GPU) or `no`."""
    if needed > gpu_bytes:
        return "no"
    return "tight" if needed > TIGHT_SHARE * gpu_bytes else "fits"


def largest_batch(shape: ModelShape, stage: Stage, step: Step, zero: str, dtype: str, num_gpus: int, gpu_bytes: float) -> int:
    """Most rows per GPU that are neither tight nor too many; 0 where not even one fits. Memory grows evenly with rows."""

    def needed(rows: int) -> float:
        return memory(shape, stage, _with_rows(step, rows), zero, dtype, num_gpus).total

    if verdict(needed(1), gpu_bytes) != "fits":
        return 0
    low, high = 1, 2
    while high < 2**20 and verdict(needed(high), gpu_bytes) == "fits":
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if verdict(needed(middle), gpu_bytes) == "fits" else (low, middle)
    return low


def _with_rows(step: Step, rows: int) -> Step:
    return Step(**{**asdict(step), "rows": rows})


# --- the report ---------------------------------------------------------------------------------------------------


@dataclass
class EstimateArguments:
    """Flags of the estimate."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint; only its config.json is read."})
    preset: str | None = field(default=None, metadata={"help": f"Or a published shape: {', '.join(PRESETS)}."})
    stage: str = field(default="multi_granularity", metadata={"help": f"Stage of the memory tables: {', '.join(STAGES)}."})
    num_gpus: int = field(default=8, metadata={"help": "GPUs of the run, of one machine for the host's memory."})
    gpu_memory_gb: float = field(default=80.0, metadata={"help": "Memory of one GPU in GiB."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per GPU and step, one picture each."})
    image_size: str | None = field(default=None, metadata={"help": "WIDTHxHEIGHT of the picture; the largest canvas by default."})
    text_tokens: int = field(default=256, metadata={"help": "Text positions of a row, prompt and answer."})
    answer_tokens: int | None = field(
        default=None, metadata={"help": "How many of them are learnt from; all by default, which is the most it can cost."}
    )
    dtype: str = field(default="bf16", metadata={"help": f"{', '.join(DTYPES)}."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Run layers again instead of keeping what they made."})
    zero: str | None = field(default=None, metadata={"help": f"One of {', '.join(ZERO_SETTINGS)}; all by default."})
    lora_r: int = field(default=0, metadata={"help": "Rank of adapters in place of the language model's weights; 0: none."})
    bits: int = field(default=16, metadata={"help": "Of the language model's matrices: 16, 8 or 4."})
    json: str | None = field(default=None, metadata={"help": "File to write all numbers to."})


@dataclass(frozen=True)
class Estimate:
    """All tables as numbers; operations per process and step, memory in bytes."""

    settings: dict[str, Any]
    parameters: dict[str, int]
    trained_parameters: dict[str, int]
    granularities: list[dict[str, float]]
    operations: dict[str, dict[str, float]]
    memory: dict[str, dict[str, float | str]]
    memory_by_granularity: dict[str, dict[str, float]]


def check(args: EstimateArguments) -> None:
    """Refuse flags that cannot be meant, all findings at once.

    Raises:
        ValueError: one line per finding.
    """
    errors = []
    if args.dtype not in DTYPES:
        errors.append(f"--dtype is {args.dtype!r}; choose one of {', '.join(DTYPES)}.")
    if args.zero is not None and args.zero not in ZERO_SETTINGS:
        errors.append(f"--zero is {args.zero!r}; choose one of {', '.join(ZERO_SETTINGS)}.")
    if args.bits not in (16, 8, 4):
        errors.append(f"--bits is {args.bits}; choose 16, 8 or 4.")
    if args.bits in (8, 4) and args.zero in ("3", "3-offload"):
        errors.append(f"--bits {args.bits} with --zero {args.zero}: quantised weights are not divided; choose 0 or 2.")
    for name in ("num_gpus", "gpu_memory_gb", "per_device_train_batch_size", "text_tokens"):
        if getattr(args, name) <= 0:
            errors.append(f"--{name} is {getattr(args, name)}; give a number above 0.")
    if args.answer_tokens is not None and not 0 <= args.answer_tokens <= args.text_tokens:
        errors.append(f"--answer_tokens is {args.answer_tokens}; give 0 to the {args.text_tokens} of --text_tokens.")
    if args.lora_r < 0:
        errors.append(f"--lora_r is {args.lora_r}; give 0 or more.")
    if args.stage in STAGES:
        learns = "llm" in STAGES[args.stage].trains
        if args.lora_r and not learns:
            errors.append(f"--lora_r is given, but stage {args.stage} does not train the language model; drop one of the two.")
        if args.bits != 16 and learns and not args.lora_r:
            errors.append(f"--bits {args.bits}: quantised weights cannot be trained in stage {args.stage}; give --lora_r.")
    else:
        errors.append(f"--stage is {args.stage!r}; choose one of {', '.join(STAGES)}.")
    if errors:
        raise ValueError("these flags cannot work together:\n- " + "\n- ".join(errors))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`672x480` as (672, 480).

    Raises:
        ValueError: not two numbers above 0.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"--image_size is {text!r}; give WIDTHxHEIGHT in pixels, as in 672x480.")
    return int(sides[0]), int(sides[1])


def estimate(args: EstimateArguments) -> Estimate:
    """Compute every table.

    Raises:
        ValueError: flags or a model that cannot work.
    """
    check(args)
    stage = get_stage(args.stage)
    config = read_config(args.model_name_or_path, args.preset)
    if stage.name == "rglf" and config.vis_token_granularity:
        config.router_select = True  # the stage adds a router where there is none
    shape = measure(config, parse_size(args.image_size))
    if stage.name not in shape.trained:
        raise ValueError(
            f"stage {stage.name} compares granularities, but the model has {len(shape.levels)}; choose another stage or model."
        )
    answer = args.text_tokens if args.answer_tokens is None else args.answer_tokens
    step = Step(
        args.per_device_train_batch_size, args.text_tokens, answer, args.gradient_checkpointing, args.lora_r, args.bits
    )
    settings = {**asdict(args), "image_size": list(shape.image_size), "answer_tokens": answer, "views": shape.views}
    return Estimate(
        settings={name: value for name, value in settings.items() if name != "json"},
        parameters=shape.parameters,
        trained_parameters={name: trained_parameters(shape, STAGES[name], step) for name in shape.trained},
        granularities=[_granularity_line(shape, stage, step, index) for index in range(len(shape.levels))],
        operations=_operations_table(shape, step),
        memory={zero: _memory_line(shape, stage, step, zero, args) for zero in _zero_settings(args)},
        memory_by_granularity=_memory_by_granularity(shape, stage, step, args),
    )


def _zero_settings(args: EstimateArguments) -> list[str]:
    if args.zero is not None:
        return [args.zero]
    return [zero for zero in ZERO_SETTINGS if args.bits == 16 or not zero.startswith("3")]


def _granularity_line(shape: ModelShape, stage: Stage, step: Step, index: int) -> dict[str, float]:
    """One granularity in use (prefill of one row) and in training (a step at this granularity alone)."""
    length = row_lengths(shape, step, [index])[0]
    prefill = language_work(shape.language, [length]).total
    router = router_work(shape.router, shape.views).total if shape.router is not None else 0.0
    training = step_operations(shape, stage, step, [index])
    return {
        "tokens_per_view": shape.levels[index],
        "visual_tokens": shape.visual_tokens[index],
        "positions": length,
        "prefill_operations": prefill,
        "router_operations": router,
        "kv_cache_bytes": kv_cache_bytes(shape.language, length),
        "language_forward_operations": training.language_forward,
        "language_backward_operations": training.language_backward,
    }


def _operations_table(shape: ModelShape, step: Step) -> dict[str, dict[str, float]]:
    lines = {name: step_operations(shape, STAGES[name], step) for name in shape.trained}
    if "rglf" in lines:
        lines["rglf, scored before"] = step_operations(shape, STAGES["rglf"], step, offline=True)
    return {name: {**asdict(line), "total": line.total} for name, line in lines.items()}


def _memory_line(shape: ModelShape, stage: Stage, step: Step, zero: str, args: EstimateArguments) -> dict[str, float | str]:
    needed = memory(shape, stage, step, zero, args.dtype, args.num_gpus)
    gpu = args.gpu_memory_gb * GIB
    return {
        **asdict(needed),
        "total": needed.total,
        "verdict": verdict(needed.total, gpu),
        "largest_batch": largest_batch(shape, stage, step, zero, args.dtype, args.num_gpus, gpu),
    }


def _memory_by_granularity(shape: ModelShape, stage: Stage, step: Step, args: EstimateArguments) -> dict[str, dict[str, float]]:
    return {
        str(level): {
            zero: memory(shape, stage, step, zero, args.dtype, args.num_gpus, [index]).total for zero in _zero_settings(args)
        }
        for index, level in enumerate(shape.levels)
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of text with aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def operations_text(count: float) -> str:
    """Operations with three digits and a unit: 12.9 G."""
    if not count:
        return "-"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}" if count < 999.5 * limit else f"{count / limit:.0f} {unit}"
    return f"{count:.0f}"


def bytes_text(count: float) -> str:
    """Memory in GiB, or in MiB below a tenth of one."""
    if not count:
        return "-"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def report(result: Estimate) -> str:
    """The tables as text."""
    settings = result.settings
    width, height = settings["image_size"]
    blocks = [
        f"{settings['preset'] or settings['model_name_or_path']}: {sum(result.parameters.values()):,} parameters. "
        f"Picture {width}x{height} ({settings['views']} views), {settings['text_tokens']} text tokens, "
        f"{settings['answer_tokens']} of them learnt from.",
        _parameter_block(result),
        "One row, by granularity: prefill and cache in use, the language model's operations in one training step "
        f"of stage {settings['stage']}\n" + _granularity_block(result),
        f"Operations of one step of one GPU, {settings['per_device_train_batch_size']} rows\n" + _operations_block(result),
        _memory_block(result),
        "Memory of one GPU if the step held one granularity only\n" + _memory_granularity_block(result),
        "Operations and memory are computed from shapes, not measured on a GPU.",
    ]
    return "\n\n".join(blocks)


def _parameter_block(result: Estimate) -> str:
    rows = [[part, f"{count:,}"] for part, count in result.parameters.items()]
    trained = ", ".join(f"{name} {count:,}" for name, count in result.trained_parameters.items())
    return table(["part", "parameters"], rows) + f"\ntrained: {trained}"


def _granularity_block(result: Estimate) -> str:
    rows = [
        [
            f"{line['tokens_per_view']:.0f} per view",
            f"{line['visual_tokens']:,.0f}",
            f"{line['positions']:,.0f}",
            operations_text(line["prefill_operations"]),
            f"{line['router_operations'] / line['prefill_operations']:.1%}",
            bytes_text(line["kv_cache_bytes"]),
            operations_text(line["language_forward_operations"]),
            operations_text(line["language_backward_operations"]),
        ]
        for line in result.granularities
    ]
    header = ["granularity", "visual", "positions", "prefill", "router", "KV bf16", "step forward", "step backward"]
    return table(header, rows)


def _operations_block(result: Estimate) -> str:
    names = ("vision", "projector", "router", "language")
    rows = [
        [
            stage,
            *(f"{operations_text(line[f'{name}_forward'])} + {operations_text(line[f'{name}_backward'])}" for name in names),
            operations_text(line["recomputed"]),
            operations_text(line["total"]),
        ]
        for stage, line in result.operations.items()
    ]
    return table(["stage (forward + backward)", *names, "recomputed", "total"], rows)


def _memory_block(result: Estimate) -> str:
    settings = result.settings
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "logits", "reserved", "total")
    rows = []
    for zero, line in result.memory.items():
        cells = [bytes_text(float(line[name])) for name in names]
        rows.append([f"ZeRO {zero}", *cells, bytes_text(float(line["host"])), str(line["verdict"]), str(line["largest_batch"])])
    title = (
        f"Memory of one of {settings['num_gpus']} GPUs with {settings['gpu_memory_gb']:g} GiB in stage {settings['stage']}, "
        f"{settings['dtype']}, {settings['per_device_train_batch_size']} rows, checkpointing "
        f"{'on' if settings['gradient_checkpointing'] else 'off'}"
    )
    return f"{title}\n" + table(["setting", *names, "host", "verdict", "most rows"], rows)


def _memory_granularity_block(result: Estimate) -> str:
    settings = list(result.memory)
    rows = [
        [f"{level} per view", *(bytes_text(line[zero]) for zero in settings)]
        for level, line in result.memory_by_granularity.items()
    ]
    return table(["granularity", *(f"ZeRO {zero}" for zero in settings)], rows)


def main() -> None:
    """The command line: tables on standard output, one sentence per error, and a non-zero exit."""
    (args,) = HfArgumentParser(EstimateArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    setup_logging()
    try:
        result = estimate(args)
        if args.json is not None:
            write_whole(Path(args.json), json.dumps(asdict(result), indent=2) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"estimate stopped: {error}") from error
    sys.stdout.write(report(result) + "\n")


if __name__ == "__main__":
    main()
