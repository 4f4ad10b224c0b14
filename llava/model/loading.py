"""Reading checkpoints: where the vision tower comes from, which keys must be there, and one clear error when something is not.

Only safetensors are read. Pickled weights (`.bin`) are read when the caller passes `use_safetensors=False`, and then with
`weights_only`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.checkpoint_files import (
    LIBRARY_ERRORS,
    STORED_BUFFERS,
    check_dtypes,
    hub_options,
    one_line,
    read_headers,
    read_object,
    stored_file,
    weight_files,
)
from llava.model.adapter import TOWER_PREFIX, has_adapter, is_adapter, save_adapter
from llava.model.config import check_generation_fields, check_language_fields, check_positions, quantised_by
from llava.model.shapes import check_shapes
from llava.rules import shown

logger = logging.getLogger(__name__)

MULTIMODAL_PREFIXES = (TOWER_PREFIX, "model.mm_projector.", "model.image_newline", "model.router.")


def resolve_tower(name: str, checkpoint: str | Path | None = None) -> str:
    """Where a tower named in a configuration is: a folder as given, beside or in the checkpoint, or else a hub id, unchanged."""
    candidates = [Path(name)]
    if checkpoint is not None and not Path(name).is_absolute():
        candidates += [Path(checkpoint) / name, Path(checkpoint).parent / name]
    return next((str(folder) for folder in candidates if folder.is_dir()), name)


def read_tower_config(tower: str, hub: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tower's vision configuration and its image processor's arguments, from a folder or the hub.

    Args:
        hub: transformers' options for it, such as `cache_dir`.

    Raises:
        ValueError: nothing of the kind is there.
    """
    try:
        for name in ("config.json", "preprocessor_config.json"):
            if (file := stored_file(tower, name, hub)) is not None:
                read_object(file)
        vision = CLIPVisionConfig.from_pretrained(tower, **(hub or {})).to_diff_dict()
        processor = CLIPImageProcessorPil.from_pretrained(tower, **(hub or {})).to_dict()
    except (OSError, ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(
            f"The vision tower {tower!r} could not be read ({type(error).__name__}); give mm_vision_tower a local CLIP folder with "
            "config.json and preprocessor_config.json, or a hub id that can be reached."
        ) from error
    defaults = {key: getattr(CLIPVisionConfig(), key) for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")}
    kept: tuple[str, ...] = ("size", "crop_size", "image_mean", "image_std", "do_resize", "do_center_crop", "do_rescale")
    kept += ("rescale_factor", "do_normalize", "resample", "do_convert_rgb")
    return {**defaults, **_plain(vision)}, {key: processor[key] for key in kept if key in processor}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")
    return {key: value for key, value in config.items() if key not in dropped}


def read_stored_config(path: str | Path, hub: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the config.json of a folder or hub id holds, its `model_type` a text.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, so it is not a checkpoint folder.")
    try:
        file = stored_file(path, "config.json", hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No checkpoint could be read at {str(path)!r} ({type(error).__name__}); give a folder or a hub id that can be reached."
        ) from error
    if file is None:
        raise ValueError(f"{path} has no config.json, so it is not a checkpoint.")
    stored = read_object(file)
    if not isinstance(stored.get("model_type", ""), str):
        raise ValueError(f"model_type is {shown(stored['model_type'])} in {file}, expected the name of one.")
    return stored


def check_stored(
    path: str | Path, config: Any, hub: Mapping[str, Any] | None = None, check: Callable[[Any, Any, Any], None] = check_shapes
) -> None:
    """Hold the weights' headers and the generation configuration against a model's configuration, before it is built.

    Args:
        check: of the configuration, the headers and the checkpoint, as `check_shapes`.

    Raises:
        ValueError: weights of other sizes or of no floating-point dtype, damaged files, an index that leaves its folder, or generation
            settings that cannot work.
    """
    settings = stored_file(path, "generation_config.json", hub)
    if settings is not None:
        check_generation_fields(read_object(settings), config.get_text_config().vocab_size, settings)
    stored = read_headers(weight_files(path, hub))
    check_dtypes(stored, path, quantised_by(getattr(config, "quantization_config", None)))
    check(config, stored, path)


def check_plain_model(
    path: str | Path, stored: Mapping[str, Any], config_class: Any, safetensors_only: bool = True, hub: Mapping[str, Any] | None = None
) -> None:
    """The same for a language model without multimodal parts, which transformers' own class reads.

    Args:
        stored: its config.json. config_class: transformers' configuration for that model type.
    """
    check_folder(path, safetensors_only)
    check_language_fields(stored, config_class)
    try:
        config = config_class.from_dict(dict(stored))
    except LIBRARY_ERRORS as error:
        raise ValueError(f"The configuration of {path} cannot work: {one_line(error)}.") from error
    check_positions(config)
    check_stored(path, config, hub)


def check_folder(path: str | Path, safetensors_only: bool) -> bool:
    """Refuse a local folder that cannot be a checkpoint, before anything is built.

    Returns:
        Whether safetensors are to be read: always, unless the caller allows pickled weights and there is nothing else.

    Raises:
        ValueError: no config.json, no weights, missing shards, or pickled weights that the caller did not ask for.
    """
    folder = Path(path)
    if not folder.exists():
        return safetensors_only
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    files = weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks the weight files {missing} that its index names; copy the checkpoint again.")
    if files:
        return True
    if is_adapter(folder):
        raise ValueError(f"{folder} holds an adapter, not a whole model; load it with load_pretrained_model, or merge it first.")
    if not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json.")
    if safetensors_only:
        raise ValueError(
            f"{folder} holds pickled weights (.bin) only; convert them to safetensors, or pass use_safetensors=False if you trust them."
        )
    return False


class CheckpointLoading:
    """`from_pretrained` that finds the vision tower and refuses incomplete checkpoints; `save_pretrained` that knows adapters."""

    _keys_to_ignore_on_load_unexpected = list(STORED_BUFFERS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint: LLaVA's released layout, our own, or a plain language model without multimodal parts.

        Args:
            pretrained_model_name_or_path: a folder or hub id.
            use_safetensors: `False` also reads pickled weights; only for files you trust.
            kwargs: transformers' own; `config` is read from the checkpoint when missing.

        Raises:
            ValueError: a folder without weights, another model type, or keys that are missing or unexpected.
        """
        hub = hub_options(kwargs)
        kwargs["use_safetensors"] = check_folder(pretrained_model_name_or_path, kwargs.get("use_safetensors", True))
        output_loading_info = kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None) or cls._read_config(pretrained_model_name_or_path, hub)
        tower = cls._complete_tower(config, pretrained_model_name_or_path, hub)
        cls._check_stored(pretrained_model_name_or_path, config, hub)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        missing = set(info["missing_keys"])
        if tower is not None and missing and all(key.startswith(TOWER_PREFIX) for key in missing):
            load_tower_weights(model, tower, hub)
            missing = set()
        if missing or info["unexpected_keys"]:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} do not fit its configuration: missing {_some(missing)}, unexpected "
                f"{_some(info['unexpected_keys'])}; use the config.json that was saved with them."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_base(cls, base: Any, config: Any, tower: str | None, held: Collection[str] | None = None, **kwargs: Any) -> Any:
        """A language model's weights under a multimodal configuration: the tower is read, projector, newline and router are fresh.

        Args:
            base: folder or hub id of the language model, or of a multimodal model whose parts are then taken too.
            tower: folder or hub id of the vision tower, read where `base` has none.
            held: parameters that the caller brings; the other multimodal ones must then be in `base`. `None`: fresh ones will do.

        Raises:
            ValueError: weights that do not fit the configuration, or parts that nobody brings.
        """
        kwargs["use_safetensors"] = check_folder(base, kwargs.get("use_safetensors", True))
        hub = hub_options(kwargs)
        cls._check_stored(base, config, hub)
        model, info = super().from_pretrained(base, config=config, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = {key for key in info["missing_keys"] if not key.startswith(TOWER_PREFIX)}
        fresh = {key for key in missing if key.startswith(MULTIMODAL_PREFIXES)}
        missing -= fresh if held is None else set(held)
        if fresh and held is None:
            logger.info("%s has no %s; these begin anew", base, ", ".join(sorted({".".join(key.split(".")[:2]) for key in fresh})))
        if missing or info["unexpected_keys"]:
            raise ValueError(
                f"The language model {base} does not fit the configuration: missing {_some(missing)}, "
                f"unexpected {_some(info['unexpected_keys'])}."
            )
        towers = {key for key in info["missing_keys"] if key.startswith(TOWER_PREFIX)} - set(held or ())
        if towers and tower is not None:
            load_tower_weights(model, tower, hub)
        return model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write a checkpoint folder as transformers does, or an adapter folder where LoRA matrices are attached."""
        if not has_adapter(self):
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)  # type: ignore[misc]
        elif is_main_process:
            save_adapter(self, Path(save_directory), state_dict)

    @classmethod
    def _check_stored(cls, path: Any, config: Any, hub: Mapping[str, Any] | None = None) -> None:
        check_stored(path, config, hub)

    @classmethod
    def _read_config(cls, path: Any, hub: Mapping[str, Any] | None = None) -> Any:
        config_class = cls.config_class  # type: ignore[attr-defined]
        stored = read_stored_config(path, hub)
        kinds = [kind for kind in (config_class.model_type, config_class.language_model_type) if kind is not None]
        if stored.get("model_type") not in kinds:
            raise ValueError(f"{path} is of model type {stored.get('model_type')!r}, but {cls.__name__} reads {' or '.join(kinds)}.")
        return config_class.from_dict(stored)

    @staticmethod
    def _complete_tower(config: Any, path: Any, hub: Mapping[str, Any] | None = None) -> str | None:
        """Put the tower's configuration into ours where only its name is given; return where its weights may be."""
        if config.mm_vision_tower is None:
            return None
        tower = resolve_tower(config.mm_vision_tower, path)
        if config.vision_config is None:
            config.vision_config, config.image_processor = read_tower_config(tower, hub_options(hub or {}, elsewhere=True))
            config.check_multimodal_fields()
        return tower


def load_tower_weights(model: Any, tower: str, hub: Mapping[str, Any] | None = None) -> None:
    """Fill the vision tower of a model in LLaVA's layout from a CLIP folder or hub id.

    Args:
        model: anything with `get_vision_tower()`. hub: transformers' options of the model; those that hold for the tower's repository
            are used.

    Raises:
        ValueError: weights that do not fit, or are not all there.
    """
    module = model.get_vision_tower().vision_tower.vision_model
    try:
        options = hub_options(hub or {}, elsewhere=True)
        check_dtypes(read_headers(weight_files(tower, options)), tower)
        loaded: Any = CLIPVisionModel.from_pretrained(tower, dtype=module.dtype, output_loading_info=True, **options)
        stored, info = loaded
        if info["missing_keys"]:  # transformers fills them with noise; a whole CLIP's text model is left aside
            raise ValueError(f"The vision tower {tower!r} is not whole: missing {_some(info['missing_keys'])}; copy it again.")
        module.load_state_dict(stored.state_dict())
    except LIBRARY_ERRORS as error:
        raise ValueError(f"The weights of the vision tower {tower!r} do not fit its configuration ({one_line(error)}).") from error
    logger.info("Vision tower weights read from %s", tower)


def _some(keys: Any) -> str:
    names = sorted(keys)
    return "none" if not names else f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
