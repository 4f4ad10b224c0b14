"""What is kept for the next turn, or for the next question about the same picture: encoded pictures, and prompts read so far."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from PIL import Image
from torch import Tensor

_HASHED_PIXELS = 1_000_000


def picture_key(image: Image.Image, revision: str) -> str:
    """What a picture's features depend on, as one digest.

    Features are kept before pooling, so one entry serves every granularity; the granularity plays no part in what is stored.

    Args:
        image: decoded; its pixels, mode and size all count (two pictures of equal bytes and another shape differ).
        revision: of the model that encodes: another checkpoint must never find these features.
    """
    rows = max(1, _HASHED_PIXELS // image.width)  # some at a time: a copy of all would take as much as the image once more
    stripes = (image.crop((0, top, image.width, min(top + rows, image.height))).tobytes() for top in range(0, image.height, rows))
    return _digest((revision, image.mode, f"{image.width}x{image.height}"), stripes)


def prefix_key(token_ids: Iterable[int], pictures: Iterable[tuple[str, int]], revision: str) -> str:
    """What the keys and values of a prompt's beginning depend on, as one digest.

    Args:
        token_ids: of the beginning, placeholders included. pictures: the key and the granularity of each picture in it.
    """
    ids = ",".join(map(str, token_ids))
    return _digest((revision, ids, *(f"{key} at {granularity}" for key, granularity in pictures)), ())


def _digest(parts: Iterable[str], data: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


class TensorCache:
    """Tensors by key, the longest unused entry leaving first when the bytes run out. Safe between threads.

    Args:
        max_bytes: all entries together; 0 keeps nothing. An entry larger than this is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"A cache's size is {max_bytes} bytes, expected 0 or more.")
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """The tensors under a key, or `None`; counts a hit or a miss (ask `in` first to look without counting a miss)."""
        with self._lock:
            tensors = self._entries.get(key)
            if tensors is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return tensors

    def peek(self, key: str) -> tuple[Tensor, ...] | None:
        """The tensors under a key, or `None`, without counting."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: str, *tensors: Tensor) -> None:
        """Keep copies of tensors, and let others go until they fit."""
        size = _size(tensors)
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            # Copies: a slice of a batch would keep the whole batch's storage alive, or be written over.
            self._entries[key] = tuple(tensor.clone() for tensor in tensors)
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes -= _size(dropped)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
