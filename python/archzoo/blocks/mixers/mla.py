"""Multi-head Latent Attention: DeepSeek's (2405.04434) and Zebra-Llama's (2505.17272) form.

The cache holds per token one latent c (kv_rank) and one roped key (rope_dim), shared by all heads.
Many new tokens expand the latent to keys and values; few new tokens over a long cache run absorbed:
the up-projections move into the query and the output, and attention reads the latent itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear, together
from archzoo.blocks.mixers.attention import attend, visible_pairs
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import Mixer, MixerConfig, Site, require
from archzoo.blocks.rope import RopeConfig
from archzoo.cache import grown
from archzoo.ops.attention import latent_attention
from archzoo.ops.rope import apply_rope


class MLAConfig(MixerConfig):
    """q_rank None is a plain query projection; latent_norm is DeepSeek's RMSNorm on both latents.

    kv_heads < heads (Zebra) expands the latent to fewer keys and values, shared by groups of heads.
    """

    kind: Literal["mla"] = "mla"
    heads: PositiveInt
    kv_heads: PositiveInt
    q_rank: PositiveInt | None = None
    kv_rank: PositiveInt
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    v_dim: PositiveInt
    latent_norm: bool = True
    latent_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig(interleaved=True)

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def check(self, hidden_size: int) -> None:
        require(
            self.heads % self.kv_heads == 0,
            f"mla: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        require(self.rope_dim % 2 == 0, f"mla: RoPE needs an even rope_dim, found {self.rope_dim}")
        up = self.kv_heads * (self.nope_dim + self.v_dim)
        require(self.kv_rank <= up, f"mla: kv_rank ({self.kv_rank}) exceeds the {up} channels it expands to")
        if self.q_rank is not None:
            q = self.heads * self.qk_dim
            require(self.q_rank <= q, f"mla: q_rank ({self.q_rank}) exceeds the {q} query channels")

    def tiny(self) -> MLAConfig:
        update: dict[str, int] = {"heads": 4, "kv_heads": 4 if self.kv_heads == self.heads else 2}
        update |= {"kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 16}
        if self.q_rank is not None:
            update["q_rank"] = 24
        return self.model_copy(update=update)

    def params(self, hidden_size: int) -> int:
        d, q = hidden_size, self.heads * self.qk_dim
        query = d * q if self.q_rank is None else d * self.q_rank + self.q_rank * q
        kv = d * (self.kv_rank + self.rope_dim) + self.kv_rank * self.kv_heads * (self.nope_dim + self.v_dim)
        norms = ((self.q_rank or 0) + self.kv_rank) * self.latent_norm
        return query + kv + norms + self.heads * self.v_dim * d

    def flops(self, hidden_size: int, new: int, total: int) -> int:
        norms = ((self.q_rank or 0) + self.kv_rank) * self.latent_norm
        expand = self.kv_rank * self.kv_heads * (self.nope_dim + self.v_dim)
        outer = 2 * (self.params(hidden_size) - norms - expand) * new
        pairs = visible_pairs(new, total)
        if self.absorbs(new, total):
            width = 2 * self.kv_rank + self.rope_dim
            moved = self.heads * self.kv_rank * (self.nope_dim + self.v_dim) * new
            return outer + 2 * moved + 2 * self.heads * width * pairs
        return outer + 2 * expand * total + 2 * self.heads * (self.qk_dim + self.v_dim) * pairs

    def absorbs(self, new: int, total: int) -> bool:
        """Whether the absorbed form costs fewer multiply-adds than expanding `total` latents."""
        up = self.nope_dim + self.v_dim
        expanded = self.kv_heads * self.kv_rank * up * total
        expanded += self.heads * (self.qk_dim + self.v_dim) * new * total
        absorbed = self.heads * self.kv_rank * up * new
        absorbed += self.heads * (2 * self.kv_rank + self.rope_dim) * new * total
        return absorbed < expanded

    def cache_bytes(self, hidden_size: int, seq_len: int, itemsize: int) -> int:
        return (self.kv_rank + self.rope_dim) * seq_len * itemsize

    def build(self, site: Site) -> MLA:
        return MLA(self, site)


class LatentState:
    """[latent | roped key] [B, slots, kv_rank + rope_dim]: no head axis."""

    def __init__(self, latent: Tensor) -> None:
        self.latent = latent
        self.length = 0

    def append(self, latent: Tensor) -> Tensor:
        """Add latent [B, T, r + dr]; returns all of them."""
        start, self.length = self.length, self.length + latent.shape[1]
        self.latent = grown(self.latent, 1, self.length)
        self.latent[:, start : self.length] = latent
        return self.latent[:, : self.length]

    def truncate(self, length: int) -> None:
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        self.latent = self.latent[rows]

    def clone(self) -> LatentState:
        other = LatentState(self.latent.clone())
        other.length = self.length
        return other

    @property
    def nbytes(self) -> int:
        return self.latent.nbytes


class MLA(Mixer):
    """x [B, T, d] -> [B, T, d]; state: LatentState."""

    def __init__(self, config: MLAConfig, site: Site) -> None:
        super().__init__()
        self.config = c = config
        d, q = site.hidden_size, c.heads * c.qk_dim
        self.q_proj = Linear(d, q, bias=False) if c.q_rank is None else None
        self.q_a_proj = None if c.q_rank is None else Linear(d, c.q_rank, bias=False)
        self.q_b_proj = None if c.q_rank is None else Linear(c.q_rank, q, bias=False)
        normed = c.latent_norm and c.q_rank is not None
        self.q_a_norm = RMSNorm(c.q_rank or 0, c.latent_norm_eps) if normed else None
        self.kv_a_proj = Linear(d, c.kv_rank + c.rope_dim, bias=False)
        self.kv_a_norm = RMSNorm(c.kv_rank, c.latent_norm_eps) if c.latent_norm else None
        self.kv_b_proj = Linear(c.kv_rank, c.kv_heads * (c.nope_dim + c.v_dim), bias=False)
        self.o_proj = Linear(c.heads * c.v_dim, d, bias=False)
        self.scale = c.qk_dim**-0.5 * c.rope.softmax_factor

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> LatentState:
        width = self.config.kv_rank + self.config.rope_dim
        return LatentState(torch.empty((batch, slots, width), device=device, dtype=dtype))

    def forward(self, x: Tensor, ctx: Context, state: LatentState | None = None) -> Tensor:
        c = self.config
        q_proj = self.q_proj or self.q_a_proj
        assert q_proj is not None
        q, latent = together(x, q_proj, self.kv_a_proj)
        if self.q_b_proj is not None:
            q = self.q_b_proj(q if self.q_a_norm is None else self.q_a_norm(q))
        q_nope, q_rope = q.unflatten(-1, (c.heads, c.qk_dim)).split((c.nope_dim, c.rope_dim), -1)
        latent, k_rope = latent.split((c.kv_rank, c.rope_dim), -1)
        if self.kv_a_norm is not None:
            latent = self.kv_a_norm(latent)
        cos, sin = ctx.rope(c.rope, c.rope_dim, x.dtype)
        q_rope = apply_rope(q_rope, cos, sin, c.rope.interleaved)
        k_rope = apply_rope(k_rope.unsqueeze(2), cos, sin, c.rope.interleaved).squeeze(2)
        keys = torch.cat((latent, k_rope), -1)
        if state is not None:
            keys = state.append(keys)
        form = self.absorbed if c.absorbs(ctx.length, ctx.total) else self.expanded
        return self.o_proj(form(q_nope, q_rope, keys, ctx))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, ctx: Context) -> Tensor:
        """Attention over expanded keys and values; keys [B, S, r + dr] -> [B, T, H * v_dim]."""
        c = self.config
        latent, k_rope = keys.split((c.kv_rank, c.rope_dim), -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (c.kv_heads, c.nope_dim + c.v_dim)).transpose(1, 2)
        k_nope, v = kv.split((c.nope_dim, c.v_dim), -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, c.kv_heads, -1, -1)), -1)
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        return attend(q, k, v, ctx, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, ctx: Context) -> Tensor:
        """The same over the latent as a single key head of r + dr channels; values are its first r."""
        c = self.config
        b, t = q_nope.shape[:2]
        weight = self.kv_b_proj.weight.view(c.kv_heads, c.nope_dim + c.v_dim, c.kv_rank)
        if t == 1 and ctx.mask() is None:
            q = torch.cat((q_nope, q_rope), -1).squeeze(1)
            out = latent_attention(q, keys, weight, c.v_dim, self.scale)
            if out is not None:
                return out.flatten(1).unsqueeze(1)
        w_k, w_v = weight.split((c.nope_dim, c.v_dim), 1)
        grouped = q_nope.unflatten(2, (c.kv_heads, -1)).permute(2, 0, 1, 3, 4)  # [G, B, T, H/G, dn]
        q_latent = torch.bmm(grouped.reshape(c.kv_heads, -1, c.nope_dim), w_k)
        q_latent = q_latent.view(c.kv_heads, b, t, -1, c.kv_rank).permute(1, 2, 0, 3, 4).flatten(2, 3)
        q = torch.cat((q_latent, q_rope), -1).transpose(1, 2)  # [B, H, T, r + dr]
        single = keys.unsqueeze(1)
        o = attend(q, single, single[..., : c.kv_rank], ctx, self.scale)  # [B, T, H * r]
        o = o.view(b, t, c.kv_heads, -1, c.kv_rank).permute(2, 0, 1, 3, 4).reshape(c.kv_heads, -1, c.kv_rank)
        o = torch.bmm(o, w_v.transpose(1, 2)).view(c.kv_heads, b, t, -1, c.v_dim)
        return o.permute(1, 2, 0, 3, 4).flatten(2)
