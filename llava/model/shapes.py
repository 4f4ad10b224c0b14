"""The shape of every weight, from the configuration alone: what a checkpoint's headers are held against before anything is built.

Sizes are configuration fields; a test compares these shapes with those of built models of each kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llava.checkpoint_files import FLOATS, StoredTensor
from llava.model.config import vision_fields

Shapes = dict[str, tuple[int, ...]]

LAYERS = "model.layers."
TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_LAYERS = TOWER + "encoder.layers."

PACKED_SCALE = ".absmax"
"""What bitsandbytes stores beside a 4-bit weight, under the weight's name; the weight may be packed into any dtype, floats among them."""


def declared_shapes(config: Any) -> Shapes:
    """Parameter name in a checkpoint -> shape, for a Llama- or Mistral-shaped model and its multimodal parts."""
    shapes = _language_shapes(config)
    if getattr(config, "vision_config", None) is not None:
        shapes |= _tower_shapes(config) | _projector_shapes(config)
        if config.mm_patch_merge_type == "spatial_unpad":
            shapes["model.image_newline"] = (config.hidden_size,)
        if config.router_select:
            shapes |= _router_shapes(config)
    return shapes


def check_shapes(config: Any, stored: Mapping[str, StoredTensor], source: Any) -> None:
    """Refuse weights of other sizes than the configuration declares; missing and unknown ones are reported by loading.

    Args:
        stored: headers of the weights; packed ones of a quantisation have shapes of their own.
        source: the checkpoint, for the error.

    Raises:
        ValueError: naming both sizes.
    """
    tower = getattr(config, "vision_config", None)
    counts = {"num_hidden_layers": (LAYERS, config.num_hidden_layers)}
    if tower is not None:
        counts["vision_config.num_hidden_layers"] = (TOWER_LAYERS, vision_fields(tower)["num_hidden_layers"])
    for field, (prefix, declared) in counts.items():
        compare_layers(field, declared, re.escape(prefix), stored, source)
    compare_shapes(declared_shapes(config), stored, source)


def compare_layers(field: str, declared: int, before_number: str, stored: Mapping[str, StoredTensor], source: Any) -> None:
    """Refuse a number of layers that the weights do not have.

    Args:
        field: of the configuration, with its value `declared`. before_number: a pattern of what stands before a layer's number in names.

    Raises:
        ValueError: naming both numbers.
    """
    numbers = [match for name in stored if (match := re.match(before_number + r"(\d{1,9})\.", name))]
    held = 1 + max((int(match[1]) for match in numbers), default=-1)
    if held not in (0, declared):
        raise ValueError(f"{field} is {declared}, but the weights of {source} hold {held} layers; {_CURE}")


def compare_shapes(shapes: Shapes, stored: Mapping[str, StoredTensor], source: Any) -> None:
    """Refuse weights of other shapes than `shapes` has under their names.

    Raises:
        ValueError: naming both shapes.
    """
    packed = {name.removesuffix(PACKED_SCALE) for name in stored if name.endswith(PACKED_SCALE)}
    judged = {name: tensor for name, tensor in stored.items() if name in shapes and name not in packed and tensor.dtype in FLOATS}
    wrong = [name for name, tensor in judged.items() if tensor.shape != shapes[name]]
    if wrong:
        first = min(wrong, key=lambda name: (len(name), name))
        raise ValueError(
            f"The weights of {source} do not fit its configuration: {first} has shape {list(stored[first].shape)}, but the configuration "
            f"makes it {list(shapes[first])}{f', and {len(wrong) - 1} more differ' if len(wrong) > 1 else ''}; {_CURE}"
        )


_CURE = "use the config.json that was saved with them."


def _language_shapes(config: Any) -> Shapes:
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention_bias, mlp_bias = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    linears = {
        "self_attn.q_proj": (queries, width, attention_bias),
        "self_attn.k_proj": (keys, width, attention_bias),
        "self_attn.v_proj": (keys, width, attention_bias),
        "self_attn.o_proj": (width, queries, attention_bias),
        "mlp.gate_proj": (inner, width, mlp_bias),
        "mlp.up_proj": (inner, width, mlp_bias),
        "mlp.down_proj": (width, inner, mlp_bias),
    }
    layer: Shapes = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, (rows, columns, has_bias) in linears.items():
        layer |= _linear(name, rows, columns, has_bias)
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config.vocab_size, width),
    }
    return shapes | {f"{LAYERS}{index}.{name}": shape for index in range(config.num_hidden_layers) for name, shape in layer.items()}


def _tower_shapes(config: Any) -> Shapes:
    vision = vision_fields(config.vision_config)
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    height, across = config.patch_grid
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (height * across + 1, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= _norm(norm, width)
    layer: Shapes = _norm("layer_norm1", width) | _norm("layer_norm2", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _linear(f"self_attn.{name}", width, width)
    layer |= _linear("mlp.fc1", inner, width) | _linear("mlp.fc2", width, inner)
    whole = {f"{TOWER}{name}": shape for name, shape in shapes.items()}
    layers = range(vision["num_hidden_layers"])
    return whole | {f"{TOWER_LAYERS}{index}.{name}": shape for index in layers for name, shape in layer.items()}


def _projector_shapes(config: Any) -> Shapes:
    vision_width, width = vision_fields(config.vision_config)["hidden_size"], config.hidden_size
    if config.mm_projector_type == "identity":
        return {}
    if config.mm_projector_type == "linear":
        return _linear("model.mm_projector", width, vision_width)
    depth = int(config.mm_projector_type.removeprefix("mlp").removesuffix("x_gelu"))
    shapes: Shapes = {}
    for place in range(depth):
        shapes |= _linear(f"model.mm_projector.{2 * place}", width, vision_width if place == 0 else width)
    return shapes


def _router_shapes(config: Any) -> Shapes:
    width, levels = config.hidden_size, config.levels
    inner = config.router_hidden_size or width
    reduce = {} if config.router_hidden_size is None else _linear("reduce", inner, width)
    shapes: Shapes = {
        "merger.self_attn.in_proj_weight": (3 * inner, inner),
        "merger.self_attn.in_proj_bias": (3 * inner,),
        "voter": (sum(level.tokens for level in levels) + config.filtered_text_num, 1),
        **reduce,
        **_norm("merger.norm1", inner),
        **_norm("merger.norm2", inner),
        **_norm("norm", len(levels)),
        **_linear("router.2", len(levels), inner),
    }
    for name in ("merger.self_attn.out_proj", "merger.linear1", "merger.linear2", "router.0"):
        shapes |= _linear(name, inner, inner)
    return {f"model.router.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
