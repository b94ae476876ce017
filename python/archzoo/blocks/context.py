"""What every layer of one forward call shares: positions, masks, rotary tables, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.blocks.rope import RopeConfig
from archzoo.cache import Timeline
from archzoo.ops.balance import Sequences, load_balancing


@dataclass(frozen=True)
class Routing:
    """How a router spread its tokens: load [E], mean probability [E], share of assignments dropped."""

    load: Tensor
    probability: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Pool:
    """One layer's part of a loss over all layers: loads and summed probabilities [E], tokens, its weight."""

    loads: Tensor
    sums: Tensor
    tokens: Tensor
    weight: float


class Aux:
    """Losses and routings that blocks report during one forward call, keyed by layer.

    A layer that runs again (gradient checkpointing) overwrites what it said. A loss is summed over layers,
    but "depth_loss" averaged; each is reported with its weight.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, dict[int, Tensor]] = {}
        self.pools: dict[int, Pool] = {}
        self.routings: dict[int, Routing] = {}

    def report(self, name: str, layer: int, loss: Tensor) -> None:
        self.by_name.setdefault(name, {})[layer] = loss

    def losses(self) -> dict[str, Tensor]:
        """What the training loss gets, by name."""
        out = {}
        for name, layers in self.by_name.items():
            total = torch.stack(list(layers.values()))
            out[name] = total.mean() if name == "depth_loss" else total.sum()
        if self.pools:
            sizes = {len(p.loads) for p in self.pools.values()}  # a pyramid has several
            parts = [[p for p in self.pools.values() if len(p.loads) == size] for size in sorted(sizes)]
            out["load_balancing_loss"] = torch.stack([_pooled(part) for part in parts]).sum()
        return out

    def statistics(self) -> dict[str, Tensor]:
        """Over the L routed layers: load [L, E], and [L] each: entropy (nats) of the mean router probability,
        dropped, max_violation = largest load / mean load - 1. Columns beyond a layer's experts are 0."""
        if not self.routings:
            return {}
        routings = [self.routings[i] for i in sorted(self.routings)]
        sizes = [len(r.load) for r in routings]
        load, p = (
            torch.stack([F.pad(t, (0, max(sizes) - len(t))) for t in tensors])
            for tensors in ([r.load for r in routings], [r.probability for r in routings])
        )
        mean = torch.stack([r.load.mean() for r in routings])
        return {
            "load": load,
            "entropy": -torch.xlogy(p, p).sum(-1),
            "dropped": torch.stack([r.dropped for r in routings]),
            "max_violation": load.amax(-1) / mean.clamp_min(1e-9) - 1,
        }


def _pooled(parts: list[Pool]) -> Tensor:
    loads, sums, tokens = (
        torch.stack(t).sum(0)
        for t in ([p.loads for p in parts], [p.sums for p in parts], [p.tokens for p in parts])
    )
    return parts[0].weight * load_balancing(loads, sums, tokens)


class Context:
    """One call's tokens: where they stand and which keys they may see.

    positions [B, T] int64, -1 for padding, or None when token t of every row stands at `start + t`
    (the dense case: no padding, no packing). seq_idx [B, T] separates packed sequences. With a
    timeline the keys are its slots (the new tokens included), else the new tokens themselves. Blocks report
    to `aux` when there is one.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        positions: Tensor | None = None,
        seq_idx: Tensor | None = None,
        timeline: Timeline | None = None,
        aux: Aux | None = None,
    ) -> None:
        self.batch, self.length = shape
        self.device = device
        self.seq_idx, self.timeline, self.aux = seq_idx, timeline, aux
        self.start = timeline.length if timeline is not None else 0
        self.padded = positions is not None  # possibly; positions that follow the timeline are all real
        if positions is None and timeline is not None and not timeline.dense:
            positions = timeline.next_positions() + torch.arange(self.length, device=device)
        self.positions = positions
        if timeline is not None:
            timeline.append(self.length, positions)
        self._ropes: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}
        self._sequences: Sequences | None = None

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

    @property
    def sequences(self) -> Sequences:
        """Which sequence each of the B * T tokens belongs to."""
        if self._sequences is None:
            self._sequences = Sequences.of((self.batch, self.length), self.device, self.valid, self.seq_idx)
        return self._sequences

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
