"""Softmax attention with grouped heads: MHA, GQA, MQA; optional biases, QK-norm, sliding window."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear, together
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import Mixer, MixerConfig, Site, require
from archzoo.blocks.rope import RopeConfig, apply_rope
from archzoo.cache import grown
from archzoo.ops.attention import attention


class AttentionConfig(MixerConfig):
    """heads query heads and kv_heads key/value heads of head_dim; rope=None is NoPE.

    `window` w: a token sees itself and the w - 1 before it. `qk_norm`: RMSNorm over each head of q
    and k before RoPE (Qwen3).
    """

    kind: Literal["attention"] = "attention"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: RopeConfig | None = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    window: PositiveInt | None = None

    def check(self, hidden_size: int) -> None:
        require(
            self.heads % self.kv_heads == 0,
            f"attention: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            self.rope is None or self.head_dim % 2 == 0,
            f"attention: RoPE needs an even head_dim, found {self.head_dim}",
        )

    def tiny(self) -> AttentionConfig:
        heads = 4 if self.kv_heads < self.heads else 2
        kv_heads = 1 if self.kv_heads == 1 else 2
        window = min(self.window, 8) if self.window else None
        return self.model_copy(
            update={"heads": heads, "kv_heads": kv_heads, "head_dim": 16, "window": window}
        )

    def params(self, hidden_size: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        total = hidden_size * (q + 2 * kv) + q * hidden_size
        total += (q + 2 * kv) * self.qkv_bias + hidden_size * self.o_bias
        return total + 2 * self.head_dim * self.qk_norm

    def flops(self, hidden_size: int, new: int, total: int) -> int:
        linear = 2 * hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) * new
        return linear + 4 * self.heads * self.head_dim * visible_pairs(new, total, self.window)

    def cache_bytes(self, hidden_size: int, seq_len: int, itemsize: int) -> int:
        kept = min(seq_len, self.window) if self.window else seq_len
        return 2 * self.kv_heads * self.head_dim * kept * itemsize

    def build(self, site: Site) -> Attention:
        return Attention(self, site)


def visible_pairs(new: int, total: int, window: int | None = None) -> int:
    """Query-key pairs of `new` causal queries, the last of which sees `total` keys."""
    if window is None:
        return new * total - new * (new - 1) // 2
    first = total - new + 1  # keys that the first query would see without a window
    short = max(0, min(new, window - first + 1))  # queries that see less than a full window
    return short * (first + first + short - 1) // 2 + (new - short) * window


class KVState:
    """Keys and values [B, G, slots, D] of one layer; of a windowed layer only the last `window`."""

    def __init__(self, k: Tensor, v: Tensor, window: int | None = None) -> None:
        self.k, self.v, self.window = k, v, window
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [B, G, T, D]; returns the keys and values that the new tokens may see."""
        if self.window is not None:
            return self._roll(k, v, self.window)
        start, self.length = self.length, self.length + k.shape[2]
        self.k, self.v = grown(self.k, 2, self.length), grown(self.v, 2, self.length)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def _roll(self, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        seen_k = torch.cat((self.k[:, :, : self.length], k), 2)
        seen_v = torch.cat((self.v[:, :, : self.length], v), 2)
        self.length = min(seen_k.shape[2], window)
        self.k, self.v = grown(self.k, 2, self.length), grown(self.v, 2, self.length)
        self.k[:, :, : self.length] = seen_k[:, :, -self.length :]
        self.v[:, :, : self.length] = seen_v[:, :, -self.length :]
        return seen_k, seen_v

    @property
    def truncatable(self) -> bool:
        return self.window is None  # a window has already dropped what a shorter past would need

    def truncate(self, length: int) -> None:
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def clone(self) -> KVState:
        other = KVState(self.k.clone(), self.v.clone(), self.window)
        other.length = self.length
        return other

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of q [B, H, T, D] over k, v [B, G, S, D] as `ctx` allows -> [B, T, H * E]."""
    if ctx.plain_causal and (window is None or ctx.length <= window):
        o = attention(q, k, v, scale, causal=ctx.length > 1)
    else:
        mask = ctx.mask(window)
        if mask is not None and mask.shape[-1] != k.shape[2]:  # a window dropped the oldest keys
            mask = mask[..., -k.shape[2] :]
        o = attention(q, k, v, scale, mask)
    return o.transpose(1, 2).flatten(2)


class Attention(Mixer):
    """x [B, T, d] -> [B, T, d]; state: KVState."""

    def __init__(self, config: AttentionConfig, site: Site) -> None:
        super().__init__()
        self.config = c = config
        d = site.hidden_size
        self.q_proj = Linear(d, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(d, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(d, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, d, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, site.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, site.norm_eps) if c.qk_norm else None

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVState:
        c = self.config
        shape = (batch, c.kv_heads, min(slots, c.window) if c.window else slots, c.head_dim)
        empty = torch.empty(shape, device=device, dtype=dtype)
        return KVState(empty, torch.empty_like(empty), c.window)

    def forward(self, x: Tensor, ctx: Context, state: KVState | None = None) -> Tensor:
        c = self.config
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.unflatten(-1, (c.heads, c.head_dim))
        k = k.unflatten(-1, (c.kv_heads, c.head_dim))
        v = v.unflatten(-1, (c.kv_heads, c.head_dim)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rope is not None:
            cos, sin = ctx.rope(c.rope, c.head_dim, x.dtype)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k = k.transpose(1, 2)
        if state is not None:
            k, v = state.append(k, v)
        o = attend(q.transpose(1, 2), k, v, ctx, c.head_dim**-0.5, c.window)
        return self.o_proj(o)
