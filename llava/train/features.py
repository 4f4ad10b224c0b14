"""Features of a frozen vision tower, kept in memory so that an image is encoded once, however many rows are about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class FeatureCache:
    """A bounded cache that never evicts, so a data loader's worker may rely on its copy of the keys.

    Attributes:
        limit_bytes: nothing is added beyond this.
        used_bytes: what the features in it take.
    """

    limit_bytes: int
    used_bytes: int = 0
    _features: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __contains__(self, key: str) -> bool:
        return key in self._features

    def __len__(self) -> int:
        return len(self._features)

    def image_size(self, key: str) -> tuple[int, int]:
        """(width, height) of a cached image."""
        return self._sizes[key]

    def get(self, key: str) -> Tensor:
        """Tower features (C, P, Dv) of a cached image."""
        return self._features[key]

    def put(self, key: str, features: Tensor, image_size: tuple[int, int]) -> None:
        """Keep the tower features (C, P, Dv) of an image, if there is room."""
        size = features.numel() * features.element_size()
        if key in self._features or self.used_bytes + size > self.limit_bytes:
            return
        self._features[key] = features.detach().cpu()
        self._sizes[key] = image_size
        self.used_bytes += size
