"""Keys and values of the answers in progress: one row per answer, joined and left between two steps.

A row's positions start at 0 and its padding lies behind it, so that an answer joins by one copy, leaves by one copy (the last row takes
its place), and never moves otherwise. The storage is one rectangle per layer, rows times positions, within a
budget of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_LENGTH_STEP = 64


class SlotCache(Cache):
    """A transformers cache whose rows come and go.

    Args:
        max_rows: rows at most. max_positions: rows times positions of the storage at most; a single longer row is still taken.

    Legend: R rows of storage, B rows in use (the first ones), H heads, N positions of storage, E width of a head.

    lengths: positions in use in each of the B rows. While a step runs, `update` writes each row's new token behind its own last one.
    """

    def __init__(self, max_rows: int, max_positions: int) -> None:
        super().__init__(layers=[])
        self.max_rows, self.max_positions = max_rows, max_positions
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []  # per layer (R, H, N, E)
        self._values: list[Tensor] = []
        self._writing: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._longest = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> tuple[int, int]:
        """(rows, positions) of the storage."""
        return (self._keys[0].shape[0], self._keys[0].shape[2]) if self._keys else (0, 0)

    def clear(self) -> None:
        """Let every row and the storage go."""
        self.lengths, self._keys, self._values = [], [], []

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows of so many positions, and for as many more rows as the budget allows; what is there is kept.

        Works once a first row was joined.
        """
        have_rows, have_positions = self.capacity
        if rows <= have_rows and positions <= have_positions:
            return
        positions = -(-positions // _LENGTH_STEP) * _LENGTH_STEP
        rows = max(rows, min(self.max_rows, self.max_positions // positions))
        # Both first, then both at once: running out of memory in between leaves what was there.
        keys = [self._moved(stored, rows, positions) for stored in self._keys]
        values = [self._moved(stored, rows, positions) for stored in self._values]
        self._keys, self._values = keys, values

    def _moved(self, stored: Tensor, rows: int, positions: int) -> Tensor:
        moved = stored.new_zeros(rows, stored.shape[1], positions, stored.shape[3])
        if self.rows:
            longest = max(self.lengths)
            moved[: self.rows, :, :longest] = stored[: self.rows, :, :longest]
        return moved

    def join(self, prefilled: Cache, lengths: Sequence[int], rows: int, positions: int) -> None:
        """Add rows behind the ones in use.

        Args:
            prefilled: keys and values of the new rows, padded on the right. lengths: positions that count in each.
            rows, positions: what all rows, old and new, will need at most; the storage becomes that large at once.
        """
        layers: Sequence[Any] = prefilled.layers
        if not self._keys:
            self._keys = [layer.keys[:0, :, :0] for layer in layers]
            self._values = [layer.values[:0, :, :0] for layer in layers]
        self.reserve(rows, positions)
        first, longest = self.rows, max(lengths)
        for keys, values, layer in zip(self._keys, self._values, layers, strict=True):
            keys[first : first + len(lengths), :, :longest] = layer.keys[:, :, :longest]
            values[first : first + len(lengths), :, :longest] = layer.values[:, :, :longest]
        self.lengths += lengths

    def leave(self, row: int) -> int:
        """Take a row out; the last row moves into its place. Returns the index that row had."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            for stored in (*self._keys, *self._values):
                stored[row, :, :length] = stored[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last

    def begin_step(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Prepare a step of one token per row.

        Returns:
            (B, 1) position of each new token, and a (B, 1, 1, L) mask that is added to the attention scores.
        """
        self._longest = max(self.lengths) + 1
        places = torch.tensor(self.lengths, device=device)
        self._writing = {device: (torch.arange(self.rows, device=device), places)}
        hidden = torch.arange(self._longest, device=device)[None] > places[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        return places[:, None], mask[:, None, None]

    def end_step(self) -> None:
        """The step went through: every row is one position longer."""
        self.lengths = [length + 1 for length in self.lengths]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, 1, E) of the new tokens; give the keys and values (B, H, L, E) to attend to."""
        rows, places = self._writing_on(key_states.device)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[rows, :, places] = key_states[:, :, 0]
        values[rows, :, places] = value_states[:, :, 0]
        return keys[: self.rows, :, : self._longest], values[: self.rows, :, : self._longest]

    def _writing_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows' indices and write positions on a layer's device (layers may lie on several)."""
        if device not in self._writing:
            rows, places = next(iter(self._writing.values()))
            self._writing[device] = (rows.to(device), places.to(device))
        return self._writing[device]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions of the longest row (transformers asks where no positions are given; here they always are)."""
        return max(self.lengths, default=0)
