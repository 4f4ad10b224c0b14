"""The native model's code beside its weights, for `trust_remote_code=True` where this package is not installed.

transformers takes code from a checkpoint folder as flat files that import one another with `from .name import`. These are made from the
package's own modules: those that the native face's four reach by imports, each with its imports of `llava.a.b` turned into `.b`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from llava import __version__
from llava.checkpoint_files import read_object

_FACE = "llava.model.native"
AUTO_MAP = {
    "AutoConfig": "configuration_avg_llava.AvgLlavaConfig",
    "AutoModel": "modeling_avg_llava.AvgLlavaModel",
    "AutoModelForImageTextToText": "modeling_avg_llava.AvgLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_avg_llava.AvgLlavaForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_avg_llava.AvgLlavaForConditionalGeneration",
    "AutoImageProcessor": "image_processing_avg_llava.AvgLlavaImageProcessor",
    "AutoProcessor": "processing_avg_llava.AvgLlavaProcessor",
}
"""Auto class -> file and class, as transformers reads it from a folder."""


def portable_modules() -> dict[str, str]:
    """File name -> source of every module that the native face needs."""
    waiting = [f"{_FACE}.{entry.split('.')[0]}" for entry in AUTO_MAP.values()]
    found: dict[str, tuple[str, str]] = {}
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2]
        if name in found:
            assert found[name][0] == module, f"{found[name][0]} and {module} would be one file, {name}.py"
            continue
        source = _source(module)
        imports = list(_own_imports(source))
        found[name] = (module, _relative(source, imports))
        waiting += [node.module for node in imports if node.module]
    origin = "# {} of AVG-LLaVA {}, with its imports made relative, so that transformers loads it from a checkpoint folder.\n"
    return {f"{name}.py": origin.format(module, __version__) + source for name, (module, source) in sorted(found.items())}


def write_code(folder: Path) -> None:
    """Put the code into a native checkpoint folder, and say in its configurations which class is where.

    Raises:
        ValueError: the folder has no configuration of a model or of a processor.
    """
    files = {name: folder / name for name in ("config.json", "processor_config.json")}
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"{folder} has no {name}; save model and processor there first.")
    model, processor = (read_object(file) for file in files.values())
    for name, source in portable_modules().items():
        (folder / name).write_text(source, encoding="utf-8")
    processor |= {"auto_map": AUTO_MAP, "image_processor": {**processor["image_processor"], "auto_map": AUTO_MAP}}
    for file, values in zip(files.values(), ({**model, "auto_map": AUTO_MAP}, processor), strict=True):
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    return resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")


def _own_imports(source: str) -> Iterator[ast.ImportFrom]:
    """The imports of this package, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] == "llava" for name in names), f"import {names} cannot be made relative; import from the module"
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "llava":
            yield node


def _relative(source: str, imports: list[ast.ImportFrom]) -> str:
    lines = source.splitlines(keepends=True)
    for node in imports:
        assert node.module is not None, "an import of this package names its module"
        row = node.lineno - 1
        lines[row] = lines[row].replace(f"from {node.module} import", f"from .{node.module.rpartition('.')[2]} import", 1)
    return "".join(lines)
