"""Encoded pictures that are kept for the next turn, or for the next question about the same picture."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Lock

from PIL import Image
from torch import Tensor


def picture_key(image: Image.Image, revision: str) -> str:
    """What a picture's features depend on, as one digest.

    Features are kept before pooling, so one entry serves every granularity; the granularity plays no part in what is stored.

    Args:
        image: decoded; its pixels, mode and size all count (two pictures of equal bytes and another shape differ).
        revision: of the model that encodes: another checkpoint must never find these features.
    """
    digest = hashlib.sha256()
    for part in (revision, "all granularities", image.mode, f"{image.width}x{image.height}"):
        digest.update(part.encode() + b"\0")
    digest.update(image.tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Features (C, P, D) by picture key, the longest unused leaving first when the bytes run out. Safe between threads.

    Args:
        max_bytes: all entries together; 0 keeps nothing. A single picture larger than this is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"The feature cache's size is {max_bytes} bytes, expected 0 or more.")
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Tensor | None:
        """The features under a key, or `None`; counts a hit or a miss (ask `in` first to look without counting a miss)."""
        with self._lock:
            features = self._entries.get(key)
            if features is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep features, and let others go until they fit."""
        size = features.numel() * features.element_size()
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            # A slice of a batch would keep the whole batch's storage alive.
            self._entries[key] = features.clone()
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes -= dropped.numel() * dropped.element_size()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0
