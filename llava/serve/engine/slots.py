"""Keys and values of the running answers: one row per answer; answers join and leave between two steps.

A row's positions start at 0 and padding follows it, so that an answer joins behind the others, leaves by one copy (the last row
takes its place), and never moves otherwise. Prompts are prefilled straight into their rows. The storage is one rectangle per layer,
rows times positions, within a budget of positions.
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

    A pass through the language model is announced with `begin` (its rows, and how many positions of each are there), writes its keys and
    values through `update`, and counts once `end` is called: a pass that failed leaves nothing behind.

    Args:
        max_rows: rows at most. max_positions: rows times positions of the storage at most; a single longer row is still taken.

    Legend: R rows of storage, B rows of a pass, H heads, N positions of storage, L new positions of a pass, K positions attended to,
    E width of a head.
    """

    def __init__(self, max_rows: int, max_positions: int) -> None:
        super().__init__(layers=[])
        self.max_rows, self.max_positions = max_rows, max_positions
        self.lengths: list[int] = []
        self.capacity = (0, 0)
        self._keys: list[Tensor] = []  # per layer (R, H, N, E)
        self._values: list[Tensor] = []
        self._first = 0
        self._count = 0
        self._known = 0  # the most that a row of the pass has
        self._new = 0
        self._even = True  # all have as much
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows in use; they are the first ones."""
        return len(self.lengths)

    def clear(self) -> None:
        """Drop all rows and the storage."""
        self.lengths, self._keys, self._values, self.capacity = [], [], [], (0, 0)

    def reserve(self, rows: int, positions: int, more_rows: int | None = None) -> None:
        """Make room for a given number of rows of a given number of positions; what is there is kept.

        Args:
            more_rows: rows to allocate ahead where the budget allows, so that the next join does not copy; by default `max_rows`.
        """
        have_rows, have_positions = self.capacity
        if rows <= have_rows and positions <= have_positions:
            return
        positions = -(-positions // _LENGTH_STEP) * _LENGTH_STEP
        rows = max(rows, min(more_rows or self.max_rows, self.max_rows, self.max_positions // positions))
        # Assigned only when both are there: running out of memory in between leaves what was there.
        keys = [self._moved(stored, rows, positions) for stored in self._keys]
        values = [self._moved(stored, rows, positions) for stored in self._values]
        self._keys, self._values, self.capacity = keys, values, (rows, positions)

    def _moved(self, stored: Tensor, rows: int, positions: int) -> Tensor:
        moved = stored.new_zeros(rows, stored.shape[1], positions, stored.shape[3])
        if self.rows:
            longest = max(self.lengths)
            moved[: self.rows, :, :longest] = stored[: self.rows, :, :longest]
        return moved

    # ---- a pass --------------------------------------------------------------------------------------------------------------

    def begin(self, first: int, known: Sequence[int], new: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Announce a pass over the rows from `first` on.

        Args:
            known: positions that each of the B rows has already. new: L, positions that follow in each, padding included; there must be
                room for them. like: a tensor of the dtype and device of the hidden states.

        Returns:
            (B, L) positions, and a (B, 1, L, K) mask to add to the attention scores; `None` where plain causal attention, which has the
            fastest kernels, is enough: for whole prompts (padding follows a row's end), and for one position each of equally long
            rows.
        """
        self._first, self._count, self._known, self._new = first, len(known), max(known), new
        self._even = min(known) == self._known
        lengths = torch.tensor(known, device=like.device)
        positions = lengths[:, None] + torch.arange(new, device=like.device)  # (B, L)
        rows = torch.arange(first, first + len(known), device=like.device)[:, None]
        self._places = {like.device: (rows, positions)}
        if self._even and (new == 1 or not self._known):
            return positions, None
        hidden = torch.arange(self._known + new, device=like.device) > positions[..., None]  # (B, L, K)
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, torch.finfo(like.dtype).min)
        return positions, mask[:, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's (B, H, L, E) of the new positions; returns the (B, H, K, E) to attend to."""
        return self._write(self._keys, key_states, layer_idx), self._write(self._values, value_states, layer_idx)

    def _storage(self, layers: list[Tensor], layer: int, like: Tensor) -> Tensor:
        """A layer's storage, allocated when its first states (..., H, L, E) show heads, width, dtype and device."""
        if layer == len(layers):
            layers.append(like.new_zeros(self.capacity[0], like.shape[-3], self.capacity[1], like.shape[-1]))
        return layers[layer]

    def _write(self, layers: list[Tensor], states: Tensor, layer: int) -> Tensor:
        stored = self._storage(layers, layer, states)
        last, end = self._first + self._count, self._known + self._new
        if self._even:
            stored[self._first : last, :, self._known : end] = states
        else:
            rows, positions = self._places_on(states.device)
            stored[rows, :, positions] = states.transpose(1, 2)
        return stored[self._first : last, :, :end]

    def _places_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the pass writes, on a layer's device (a model may be spread over several)."""
        if device not in self._places:
            rows, positions = next(iter(self._places.values()))
            self._places[device] = (rows.to(device), positions.to(device))
        return self._places[device]

    def end(self, lengths: Sequence[int]) -> None:
        """The pass succeeded: its rows have these lengths now."""
        self.lengths[self._first : self._first + len(lengths)] = lengths

    # ---- rows ----------------------------------------------------------------------------------------------------------------

    def leave(self, row: int, wipe: bool = False) -> int:
        """Take a row out; the last row moves into its place. Returns the index that row had.

        Args:
            wipe: overwrite what the row held: a non-finite number would reach its next occupant through the mask.
        """
        last, length = self.rows - 1, self.lengths[-1]
        for stored in (*self._keys, *self._values):
            if row != last:
                stored[row, :, :length] = stored[last, :, :length]
            if wipe:
                stored[row, :, length if row != last else 0 :] = 0
                stored[last] = 0
        self.lengths[row] = length
        self.lengths.pop()
        return last

    def shrink(self) -> bool:
        """Free the storage of unused rows, layer by layer; a layer that cannot be copied keeps its own.

        Returns:
            Whether there were such rows.
        """
        if self.capacity[0] == self.rows:
            return False
        self.capacity = (self.rows, self.capacity[1])
        for held in (self._keys, self._values):
            for layer, stored in enumerate(held):
                held[layer] = stored[: self.rows].clone()
        return True

    def wipe_unused(self) -> None:
        """Overwrite whatever a failed pass may have left in unused rows."""
        for stored in (*self._keys, *self._values):
            stored[self.rows :] = 0

    def prefix(self, row: int, length: int) -> tuple[Tensor, ...]:
        """Keys and then values of a row's first positions, (H, length, E) per layer; views, not copies."""
        return tuple(stored[row, :, :length] for stored in (*self._keys, *self._values))

    def load_prefix(self, row: int, prefix: Sequence[Tensor]) -> None:
        """Copy what `prefix` returned, for this or another row, into an unused row."""
        layers = len(prefix) // 2
        for place, known in enumerate(prefix):
            held = self._keys if place < layers else self._values
            self._storage(held, place % layers, known)[row, :, : known.shape[1]] = known

    # ---- for transformers, where `begin` gave no mask: all rows of the pass have equal lengths then ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before those of the pass."""
        return self._known

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Positions attended to, and where they begin."""
        return self._known + query_length, 0
