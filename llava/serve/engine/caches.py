"""Caches for the next turn, or the next question about the same image: image features, and keys and values of prompt prefixes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from PIL import Image
from torch import Tensor

_HASHED_PIXELS = 1_000_000


def image_key(image: Image.Image, revision: str) -> str:
    """The cache key of an image's features: a digest of everything that they depend on.

    Features are cached before pooling, so one entry serves every granularity.

    Args:
        image: decoded; pixels, mode and size all count (two images of equal bytes and different shapes differ).
        revision: of the model, so that another checkpoint never finds these features.
    """
    rows = max(1, _HASHED_PIXELS // image.width)  # stripe by stripe: a copy of the whole would double the memory
    stripes = (image.crop((0, top, image.width, min(top + rows, image.height))).tobytes() for top in range(0, image.height, rows))
    return _digest((revision, image.mode, f"{image.width}x{image.height}"), stripes)


def prefix_key(token_ids: Iterable[int], images: Iterable[tuple[str, int]], revision: str) -> str:
    """The cache key of a prompt prefix's keys and values: a digest of everything that they depend on.

    Args:
        token_ids: of the prefix, placeholders included. images: the key and the granularity of each image in it.
    """
    ids = ",".join(map(str, token_ids))
    return _digest((revision, ids, *(f"{key} at {granularity}" for key, granularity in images)), ())


def _digest(parts: Iterable[str], data: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


class TensorCache:
    """A thread-safe LRU cache of tensors, bounded in bytes.

    Args:
        max_bytes: of all entries together; 0 keeps nothing. An entry larger than this is not kept.
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
        """Store copies of tensors, and evict others until they fit."""
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
        """Remove all entries."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
