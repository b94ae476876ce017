"""Mixture-of-Depths (2404.02258): a layer processes some tokens of a sequence, the rest pass by.

Training chooses the top `capacity` share per sequence by router score (expert choice, not causal) and
teaches `sigmoid(score) > 0.5` to foretell membership; evaluation and decoding use that causal rule, so
that prefill and decode agree. Chosen tokens are gathered: the body really runs on fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import DepthConfig, DepthPolicy, Mixer, Site
from archzoo.cache import State, Timeline
from archzoo.errors import CacheError

Body = Callable[[Tensor, Context, State | None], tuple[Tensor, Tensor]]


class MixtureOfDepthsConfig(DepthConfig):
    """`capacity` is the share of tokens processed; `gate` shapes the raw router score r.

    weight_target `delta`: y = x + g(r) (Block(x) - x); `mlp`: only the feed-forward output is weighted.
    """

    kind: Literal["mod"] = "mod"
    capacity: Annotated[float, Field(gt=0, le=1)] = 0.125
    gate: Literal["raw", "sigmoid", "tanh"] = "raw"
    weight_target: Literal["delta", "mlp"] = "delta"

    def params(self, hidden_size: int) -> int:
        return hidden_size

    def tokens(self, seq_len: int) -> int:
        return max(1, int(round(self.capacity * seq_len, 9))) if seq_len else 0  # 0.29 * 100 < 29

    def build(self, site: Site) -> MixtureOfDepths:
        return MixtureOfDepths(self, site)


class RoutedState:
    """The inner mixer's state and its own timeline: skipped tokens take no slot."""

    truncatable = False  # slots of different rows hold different tokens

    def __init__(self, inner: State, timeline: Timeline) -> None:
        self.inner, self.timeline = inner, timeline

    def truncate(self, length: int) -> None:
        raise CacheError("a Mixture-of-Depths state cannot be truncated; clone() the cache before")

    def reorder(self, rows: Tensor) -> None:
        self.inner.reorder(rows)
        self.timeline.reorder(rows)

    def clone(self) -> RoutedState:
        return RoutedState(self.inner.clone(), self.timeline.clone())

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


class MixtureOfDepths(DepthPolicy):
    """Runs `body` on the chosen tokens of x [B, T, d]."""

    def __init__(self, config: MixtureOfDepthsConfig, site: Site) -> None:
        super().__init__()
        self.config, self.index = config, site.index
        self.router = Linear(site.hidden_size, 1, bias=False)

    def new_state(
        self, mixer: Mixer, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> RoutedState:
        inner = mixer.new_state(batch, self.config.tokens(slots), device, dtype)
        return RoutedState(inner, Timeline(batch, device))

    def forward(
        self, x: Tensor, ctx: Context, state: RoutedState | None, body: Body
    ) -> tuple[Tensor, Tensor]:
        """(y [B, T, d], the body's mixer output on the chosen tokens); reports "depth_loss" in training."""
        scores = self.router(x).squeeze(-1)
        wide = scores.to(torch.promote_types(x.dtype, torch.float32))
        if ctx.valid is not None:
            wide = wide.masked_fill(~ctx.valid, float("-inf"))
        if self.training and state is None:
            index = self._top(wide)
            if ctx.aux is not None:
                chosen = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, index, True)
                loss = F.binary_cross_entropy_with_logits(wide, chosen.to(wide.dtype), reduction="none")
                mean = loss.mean() if ctx.valid is None else loss[ctx.valid].mean()
                ctx.aux.report("depth_loss", self.index, mean)
            real = None if ctx.valid is None else ctx.valid.gather(1, index)
        else:
            index, real = self._predicted(wide > 0)
        if index.shape[1] == 0:
            return x, x[:, :0]
        return self._run(x, scores, index, real, ctx, state, body)

    def _top(self, scores: Tensor) -> Tensor:
        """[B, k] the best positions of each row in ascending order; ties: lowest first."""
        k = self.config.tokens(scores.shape[1])
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values

    @staticmethod
    def _predicted(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """[B, k] chosen positions, right-aligned, and which entries are real (rows differ in count)."""
        k = int(chosen.sum(1).max())
        order = chosen.to(torch.uint8).sort(dim=-1, stable=True).indices[:, chosen.shape[1] - k :]
        return order, chosen.gather(1, order)

    def _run(
        self,
        x: Tensor,
        scores: Tensor,
        index: Tensor,
        real: Tensor | None,
        ctx: Context,
        state: RoutedState | None,
        body: Body,
    ) -> tuple[Tensor, Tensor]:
        positions = ctx.positions
        if positions is None:
            positions = torch.arange(ctx.start, ctx.total, device=x.device).expand(x.shape[0], -1)
        positions = positions.gather(1, index)
        if real is not None:
            positions = positions.masked_fill(~real, -1)
        seq_idx = None if ctx.seq_idx is None else ctx.seq_idx.gather(1, index)
        timeline = None if state is None else state.timeline
        inner_ctx = Context((x.shape[0], index.shape[1]), x.device, positions, seq_idx, timeline, ctx.aux)
        at = index[..., None].expand(-1, -1, x.shape[-1])
        picked = x.gather(1, at)
        out, mixed = body(picked, inner_ctx, None if state is None else state.inner)
        weight = scores.gather(1, index)[..., None]
        if self.config.gate != "raw":
            weight = weight.sigmoid() if self.config.gate == "sigmoid" else weight.tanh()
        if self.config.weight_target == "delta":
            new = picked + weight * (out - picked)
        else:
            attended = picked + mixed
            new = attended + weight * (out - attended)
        if real is not None:
            new = torch.where(real[..., None], new, picked)
        return x.scatter(1, at, new.to(x.dtype)), mixed
