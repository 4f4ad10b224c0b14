"""What `--data_path` names: one file of rows, or a manifest that mixes several.

A manifest is YAML; paths in it are relative to it:

    seed: 0                        # which rows a share draws; 0 if left out
    sources:
      - file: captions.json        # required: LLaVA's JSON or JSONL
        images: photos             # folder or shard; a list: asked in order; a mapping: by the prefix of a name
        weight: 0.5                # how often its rows are read per epoch; 1 if left out
        count: 1000                # rows the file must have
        sha256: "9f86d08..."       # checksum the file must have
        name: captions             # in reports and in the draw; the file's name if left out

A weight is a number of copies: 1 reads each row once per epoch, 2 twice, 0.5 reads half of the rows, drawn by `seed` and
`name` and the same half in every epoch, and 1.5 reads each row once and such a half a second time. Sources follow each other
in the manifest's order; the trainer shuffles.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import yaml

from llava.train.index import RowIndex, open_index
from llava.train.rows import Row
from llava.train.shards import ImageSource, map_images, open_images

ROW_FILES = (".json", ".jsonl")
MANIFESTS = (".yaml", ".yml")
_SOURCE_KEYS: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "images": (str, list, dict),
    "weight": (int, float),
    "count": (int,),
    "sha256": (str,),
    "name": (str,),
}


@dataclass(frozen=True)
class Source:
    """One file of a mixture.

    Attributes:
        name: in reports.
        rows: the file's rows.
        images: where their images are; `None`: the run's `--image_folder`.
        weight: how often a row is read per epoch.
        picks: (N,) numbers of the rows that are read, or `None`: each once.
    """

    name: str
    rows: RowIndex
    images: ImageSource | None = None
    weight: float = 1.0
    picks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.picks is None else len(self.picks)

    def number(self, position: int) -> int:
        """Number in the file of the row that is read at a position."""
        return position if self.picks is None else int(self.picks[position])

    def pick(self, column: np.ndarray) -> np.ndarray:
        """A column of the file for the rows that are read."""
        return column if self.picks is None else column[self.picks]


class Mixture(Sequence[Row]):
    """The rows of one epoch, unshuffled: those of the sources one after the other.

    Args:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._starts = np.cumsum([0, *map(len, self.sources)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of a row, and the row's number in its file."""
        index = range(len(self))[index]
        place = bisect_right(self._starts, index) - 1
        source = self.sources[place]
        return source, source.number(index - self._starts[place])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Parse a row.

        Raises:
            ValueError: the row is not JSON.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        source, number = self.locate(index)
        return source.rows[number]

    @property
    def words(self) -> np.ndarray:
        """(R,) words of every row."""
        return np.concatenate([source.pick(source.rows.words) for source in self.sources])

    @property
    def has_image(self) -> np.ndarray:
        """(R,) whether a row has images."""
        return np.concatenate([source.pick(source.rows.has_image) for source in self.sources])

    @property
    def image_groups(self) -> np.ndarray:
        """(R,) the same number for rows of one source about the same images; -1 without an image."""
        groups, start = [], 0
        for source in self.sources:
            own = source.pick(source.rows.image_groups)
            groups.append(np.where(own < 0, -1, own + start))
            start += len(source.rows) + 1
        return np.concatenate(groups)

    @property
    def answered(self) -> np.ndarray:
        """(R,) whether a row has an answer to train on."""
        return np.concatenate([source.pick(source.rows.answered) for source in self.sources])

    @property
    def unread(self) -> np.ndarray:
        """(R,) position in `UNREAD_KEYS` of a key that is not read, -1 without one."""
        return np.concatenate([source.pick(source.rows.unread) for source in self.sources])

    @property
    def fingerprint(self) -> str:
        """A digest of what is read, in order; no file is read for it."""
        digest = hashlib.sha256()
        for source in self.sources:
            picks = b"" if source.picks is None else source.picks.tobytes()
            images = source.images.fingerprint if source.images else ""
            digest.update(f"{source.rows.sha256} {hashlib.sha256(picks).hexdigest()} {images}\n".encode())
        return digest.hexdigest()

    def unweighted(self) -> Mixture:
        """Every row of every source once."""
        return Mixture([replace(source, weight=1.0, picks=None) for source in self.sources])


def open_rows(path: str | Path, cache: str | Path | None = None) -> Mixture:
    """The rows that `--data_path` names.

    Args:
        path: a `.json` or `.jsonl` file, or a `.yaml` manifest of several.
        cache: folder for indices, see `llava.train.derived_files`.

    Raises:
        ValueError: an unknown file extension, a file that does not hold rows, or a manifest that is wrong or does not match its files.
    """
    path = Path(path)
    if path.suffix.lower() in MANIFESTS:
        return _open_manifest(path, cache)
    if path.suffix.lower() not in ROW_FILES:
        known = " or ".join(ROW_FILES), " or ".join(MANIFESTS)
        raise ValueError(f"{path} ends in {path.suffix!r}, expected {known[0]} for rows, or {known[1]} for a manifest.")
    return Mixture([Source(path.name, open_index(path, cache))])


def draw(weight: float, count: int, seed: int, name: str) -> np.ndarray | None:
    """Numbers of the rows that a weight reads, `None` for each once; the same on every machine and in every release of NumPy.

    Raises:
        ValueError: no row is left.
    """
    if weight == 1:
        return None
    copies, share = divmod(weight, 1)
    picked = round(share * count)
    if copies * count + picked < 1:
        raise ValueError(f"source {name}: weight {weight} of {count} rows is less than one row; raise it or drop the source.")
    entropy = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
    drawn = np.sort(np.random.RandomState(entropy).permutation(count)[:picked])
    return np.concatenate([np.tile(np.arange(count), int(copies)), drawn]).astype(np.int32)


def _open_manifest(path: Path, cache: str | Path | None) -> Mixture:
    manifest = _read_manifest(path)
    sources, errors = [], []
    for entry in manifest["sources"]:
        try:
            sources.append(_open_source(entry, path.parent, manifest.get("seed", 0), cache))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(f"{path} does not match its files:\n- " + "\n- ".join(errors))
    return Mixture(sources)


def _open_source(entry: dict[str, Any], folder: Path, seed: int, cache: str | Path | None) -> Source:
    name = entry.get("name", entry["file"])
    rows = open_index(folder / entry["file"], cache)
    for key, found in (("count", len(rows)), ("sha256", rows.sha256)):
        if entry.get(key, found) != found:
            raise ValueError(f"source {name}: {rows.source} has {key} {found}, but the manifest expects {entry[key]}; get the right file.")
    images = _open_images(entry["images"], folder, cache) if "images" in entry else None
    weight = entry.get("weight", 1)
    return Source(name, rows, images, weight, draw(weight, len(rows), seed, name))


def _open_images(images: str | list[str] | dict[str, Any], folder: Path, cache: str | Path | None) -> ImageSource:
    """Image sources as a manifest writes them: one, several in order, or by prefix."""
    if isinstance(images, str):
        return open_images(folder / images, cache)
    by_prefix = images if isinstance(images, dict) else {"": images}
    listed = {prefix: paths if isinstance(paths, list) else [paths] for prefix, paths in by_prefix.items()}
    return map_images({prefix: [open_images(folder / path, cache) for path in paths] for prefix, paths in listed.items()})


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, every field of a known name and type.

    Raises:
        ValueError: all that is wrong with it.
    """
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the manifest {path} cannot be read: {said}; see docs/Data.md for its form.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sources"), list) or not manifest["sources"]:
        raise ValueError(f"the manifest {path} has no list 'sources'; see docs/Data.md for its form.")
    errors = [f"{key!r} is unknown; known are seed and sources" for key in sorted(map(str, manifest.keys() - {"seed", "sources"}))]
    if not isinstance(manifest.get("seed", 0), int):
        errors.append(f"seed is {manifest['seed']!r}, expected a whole number")
    for number, entry in enumerate(manifest["sources"]):
        errors += [f"source {number}: {error}" for error in _source_errors(entry)]
    names = [entry.get("name", entry.get("file")) for entry in manifest["sources"] if isinstance(entry, dict)]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    errors += [f"two sources are called {name}; rename one of them" for name in twice]
    if errors:
        raise ValueError(f"the manifest {path} is wrong:\n- " + "\n- ".join(errors))
    return manifest


def _source_errors(entry: Any) -> list[str]:
    if not isinstance(entry, dict) or "file" not in entry:
        return [f"it is {entry!r}, expected a mapping with at least 'file'"]
    errors = [f"{key!r} is unknown; known are {', '.join(_SOURCE_KEYS)}" for key in entry if key not in _SOURCE_KEYS]
    for key, kinds in _SOURCE_KEYS.items():
        if key in entry and (not isinstance(entry[key], kinds) or isinstance(entry[key], bool)):
            errors.append(f"{key} is {entry[key]!r}, expected {' or '.join(each.__name__ for each in kinds)}; put text in quotes")
    weight = entry.get("weight", 1)
    if isinstance(weight, (int, float)) and not 0 < weight < 1000:
        errors.append(f"weight is {weight}, expected a number above 0 and below 1000")
    return errors + _image_errors(entry.get("images", ""))


def _image_errors(images: Any) -> list[str]:
    by_prefix = images if isinstance(images, dict) else {"": images}
    listed = [paths if isinstance(paths, list) else [paths] for paths in by_prefix.values()]
    texts = [*by_prefix, *(path for paths in listed for path in paths)]
    if listed and all(listed) and all(isinstance(text, str) for text in texts):
        return []
    return [f"images is {images!r}, expected a path, a list of paths, or a mapping from a prefix of names to these"]
