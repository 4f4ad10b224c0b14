"""The stored configuration of a text model or a vision tower is judged by rules before transformers reads it.

Any of transformers' models may be a part, so the rules go by a field's name where many models share it, and else by the type of its
default. What rules cannot say (which values go together) is tried out, see `outline.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from llava.checkpoint_files import LIBRARY_ERRORS, is_deeper, one_line
from llava.model.config import HEADS, LANGUAGE_RULES, ROPE_RULES, SIDE, VISION_RULES, WIDTH, foreign_names, token_faults
from llava.rules import Flag, Integer, Number, Rule, Text, faults, optional, refuse, shown

TEXT_MODEL: dict[str, Any] = {"model_type": "llama", "vocab_size": 32064}
"""Where no text model is given: as `llava-hf/llava-v1.6-vicuna-7b-hf`, whose image token is 32000."""
VISION_MODEL: dict[str, Any] = {"model_type": "clip_vision_model"}

NEEDED: dict[str, dict[str, Rule]] = {
    "text_config": {name: LANGUAGE_RULES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")},
    "vision_config": {"image_size": SIDE, "patch_size": SIDE, "hidden_size": WIDTH, "num_hidden_layers": VISION_RULES["num_hidden_layers"]},
}
"""What a part's configuration has to say, whatever its model type."""
_BY_NAME = {"text_config": LANGUAGE_RULES, "vision_config": VISION_RULES}
_BY_TYPE: dict[type, Rule] = {
    bool: optional(Flag()),
    int: optional(Integer(-1, 2**31 - 1)),
    float: optional(Number(-1e9, 1e9)),
    str: optional(Text(shortest=0)),
}
"""Type of a field's default -> what it may be, where its name says nothing."""
_DEFAULTS = {"text_config": TEXT_MODEL, "vision_config": VISION_MODEL}


def read_part(name: str, given: Any) -> PreTrainedConfig:
    """A part's configuration as an object.

    Args:
        name: `text_config` or `vision_config`. given: its values, with a `model_type`; `None` for the default; an object stays.

    Raises:
        ValueError: no configuration, one of a model type that this transformers does not know, or values that cannot work.
    """
    if isinstance(given, PreTrainedConfig):
        return given
    default = _DEFAULTS[name]
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name} is {shown(given)}, expected the values of a configuration.")
    if is_deeper(given):
        raise ValueError(f"{name} is nested too deeply; use the config.json that was saved with the weights.")
    values = dict(default if given is None else given)
    kind = values.pop("model_type", default["model_type"])
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{name}.model_type is {shown(kind)}, expected one that this transformers knows, such as {default['model_type']}.")
    config_class: Any = CONFIG_MAPPING[kind]
    refuse("The configuration", _faults(name, values, config_class))
    try:
        part = config_class(**values)
    except (ValueError, ImportError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The configuration cannot work: {name} is none ({one_line(error)}).") from error
    refuse("The configuration", list(_lacking(name, kind, part)) or list(_contradictions(name, part)))
    return part


def _faults(name: str, values: Mapping[str, Any], config_class: Any) -> list[str]:
    rules = {**_rules_by_type(config_class), **_BY_NAME[name]}
    judged = {field: value for field, value in values.items() if not isinstance(value, torch.dtype)}
    found = faults(judged, rules, name) + foreign_names(values, config_class, rules, name)
    for field in ("rope_parameters", "rope_scaling"):
        for inside, stored in _rope_tables(f"{name}.{field}", values.get(field)):
            found += faults(stored, ROPE_RULES, inside)
    return found


def _rules_by_type(config_class: Any) -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    for each in fields(config_class):
        if each.default is not MISSING and type(each.default) in _BY_TYPE:
            counts = each.name.startswith("num_") and type(each.default) is int
            found[each.name] = optional(Integer(0, HEADS.high)) if counts else _BY_TYPE[type(each.default)]
    return found


def _rope_tables(inside: str, stored: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Parameters of rotary positions: one table for all layers, or one per kind of layer."""
    if isinstance(stored, Mapping):
        yield inside, stored
        yield from ((f"{inside}.{kind}", table) for kind, table in stored.items() if isinstance(table, Mapping))


def _lacking(name: str, kind: str, part: Any) -> Iterator[str]:
    for field, rule in NEEDED[name].items():
        value = getattr(part, field, None)
        if not rule.accepts(value):
            yield f"{name}.{field} of a {kind} is {shown(value)}, expected {rule.expected}"


def _contradictions(name: str, part: Any) -> Iterator[str]:
    heads, groups = getattr(part, "num_attention_heads", None), getattr(part, "num_key_value_heads", None)
    if isinstance(heads, int) and heads and getattr(part, "head_dim", None) is None and part.hidden_size % heads:
        yield f"{name}.hidden_size is {part.hidden_size}, expected a multiple of the {heads} attention heads"
    if isinstance(heads, int) and groups and heads % groups:
        yield f"{name}.num_key_value_heads is {groups}, expected a divisor of the {heads} attention heads"
    if name == "text_config":
        yield from (f"{name}.{fault}" for fault in token_faults(part.to_dict(), part.vocab_size))
