"""What every layer of one forward call shares: positions, masks, rotary tables."""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.blocks.rope import RopeConfig
from archzoo.cache import Timeline


class Context:
    """One call's tokens: where they stand and which keys they may see.

    positions [B, T] int64, -1 for padding, or None when token t of every row stands at `start + t`
    (the dense case: no padding, no packing). seq_idx [B, T] separates packed sequences. With a
    timeline the keys are its slots (the new tokens included), else the new tokens themselves.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        positions: Tensor | None = None,
        seq_idx: Tensor | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.batch, self.length = shape
        self.device = device
        self.seq_idx, self.timeline = seq_idx, timeline
        self.start = timeline.length if timeline is not None else 0
        self.padded = positions is not None  # possibly; positions that follow the timeline are all real
        if positions is None and timeline is not None and not timeline.dense:
            positions = timeline.next_positions() + torch.arange(self.length, device=device)
        self.positions = positions
        if timeline is not None:
            timeline.append(self.length, positions)
        self._ropes: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    @property
    def total(self) -> int:
        """Number of key slots."""
        return self.start + self.length

    @property
    def dense(self) -> bool:
        return self.positions is None

    @property
    def valid(self) -> Tensor | None:
        """[B, T] False at padding; None when there is none."""
        return self.positions >= 0 if self.positions is not None and self.padded else None

    @property
    def query_positions(self) -> Tensor:
        """[T] or [B, T] of the new tokens, -1 at padding."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.start, self.total, device=self.device)

    def rope(self, config: RopeConfig, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [T, dim/2] or [B, T, dim/2] of the new tokens."""
        key = (*config.key, dim, dtype)
        if key not in self._ropes:
            self._ropes[key] = config.table(self.query_positions, dim, dtype)
        return self._ropes[key]

    @property
    def plain_causal(self) -> bool:
        """True when queries and keys are the same dense tokens."""
        return self.dense and self.seq_idx is None and self.start == 0

    def mask(self, window: int | None = None, chunk: int | None = None) -> Tensor | None:
        """True where query t may see key s: [T, S] or [B, 1, T, S]; None when it sees all of them.

        `window` w keeps keys with position > query - w (w includes the query itself); `chunk` c those in
        the query's own block of c positions.
        """
        reach = window or chunk
        if self.dense and self.length == 1 and (reach is None or self.total <= reach):
            return None
        key = (window, chunk)
        if key not in self._masks:
            self._masks[key] = self._build_mask(window, chunk)
        return self._masks[key]

    def _build_mask(self, window: int | None, chunk: int | None) -> Tensor:
        if self.positions is None:
            query = torch.arange(self.start, self.total, device=self.device)[:, None]
            key = torch.arange(self.total, device=self.device)[None]
            seen = key <= query
        else:
            query = self.positions[:, None, :, None]
            slots = self.positions if self.timeline is None else self.timeline.positions()
            key = slots[:, None, None, :]
            seen = (key <= query) & (key >= 0)
        if window is not None:
            seen = seen & (key > query - window)
        if chunk is not None:
            seen = seen & (key // chunk == query // chunk)
        if self.seq_idx is not None:
            seen = seen & (self.seq_idx[:, None, :, None] == self.seq_idx[:, None, None, :])
        return seen
