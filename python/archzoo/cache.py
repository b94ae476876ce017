"""The decode cache: a list of the states that the mixers own, plus explicit positions.

Nothing here knows what a state stores. Every state has `reorder(rows)` (beam search), `truncate(length)`
(forget the newest tokens), `nbytes` and `clone()`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from archzoo.errors import CacheError


def grown(buffer: Tensor, dim: int, size: int) -> Tensor:
    """`buffer` with room for `size` entries on `dim`: itself, or a copy of twice the room."""
    have = buffer.shape[dim]
    if size <= have:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(size, 2 * have)
    bigger = buffer.new_empty(shape)
    bigger.narrow(dim, 0, have).copy_(buffer)
    return bigger


class State(Protocol):
    """What a mixer keeps between calls for a batch of sequences."""

    def reorder(self, rows: Tensor) -> None: ...
    def truncate(self, length: int) -> None: ...
    def clone(self) -> State: ...
    @property
    def nbytes(self) -> int: ...


class Timeline:
    """Which position each cache slot holds: [B, slots] int64, -1 for padding.

    `dense` timelines (no padding, slot s holds position s in every row) store nothing but their length.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.length = 0
        self.slots: Tensor | None = None

    @property
    def dense(self) -> bool:
        return self.slots is None

    def positions(self) -> Tensor:
        """[B, length] positions of the stored slots."""
        if self.slots is None:
            return torch.arange(self.length, device=self.device).expand(self.batch, -1)
        return self.slots[:, : self.length]

    def next_positions(self) -> Tensor:
        """[B, 1] the position after the newest one of each row."""
        if self.length == 0:
            return torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        return self.positions().amax(1, keepdim=True) + 1

    def append(self, count: int, positions: Tensor | None = None) -> None:
        """Add `count` slots; positions [B, count], or None to go on densely."""
        if positions is not None:
            if self.slots is None:
                self.slots = self.positions().contiguous()
            self.slots = grown(self.slots, 1, self.length + count)
            self.slots[:, self.length : self.length + count] = positions
        self.length += count

    def reorder(self, rows: Tensor) -> None:
        self.batch = rows.numel()
        if self.slots is not None:
            self.slots = self.slots[rows]

    def clone(self) -> Timeline:
        other = Timeline(self.batch, self.device)
        other.length = self.length
        other.slots = None if self.slots is None else self.slots.clone()
        return other


class Cache:
    """States of all layers of one model for one batch; made by `model.new_cache`."""

    def __init__(self, states: list[State], timeline: Timeline) -> None:
        self.states, self.timeline = states, timeline

    @property
    def length(self) -> int:
        """Number of slots written so far, padding included."""
        return self.timeline.length

    @property
    def batch_size(self) -> int:
        return self.timeline.batch

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated state."""
        return sum(state.nbytes for state in self.states)

    def reorder(self, rows: Tensor) -> None:
        """Keep the sequences `rows` [B'] (int64), in this order, in every layer together."""
        for state in self.states:
            state.reorder(rows)
        self.timeline.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget every token from slot `length` on; CacheError where a recurrent state cannot."""
        if not 0 <= length <= self.length:
            raise CacheError(f"cannot truncate a cache of {self.length} tokens to {length}")
        if length == self.length:
            return
        for state in self.states:  # raises before anything changes: recurrent layers refuse first
            if not getattr(state, "truncatable", True):
                raise CacheError(
                    f"{type(state).__name__} is recurrent and cannot be truncated; clone() the cache before"
                )
        for state in self.states:
            state.truncate(length)
        self.timeline.length = length

    def clone(self) -> Cache:
        """An independent copy, to come back to."""
        return Cache([state.clone() for state in self.states], self.timeline.clone())
