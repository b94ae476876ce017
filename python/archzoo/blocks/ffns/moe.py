"""Mixture of experts with shared experts (DeepSeekMoE, 2401.06066)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.ffns.glu import GLU, SwiGLUConfig
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import FfnConfig, Site, require
from archzoo.ops.moe import Score, experts, gate


class MoEConfig(FfnConfig):
    """`experts` routed SwiGLUs of width `hidden`, `top_k` per token, plus `shared` always-on ones.

    `renormalize` makes the top_k weights sum to 1 before `scale`; `selection_bias` is V3's bias that
    takes part in the choice only.
    """

    kind: Literal["moe"] = "moe"
    experts: PositiveInt
    top_k: PositiveInt
    hidden: PositiveInt
    shared: NonNegativeInt = 0
    score: Score = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    selection_bias: bool = False

    def check(self, hidden_size: int) -> None:
        require(self.top_k <= self.experts, f"moe: top_k ({self.top_k}) exceeds experts ({self.experts})")

    def tiny(self) -> MoEConfig:
        return self.model_copy(
            update={"experts": 8, "top_k": min(self.top_k, 2), "hidden": 32, "shared": min(self.shared, 2)}
        )

    def _per_expert(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.hidden

    def params(self, hidden_size: int) -> int:
        router = hidden_size * self.experts + self.experts * self.selection_bias
        return router + (self.experts + self.shared) * self._per_expert(hidden_size)

    def active_params(self, hidden_size: int) -> int:
        idle = (self.experts - self.top_k) * self._per_expert(hidden_size)
        return self.params(hidden_size) - idle

    def build(self, site: Site) -> MoE:
        return MoE(self, site)


class Experts(nn.Module):
    """The routed experts as two fused tensors: gate_up [E, 2I, d] (gate rows first), down [E, d, I]."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.hidden, hidden_size))
        self.down = nn.Parameter(torch.empty(config.experts, hidden_size, config.hidden))


class MoE(nn.Module):
    """x [B, T, d] -> [B, T, d]; routed in fp32."""

    def __init__(self, config: MoEConfig, site: Site) -> None:
        super().__init__()
        self.config = c = config
        self.router = Linear(site.hidden_size, c.experts, bias=False)
        if c.selection_bias:
            self.register_buffer("selection_bias", torch.empty(c.experts, dtype=torch.float32))
        else:
            self.selection_bias = None
        self.experts = Experts(c, site.hidden_size)
        width = SwiGLUConfig(hidden=c.hidden * max(c.shared, 1))
        self.shared = GLU(width, site) if c.shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, k] of x [T, d]."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.router.weight.to(wide))
        return gate(
            logits,
            top_k=c.top_k,
            score=c.score,
            bias=self.selection_bias,
            renormalize=c.renormalize,
            scale=c.scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, ids = self.route(flat)
        out = experts(flat, weights, ids, self.experts.gate_up, self.experts.down).view_as(x)
        return out if self.shared is None else out + self.shared(x)
