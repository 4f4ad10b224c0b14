"""Adapter folders: the LoRA matrices of a language model, and the parts that were trained in full beside them.

    adapter_config.json                 peft's: rank, scale, which layers, the base model
    adapter_model.safetensors           peft's: the low-rank matrices, under peft's names
    non_lora_trainables.safetensors     projector, newline vector, router, and the vision tower where it was trained
    config.json                         ours: every field of the multimodal configuration
    tokenizer files                     in folders that our trainer wrote

A folder is an adapter because `adapter_config.json` is in it. The matrices are injected into the language model in place, so
the model keeps its class, and parameters that are not LoRA's keep their names. LLaVA's
own adapter folders are read too; their pickled files only if the caller allows it. Folders that PEFT alone wrote, the first two files, may
change any part of a model and are merged into it.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.checkpoint_files import LIBRARY_ERRORS, one_line, read_headers, read_object, read_weights
from llava.model.router import name_in_checkpoint, name_in_memory
from llava.rules import Either, Flag, Integer, ListOf, Mapped, Number, Rule, Text, faults, optional, refuse, shown

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
REST_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PEFT_PREFIX = "base_model.model."
LANGUAGE_LAYERS = ("model.layers.", "model.language_model.layers.")
"""Where the language model's layers are: in LLaVA's layout, and in the native one."""
REST_PREFIXES = ("model.mm_projector.", "model.multi_modal_projector.", "model.image_newline", "model.router.")
TOWER_PREFIX = "model.vision_tower."


LAYER_PATTERN = Text(
    # What backtracks without end repeats a group, or repeats often.
    r"(?!.*\)[*+{?])(?:[^*+{]*[*+{]){0,3}[^*+{]*",
    "names of layers, or a pattern with up to three repetitions and none of a group",
)
ALPHA, RANK = Number(0, 1e6, above=True), Integer(1, 65536)
NONE = optional(ListOf(Text(), 0, 0))
LORA_RULES: dict[str, Rule] = {
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": Number(0, 1),
    "base_model_name_or_path": optional(Text(shortest=0)),
    "target_modules": Either(LAYER_PATTERN, ListOf(Text(), 1)),
    "exclude_modules": optional(Either(LAYER_PATTERN, ListOf(Text()))),
    "rank_pattern": optional(Mapped(RANK)),
    "alpha_pattern": optional(Mapped(ALPHA)),
    "layers_to_transform": optional(Either(Integer(0, 2048), ListOf(Integer(0, 2048)))),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "lora_bias"), optional(Flag())),
    **dict.fromkeys(("layers_pattern", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters"), NONE),
}
"""Fields of adapter_config.json; LoRA in the language model's linear layers is all that such a folder holds."""
STOCK_RULES = {**LORA_RULES, "modules_to_save": optional(ListOf(Text()))}
"""The same in folders that PEFT alone wrote, which may have whole parts beside the matrices."""


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter, by its content."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def is_stock_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter as PEFT alone writes it: nothing in it says what model it changes, or has parts of our own."""
    return is_adapter(path) and not any((Path(path) / name).is_file() for name in ("config.json", *REST_FILES))


def has_adapter(model: Any) -> bool:
    """Whether this model's language model has LoRA matrices that are not merged."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_base(folder: str | Path, model_base: str | None = None) -> str:
    """The model that an adapter belongs to: the caller's, or the one that the adapter names.

    Raises:
        ValueError: neither is given, a local model that no longer exists, or a base that is itself an adapter.
    """
    base = model_base
    if base is None:
        rules = STOCK_RULES if is_stock_adapter(folder) else LORA_RULES
        base = _read_adapter_config(folder, rules).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{folder} does not name the model it belongs to; give it as model_base.")
        near = [Path(base), Path(folder) / base, Path(folder).parent / base]
        base = next((str(path) for path in near if path.is_dir()), base)
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ValueError(f"{folder} was trained on {base}, which does not exist; give the model's current path as model_base.")
    if is_adapter(base):
        raise ValueError(f"{base} is an adapter itself; merge it with scripts/merge_lora_weights.py and give the merged model.")
    return base


def tokenizer_source(folder: str | Path, base: str) -> str:
    """Where an adapter's tokenizer is: in its folder, or, for folders of LLaVA or PEFT alone, with the base model."""
    if is_stock_adapter(folder):
        return base
    return str(folder) if any((Path(folder) / name).is_file() for name in TOKENIZER_FILES) else base


def read_lora_config(folder: str | Path, any_part: bool = False) -> Any:
    """Peft's configuration of an adapter folder, limited to the language model.

    Args:
        any_part: do not limit it, and let it have whole parts, as in folders that PEFT alone wrote.

    Raises:
        ValueError: a method other than LoRA, or LoRA with biases of the base model.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            f'{folder} is an adapter, and reading it needs peft; run pip install -e ".[train]", or merge it elsewhere with '
            "scripts/merge_lora_weights.py."
        ) from error

    stored = _read_adapter_config(folder, STOCK_RULES if any_part else LORA_RULES)
    if stored.get("peft_type") != "LORA" or stored.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} holds an adapter of type {str(stored.get('peft_type'))[:40]} with bias {shown(stored.get('bias'))}; expected LORA "
            "with bias 'none'."
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The {ADAPTER_CONFIG} of {folder} cannot work: {one_line(error)}.") from error
    _check_ranks(Path(folder), config)
    if config.exclude_modules is None and not any_part:
        # LLaVA's adapters name layers by their last word (q_proj ...), which the vision tower has too.
        config.exclude_modules = rf"(?!{layer_pattern()}).*"
    return config


def _read_adapter_config(folder: str | Path, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """adapter_config.json, judged by `LORA_RULES` or `STOCK_RULES`."""
    file = Path(folder) / ADAPTER_CONFIG
    stored = read_object(file)
    found = faults(stored, rules)
    if not found:
        layers = [name for field in ("rank_pattern", "alpha_pattern") for name in stored.get(field) or ()]
        wrong = [name for name in layers if not re.fullmatch(r"\^?(?:\w|\\?\.)+\$?", name)]  # they are patterns, tried on every layer
        found = [f"rank_pattern or alpha_pattern names {shown(name)}, expected a layer's name" for name in wrong]
    refuse(file, found)
    return stored


def _check_ranks(folder: Path, config: Any) -> None:
    """Compare the ranks in the headers of the weights with the configuration, before matrices of those ranks are created."""
    file = folder / ADAPTER_FILES[0]
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    stored = read_headers([file]) if file.is_file() else {}
    for name, tensor in stored.items():
        if ".lora_A." in name and tensor.shape[:1] and tensor.shape[0] not in ranks:
            rank = tensor.shape[0]
            raise ValueError(f"{file}: LoRA does not fit its {ADAPTER_CONFIG}: {name[:200]} has rank {rank}, but r is {config.r}.")


def layer_pattern() -> str:
    """A pattern of the names of what is in the language model's layers, up to the layer's number."""
    return f"(?:{'|'.join(prefix.replace('.', '[.]') for prefix in LANGUAGE_LAYERS)})"


def attach_adapter(model: Any, config: Any, dtype: torch.dtype = torch.float32) -> None:
    """Insert LoRA matrices into the language model, in place; at first they change nothing.

    Args:
        model: a multimodal language model, quantised or not.
        config: peft's `LoraConfig`; layers outside the language model are refused.
        dtype: of the matrices; float32 unless something else keeps a float32 copy of them.

    Raises:
        ValueError: the configuration names no layer of the language model, or layers elsewhere.
    """
    base = config.base_model_name_or_path
    try:
        model.add_adapter(config)
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The adapter does not fit the language model under it ({one_line(error)}); check its base.") from error
    config.base_model_name_or_path = base  # transformers has just put its own guess there
    matrices = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    elsewhere = sorted(name for name in matrices if not name.startswith(LANGUAGE_LAYERS))
    if elsewhere:
        raise ValueError(f"the adapter changes more than the language model: {elsewhere[0]} and {len(elsewhere) - 1} others.")
    for parameter in matrices.values():
        parameter.data = parameter.data.to(dtype)


def load_lora(model: Any, folder: str | Path, use_safetensors: bool = True) -> None:
    """Load attached matrices from an adapter folder.

    Raises:
        ValueError: the folder's matrices are not exactly this model's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    stored = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in _read(Path(folder), ADAPTER_FILES, use_safetensors).items()}
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_names(f"{folder}: LoRA", own, stored)
    set_peft_model_state_dict(model, stored)


def merge_stock_adapter(model: Any, folder: str | Path, use_safetensors: bool = True) -> Any:
    """A model with what a folder that PEFT alone wrote changes in it, whichever its parts.

    Args:
        model: whole, not quantised; it is changed in place.
        use_safetensors: `False` also reads a pickled `adapter_model.bin`, with `weights_only`.

    Raises:
        ValueError: the folder's matrices and parts are not exactly those that its configuration gives this model, or not finite.
    """
    config = read_lora_config(folder, any_part=True)  # which says what to install where peft is missing
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    stored = _read(Path(folder), ADAPTER_FILES, use_safetensors)
    config.base_model_name_or_path = model.name_or_path  # PEFT would put it there with a warning, where the model has moved
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The adapter does not fit the model under it ({one_line(error)}); check its base.") from error
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_names(f"{folder}: LoRA", own, stored)
    set_peft_model_state_dict(adapted, stored)
    return adapted.merge_and_unload(safe_merge=True)


def read_rest(folder: str | Path, use_safetensors: bool = True) -> dict[str, Tensor]:
    """The parts of an adapter folder that were trained in full, under their names in a model.

    Args:
        use_safetensors: `False` also reads LLaVA's pickled `non_lora_trainables.bin`, with `weights_only`.

    Raises:
        ValueError: no such file, or only a pickled one that the caller did not ask for.
    """
    stored = _read(Path(folder), REST_FILES, use_safetensors)
    return {name_in_memory(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in stored.items()}


def load_rest(model: Any, rest: Mapping[str, Tensor], source: str | Path) -> None:
    """Load projector, newline, router and tower from `read_rest`, and remember a tower so that it is saved again.

    Raises:
        ValueError: weights that this model has no place for.
    """
    own = model.state_dict()
    _check_names(f"{source}: {REST_FILES[0]}", {name: own[name] for name in rest if name in own}, rest)
    with torch.no_grad():
        for name, tensor in rest.items():
            own[name].copy_(tensor)
    model.adapter_holds_tower = any(name.startswith(TOWER_PREFIX) for name in rest)


def rest_names(model: Any) -> set[str]:
    """Parameters that go into the rest file: projector, newline, router; the tower where it is trained or came with the adapter."""
    trained = any(parameter.requires_grad for name, parameter in model.named_parameters() if name.startswith(TOWER_PREFIX))
    prefixes: tuple[str, ...] = REST_PREFIXES
    if trained or getattr(model, "adapter_holds_tower", False):
        prefixes += (TOWER_PREFIX,)
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def save_adapter(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write everything but the tokenizer of an adapter folder.

    Args:
        model: with an attached adapter.
        folder: created where it is missing. Write to a staging folder if others may read it meanwhile.
        state_dict: the model's weights, where they were gathered from several processes.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state_dict is None else state_dict
    matrices = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    _write({f"{PEFT_PREFIX}{name}": tensor for name, tensor in matrices.items()}, folder / ADAPTER_FILES[0])
    _write({name_in_checkpoint(name): weights[name] for name in rest_names(model)}, folder / REST_FILES[0])
    lora_config = copy.copy(model.peft_config["default"])
    lora_config.inference_mode = True
    lora_config.save_pretrained(str(folder))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how the language model was held in memory, not a property of the adapter
    config.save_pretrained(folder)


def restore_adapter(model: Any, folder: Path) -> None:
    """Load one of its own checkpoints into a model that trains an adapter.

    Raises:
        ValueError: the checkpoint holds other parameters, or was made with another rank or scale.
    """
    stored, own = read_lora_config(folder), model.peft_config["default"]
    for name in ("r", "lora_alpha"):
        if getattr(stored, name) != getattr(own, name):
            raise ValueError(
                f"checkpoint {folder} has {name} {getattr(stored, name)}, but this run has {getattr(own, name)}; resume with "
                "the flags the checkpoint was made with."
            )
    rest, expected = read_rest(folder), rest_names(model)
    if set(rest) != expected:
        differing = sorted(set(rest) ^ expected)
        raise ValueError(
            f"checkpoint {folder} and the model differ in {len(differing)} parameters, {differing[0]} among them; resume with "
            "the flags the checkpoint was made with."
        )
    load_lora(model, folder)
    load_rest(model, rest, folder)


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Add the low-rank matrices to their layers and remove them, in place.

    The sum is computed in float32 and rounded once to the layer's own dtype.

    Raises:
        ValueError: a quantised language model, or matrices that are not finite.
    """
    from peft.tuners.lora import LoraLayer

    if getattr(model, "is_quantized", False):
        raise ValueError("LoRA cannot be merged into quantised weights without large rounding errors; load the model in 16 bits.")
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        whole: Any = layer.get_base_layer()
        dtype = whole.weight.dtype
        whole.weight.data = whole.weight.data.float()
        layer.merge(safe_merge=True)  # type: ignore[operator]
        whole.weight.data = whole.weight.data.to(dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, whole)
    del model.peft_config
    model._hf_peft_config_loaded = False


def language_linears(model: nn.Module) -> list[str]:
    """Last words of the language model's linear layers, as in `q_proj`."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(LANGUAGE_LAYERS)
        }
    )


def _read(folder: Path, names: tuple[str, str], use_safetensors: bool) -> dict[str, Tensor]:
    safe, pickled = (folder / name for name in names)
    if safe.is_file():
        return read_weights(safe)
    if not pickled.is_file():
        raise ValueError(f"{folder} has an {ADAPTER_CONFIG} but no {names[0]}; copy the adapter again.")
    if use_safetensors:
        raise ValueError(f"{pickled} is a pickled file; pass use_safetensors=False if you trust it.")
    return torch.load(pickled, map_location="cpu", weights_only=True)


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _check_names(what: str, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    wrong: Collection[str] = sorted(
        set(own) ^ set(stored) | {name for name in set(own) & set(stored) if own[name].shape != stored[name].shape}
    )
    if wrong:
        shown = ", ".join(list(wrong)[:3])
        raise ValueError(f"{what} does not fit the model: {len(wrong)} missing, unexpected or of another shape ({shown}); check the base.")
