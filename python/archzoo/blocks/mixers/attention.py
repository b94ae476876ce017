"""Softmax attention with grouped heads: MHA, GQA, MQA, and what the published models add to it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear, together
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import Mixer, MixerConfig, Site, require
from archzoo.blocks.rope import RopeConfig
from archzoo.cache import grown
from archzoo.ops.attention import attention
from archzoo.ops.rope import apply_rope


class Temperature(BaseModel):
    """Queries at position p are multiplied by 1 + scale * log(1 + (p + 1) // floor) (Llama 4, 2501.19399)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scale: float = 0.1
    floor: PositiveInt = 8192


class AttentionConfig(MixerConfig):
    """heads query heads and kv_heads key/value heads of head_dim; rope None (false in TOML) is NoPE.

    `window` w: a token sees itself and the w - 1 before it; `chunk` c: a token sees those before it in its
    own block of c positions (Llama 4). `qk_norm`: RMSNorm of q and k over each head (Qwen3) or over the
    full projection (OLMoE, MiniMax-M2), before RoPE; "l2" is over each head, after RoPE and without weights
    (Llama 4). `clip` bounds q, k and v (OLMoE). `sinks` adds one learned logit a head to the softmax's
    denominator (gpt-oss). RoPE turns the first `rotary_dim` channels (None: all). `scale` multiplies the
    logits (None: head_dim^-1/2).
    """

    kind: Literal["attention"] = "attention"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: Annotated[RopeConfig | None, BeforeValidator(lambda v: None if v is False else v)] = RopeConfig()
    rotary_dim: PositiveInt | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "full", "l2"] | None = None
    clip: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    temperature: Temperature | None = None
    sinks: bool = False
    window: PositiveInt | None = None
    chunk: PositiveInt | None = None

    def check(self, hidden_size: int) -> None:
        require(
            self.heads % self.kv_heads == 0,
            f"attention: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        turned = self.rotary_dim or self.head_dim
        require(
            turned <= self.head_dim, f"attention: rotary_dim ({turned}) exceeds head_dim ({self.head_dim})"
        )
        require(
            self.rope is None or turned % 2 == 0,
            f"attention: RoPE needs an even {'rotary' if self.rotary_dim else 'head'}_dim, found {turned}",
        )
        require(not (self.window and self.chunk), "attention: window and chunk exclude each other")

    def tiny(self) -> AttentionConfig:
        kv_heads = {1: 1, self.heads: 4}.get(self.kv_heads, 2)
        update: dict[str, object] = {"heads": 4, "kv_heads": kv_heads, "head_dim": 16}
        update |= {name: min(v, 8) for name in ("window", "chunk") if (v := getattr(self, name))}
        if self.rotary_dim:
            update["rotary_dim"] = 8
        if self.temperature:
            update["temperature"] = self.temperature.model_copy(update={"floor": 4})
        return self.model_copy(update=update)

    @property
    def reach(self) -> int | None:
        """Most keys that a token sees; None is all."""
        return self.window or self.chunk

    def params(self, hidden_size: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        total = hidden_size * (q + 2 * kv) + q * hidden_size
        total += (q + 2 * kv) * self.qkv_bias + hidden_size * self.o_bias
        norms = {"head": 2 * self.head_dim, "full": q + kv}
        return total + norms.get(self.qk_norm or "", 0) + self.heads * self.sinks

    def flops(self, hidden_size: int, new: int, total: int) -> int:
        linear = 2 * hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) * new
        pairs = visible_pairs(new, total, self.window, self.chunk)
        return linear + 4 * self.heads * self.head_dim * pairs

    def cache_bytes(self, hidden_size: int, seq_len: int, itemsize: int) -> int:
        kept = min(seq_len, self.reach) if self.reach else seq_len
        return 2 * self.kv_heads * self.head_dim * kept * itemsize

    def build(self, site: Site) -> Attention:
        return Attention(self, site)


def visible_pairs(new: int, total: int, window: int | None = None, chunk: int | None = None) -> int:
    """Query-key pairs of `new` causal queries, the last of which stands at position `total` - 1."""
    if chunk is not None:

        def before(n: int) -> int:  # pairs of the first n positions
            return n // chunk * visible_pairs(chunk, chunk) + visible_pairs(n % chunk, n % chunk)

        return before(total) - before(total - new)
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [B, H, T, D] over k, v [B, G, S, D] as `ctx` allows -> [B, T, H * E]."""
    reach = window or chunk
    if ctx.plain_causal and (reach is None or ctx.length <= reach):
        o = attention(q, k, v, scale, causal=ctx.length > 1, sinks=sinks)
    else:
        mask = ctx.mask(window, chunk)
        if mask is not None and mask.shape[-1] != k.shape[2]:  # a window dropped the oldest keys
            mask = mask[..., -k.shape[2] :]
        o = attention(q, k, v, scale, mask, sinks=sinks)
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
        full, wide = c.qk_norm == "full", c.qk_norm in ("head", "full")
        q_size, k_size = (n * c.head_dim if full else c.head_dim for n in (c.heads, c.kv_heads))
        self.q_norm = RMSNorm(q_size, site.norm_eps) if wide else None
        self.k_norm = RMSNorm(k_size, site.norm_eps) if wide else None
        self.sinks = nn.Parameter(torch.empty(c.heads)) if c.sinks else None
        self.scale, self.eps = c.scale or c.head_dim**-0.5, site.norm_eps

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVState:
        c = self.config
        shape = (batch, c.kv_heads, min(slots, c.reach) if c.reach else slots, c.head_dim)
        empty = torch.empty(shape, device=device, dtype=dtype)
        return KVState(empty, torch.empty_like(empty), c.reach)

    def forward(self, x: Tensor, ctx: Context, state: KVState | None = None) -> Tensor:
        c = self.config
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        if c.qk_norm == "full":
            q, k = self._normed(q, k)
        if c.clip is not None:
            q, k, v = (t.clamp(-c.clip, c.clip) for t in (q, k, v))
        q = q.unflatten(-1, (c.heads, c.head_dim))
        k = k.unflatten(-1, (c.kv_heads, c.head_dim))
        v = v.unflatten(-1, (c.kv_heads, c.head_dim)).transpose(1, 2)
        if c.qk_norm == "head":
            q, k = self._normed(q, k)
        if c.rope is not None:
            cos, sin = ctx.rope(c.rope, c.rotary_dim or c.head_dim, x.dtype)
            q, k = (apply_rope(t, cos, sin, c.rope.interleaved) for t in (q, k))
        if c.qk_norm == "l2":
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k = (F.rms_norm(t.to(wide), (c.head_dim,), eps=self.eps).to(x.dtype) for t in (q, k))
        if c.temperature is not None:
            q = q * self._temperature(ctx, c.temperature).to(x.dtype)
        k = k.transpose(1, 2)
        if state is not None:
            k, v = state.append(k, v)
        o = attend(q.transpose(1, 2), k, v, ctx, self.scale, c.window, c.chunk, self.sinks)
        return self.o_proj(o)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)

    @staticmethod
    def _temperature(ctx: Context, config: Temperature) -> Tensor:
        """[T, 1, 1] or [B, T, 1, 1]."""
        steps = (ctx.query_positions + 1).div(config.floor, rounding_mode="floor")
        return (1 + config.scale * torch.log1p(steps.double()))[..., None, None]
