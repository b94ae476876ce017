"""Scaled dot-product attention over grouped heads, softmax in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from archzoo import _rust
from archzoo.ops.backend import addressable, choose, native

_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q kT * scale) v: q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] -> [B, H, T, E].

    Query head i reads key head i // (H / G). `mask` is True where a key is seen ([T, S] or
    [B, 1, T, S]); `causal` is the lower triangle of T == S. `sinks` [H] are logits of one more key per
    head, whose value is 0. A query that sees nothing gives 0.
    """
    backend = choose(q)
    if backend == "reference":
        return _reference(q, k, v, scale, mask, causal, sinks)
    # What flash attention does not take, torch would do with a copy of the keys for each query head.
    if q.shape[2] == 1 and (backend == "cpu" or v.shape[-1] != q.shape[-1] or q.shape[-1] > 256):
        return _decode(q, k, v, scale, mask, sinks)
    if sinks is not None:
        return _with_sinks(q, k, v, scale, mask, causal, sinks)
    grouped, width = k.shape[1] != q.shape[1], v.shape[-1]
    if backend == "cpu" and width < q.shape[-1] and v.shape[:-1] == k.shape[:-1]:
        # torch's flash attention wants one width
        v = F.pad(v, (0, q.shape[-1] - width))
    with _kernels(q, k):
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return o[..., :width]


def _kernels(q: Tensor, k: Tensor) -> AbstractContextManager[None]:
    """Decoding on a GPU goes without cuDNN, which plans anew (3 ms) for each number of keys."""
    return sdpa_kernel(_UNPLANNED) if q.is_cuda and q.shape[2] < k.shape[2] else nullcontext()


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    sinks: Tensor | None = None,
) -> Tensor:
    rep = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        return _sunk(scores, sinks).to(v.dtype) @ v
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)  # avoids NaN; the row is zeroed below
        return (scores.softmax(-1).to(v.dtype) @ v).masked_fill(blind, 0.0)
    return scores.softmax(-1).to(v.dtype) @ v


def _sunk(scores: Tensor, sinks: Tensor) -> Tensor:
    """softmax of scores [B, H, T, S] beside the logits `sinks` [H], which keep their share."""
    extra = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, extra), -1).softmax(-1)[..., :-1]


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, sinks: Tensor
) -> Tensor:
    """The sink as key 0. Its logit differs by head: each query head of a group has a channel of its own."""
    (b, h, t, d), (g, s), e = q.shape, k.shape[1:3], v.shape[-1]
    rep = h // g
    own = torch.eye(rep, dtype=q.dtype, device=q.device).repeat(g, 1)[None, :, None]  # [1, H, 1, H/G]
    q = torch.cat((q, own.expand(b, h, t, rep)), -1)
    logits = (sinks / scale).to(k.dtype).view(1, g, 1, rep).expand(b, g, 1, rep)
    k = torch.cat((F.pad(logits, (d, 0)), F.pad(k, (0, rep))), 2)
    v = F.pad(v, (0, rep, 1, 0))  # as wide as k, which the flash path of a CPU asks for
    if causal:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    with _kernels(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=g != h)[
            ..., :e
        ]


def _decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None = None
) -> Tensor:
    """One query per row: the H / G queries of a group are the rows of one small product."""
    b, h, _, d = q.shape
    g = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide)  # rounded scores would be off by up to 2^-8 of their size
    plain = mask is None and sinks is None
    if plain and addressable(q, k, v) and _rust_reads(q, k, v) and native(q.contiguous()):
        return _rust_decode(q.contiguous(), k, v, scale)
    scores = (q.reshape(b, g, h // g, d) * scale) @ k.to(wide).transpose(-1, -2)
    if mask is not None:  # a finite minimum, so that a query which sees nothing gives no NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        probs = _sunk(scores.view(b, h, 1, -1), sinks).view_as(scores)
    else:
        probs = scores.softmax(-1)
    if mask is not None:
        probs = probs.masked_fill(~mask, 0.0)
    return (probs.to(v.dtype) @ v).reshape(b, h, 1, v.shape[-1])


def _rust_reads(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """fp32 or bf16 with contiguous rows, no gradient: any strides of row, head and slot will do."""
    (b, h, _, d), (rows, groups, slots, dim) = q.shape, k.shape
    if (rows, dim) != (b, d) or v.shape[:3] != k.shape[:3] or h % groups or not slots:
        return False  # torch says what is wrong
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return False
    plain = k.dtype == v.dtype and k.dtype in (torch.float32, torch.bfloat16)
    return plain and k.stride(-1) == 1 and v.stride(-1) == 1


def _rust_decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    b, h, _, d = q.shape
    e = v.shape[-1]
    out = q.new_empty((b, h, 1, e))
    _rust.attention(
        (b, h, k.shape[1], k.shape[2], d, e),
        q.data_ptr(),
        (k.data_ptr(), k.stride()[:3]),
        (v.data_ptr(), v.stride()[:3]),
        scale,
        k.dtype == torch.bfloat16,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(v.dtype)


def latent_attention(q: Tensor, keys: Tensor, weight: Tensor, v_dim: int, scale: float) -> Tensor | None:
    """Absorbed MLA decode in one call: q [B, H, nope + rope], keys [B, S, r + rope], all of which are seen,
    weight [G, nope + v, r] of the up-projection -> [B, H, v]; None where Rust does not take it.
    """
    b, h, width = q.shape
    groups, up, rank = weight.shape
    rope, nope = keys.shape[-1] - rank, up - v_dim
    fits = nope + rope == width and keys.shape[0] == b and keys.shape[1] > 0 and h % groups == 0
    if not fits or keys.stride(-1) != 1 or not (native(weight, strided=q) and native(strided=keys)):
        return None
    q = q.contiguous()
    out = q.new_empty((b, h, v_dim))
    _rust.latent_attention(
        (b, h, groups, keys.shape[1], rank, nope, rope, v_dim),
        q.data_ptr(),
        (keys.data_ptr(), (keys.stride(0), keys.stride(1))),
        weight.data_ptr(),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
