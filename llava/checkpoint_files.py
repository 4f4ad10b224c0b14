"""The files of a checkpoint: where they are, their JSON and the headers of their weights, read within bounds.

Nothing here knows what a field means. Weights are looked at through their headers alone: names, shapes and dtypes of a file of
many gigabytes take milliseconds, so that what cannot work is refused before any of it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of transformers' `from_pretrained` that say where a file comes from."""
ONE_REPOSITORY = ("revision", "subfolder")
"""Those of them that mean nothing in another repository, such as the vision tower's."""

MOST_JSON_BYTES = 16 * 2**20
MOST_INDEX_BYTES = 256 * 2**20
DEEPEST_JSON = 32
"""Objects and lists within one another; what is deeper breaks the libraries that copy it."""

FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISED = {"bitsandbytes": ("U8", "I8"), "compressed-tensors": ("I8", "I32", "I64", "F8_E4M3")}
"""Quantisation method in config.json -> dtypes of safetensors that its packed weights have."""
STORED_BUFFERS = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")
"""Buffers that older libraries stored and today's compute: never read, whatever they hold."""

LIBRARY_ERRORS = (
    *(TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError, MemoryError),
    *(SafetensorError, StrictDataclassError),
)
"""What other libraries raise where they stumble over a value that no rule of ours is about (`RecursionError` is a `RuntimeError`)."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor: its shape, and its dtype in safetensors' words (`F32`, `BF16`, `I8` ...)."""

    shape: tuple[int, ...]
    dtype: str


def hub_options(given: Mapping[str, Any], elsewhere: bool = False) -> dict[str, Any]:
    """The arguments among `given` that say where a file comes from; `elsewhere` leaves out `ONE_REPOSITORY`."""
    return {name: given[name] for name in HUB_OPTIONS if name in given and not (elsewhere and name in ONE_REPOSITORY)}


def stored_file(path: str | Path, name: str, hub: Mapping[str, Any] | None = None) -> Path | None:
    """A file of a checkpoint folder or hub id, or `None` where it has none of that name.

    Raises:
        OSError: a hub id that cannot be reached and is not in the cache.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **(hub or {}))
    return None if found is None else Path(found)


def read_object(file: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: a file that is too large, no JSON, nested too deeply, or holds something else than an object.
    """
    size = file.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{file} has {size:,} bytes, at most {most_bytes:,} are expected in such a file; copy it again.")
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be read; use the file that was saved with the weights.") from error
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object, as in {{...}}.")
    if is_deeper(found):
        raise ValueError(f"{file} is nested more than {DEEPEST_JSON} levels deep; use the file that was saved with the weights.")
    return found


def is_deeper(found: Any, levels: int = DEEPEST_JSON) -> bool:
    """Whether a JSON value has objects and lists within one another beyond some levels."""
    level: list[Any] = [found]
    for _ in range(levels):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [value for item in inner for value in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def weight_files(path: str | Path, hub: Mapping[str, Any] | None = None) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the single one; they may be missing.

    Raises:
        ValueError: an index without a map of file names, or one that names files outside its folder. A name may be a link, as in the
            hub's cache.
    """
    index = stored_file(path, INDEX, hub)
    if index is None:
        single = stored_file(path, WEIGHTS, hub)
        return [] if single is None else [single]
    weight_map = read_object(index, MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from parameters to files; copy the checkpoint again.")
    names = {str(name) for name in weight_map.values()}
    foreign = sorted(name for name in names if not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name))
    if foreign:
        raise ValueError(
            f"{index} names {foreign[0][:200]!r}, expected names of .safetensors files in its own folder; use the index that was saved "
            "with the weights."
        )
    if Path(path).is_dir():
        return [Path(path) / name for name in sorted(names)]
    return [file for name in sorted(names) if (file := stored_file(path, name, hub)) is not None]


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors in some safetensors files; no weight is read.

    Raises:
        ValueError: a file that is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # it is no mapping
                found.update({name: StoredTensor(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()})
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({one_line(error)}); copy it again.") from error
    return found


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of one small safetensors file, such as a projector or an adapter.

    Raises:
        ValueError: a damaged file, or tensors that are no floating-point weights.
    """
    check_dtypes(read_headers([file]), file)
    return load_file(file)


def check_dtypes(stored: Mapping[str, StoredTensor], source: Any, quantised_by: str | None = None) -> None:
    """Refuse weights that are no floating-point numbers, other than those of a quantisation that we know.

    Raises:
        ValueError: naming the first of them.
    """
    allowed = FLOATS + QUANTISED.get(quantised_by or "", ())
    wrong = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype not in allowed and not is_stored_buffer(name)}
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"{source} holds {len(wrong)} tensors that are no floating-point weights ({first[:100]} is {wrong[first]}), expected "
            f"{', '.join(allowed)}; use the weights as they were saved, or load them with load_8bit or load_4bit to quantise."
        )


def is_stored_buffer(name: str) -> bool:
    """Whether a stored tensor is one of `STORED_BUFFERS`."""
    return any(re.search(pattern, name) for pattern in STORED_BUFFERS)


def one_line(error: BaseException) -> str:
    """Another library's error, as a clause of our sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
