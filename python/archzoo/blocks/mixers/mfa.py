"""Multi-matrix Factorization Attention (Step-3, 2507.19427 section 2): factorised queries, one KV head."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.mixers.attention import KVState, attend, visible_pairs
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import Mixer, MixerConfig, Site, require
from archzoo.blocks.rope import RopeConfig
from archzoo.ops.rope import apply_rope


class MFAConfig(MixerConfig):
    """q = q_b(RMSNorm(q_a x)) through `q_rank` channels shared by all heads; k, v of a single head."""

    kind: Literal["mfa"] = "mfa"
    heads: PositiveInt
    head_dim: PositiveInt
    q_rank: PositiveInt
    rope: RopeConfig = RopeConfig(theta=500000.0)

    def check(self, hidden_size: int) -> None:
        require(self.head_dim % 2 == 0, f"mfa: RoPE needs an even head_dim, found {self.head_dim}")
        require(
            self.q_rank <= self.heads * self.head_dim,
            f"mfa: q_rank ({self.q_rank}) exceeds heads * head_dim ({self.heads * self.head_dim})",
        )

    def tiny(self) -> MFAConfig:
        return self.model_copy(update={"heads": 4, "head_dim": 16, "q_rank": 32})

    def params(self, hidden_size: int) -> int:
        q = self.heads * self.head_dim
        return hidden_size * (self.q_rank + 2 * self.head_dim + q) + self.q_rank * (q + 1)

    def flops(self, hidden_size: int, new: int, total: int) -> int:
        linear = 2 * (self.params(hidden_size) - self.q_rank) * new
        return linear + 4 * self.heads * self.head_dim * visible_pairs(new, total)

    def cache_bytes(self, hidden_size: int, seq_len: int, itemsize: int) -> int:
        return 2 * self.head_dim * seq_len * itemsize

    def build(self, site: Site) -> MFA:
        return MFA(self, site)


class MFA(Mixer):
    """x [B, T, d] -> [B, T, d]; state: KVState of one head."""

    def __init__(self, config: MFAConfig, site: Site) -> None:
        super().__init__()
        self.config = c = config
        d, q = site.hidden_size, c.heads * c.head_dim
        self.q_a_proj = Linear(d, c.q_rank, bias=False)
        self.q_a_norm = RMSNorm(c.q_rank, site.norm_eps)
        self.q_b_proj = Linear(c.q_rank, q, bias=False)
        self.k_proj = Linear(d, c.head_dim, bias=False)
        self.v_proj = Linear(d, c.head_dim, bias=False)
        self.o_proj = Linear(q, d, bias=False)

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVState:
        empty = torch.empty((batch, 1, slots, self.config.head_dim), device=device, dtype=dtype)
        return KVState(empty, torch.empty_like(empty))

    def forward(self, x: Tensor, ctx: Context, state: KVState | None = None) -> Tensor:
        c = self.config
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).unflatten(-1, (c.heads, c.head_dim))
        cos, sin = ctx.rope(c.rope, c.head_dim, x.dtype)
        q = apply_rope(q, cos, sin).transpose(1, 2)
        k = apply_rope(self.k_proj(x).unsqueeze(2), cos, sin).transpose(1, 2)
        v = self.v_proj(x).unsqueeze(1)
        if state is not None:
            k, v = state.append(k, v)
        return self.o_proj(attend(q, k, v, ctx, c.head_dim**-0.5))
