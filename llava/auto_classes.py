"""transformers' Auto classes know our models from `import llava` on, without torch or a model being imported for it.

transformers keeps what others register in one dictionary per Auto class. Here it becomes one that imports our models, which register
themselves, at the first question that may be about them. It is put in place when transformers' module is imported, which may be before or
after this package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPES = ("avg_llava", "llava_llama", "llava_mistral")
"""What our configurations are registered under."""

_MAPPINGS = {
    "transformers.models.auto.configuration_auto": "CONFIG_MAPPING",
    "transformers.models.auto.image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "transformers.models.auto.processing_auto": "PROCESSOR_MAPPING",
}
"""Modules whose mapping is asked first: for a model type, or for a processor by its class's name. All other Auto classes ask for the
configuration before anything else."""


class Registered(dict[Any, Any]):
    """What is registered with one Auto class, ours included from the first look at it on."""

    def __contains__(self, key: object) -> bool:
        if key in MODEL_TYPES:
            _register()
        return super().__contains__(key)

    def values(self) -> Any:
        """The classes, for a search by name."""
        _register()
        return super().values()


def _register() -> None:
    """Import our models, which register themselves; while that is under way, what they look up is found as it is."""
    importlib.import_module("llava.model")


def _prepare(module: ModuleType) -> None:
    mapping = getattr(module, _MAPPINGS[module.__name__])
    if not isinstance(mapping._extra_content, Registered):
        mapping._extra_content = Registered(mapping._extra_content)


class _Finder(MetaPathFinder):
    """Finds transformers' modules as Python does, and prepares them once they are imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _MAPPINGS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_prepare(module: ModuleType) -> None:
                execute(module)
                _prepare(module)

            loader.exec_module = execute_and_prepare
        return spec


def prepare_auto_classes() -> None:
    """Let the Auto classes know our models, those that are imported already and those that will be."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _MAPPINGS:
        if name in sys.modules:
            _prepare(sys.modules[name])
