"""Rotary position embedding of queries and keys (2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo import _rust
from archzoo.ops.backend import native


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R channels of x [B, T, H, D] by cos, sin [T, R/2] or [B, T, R/2].

    The result is in half-split order; channels beyond R stay.
    """
    if _fits(x, cos, sin) and native(cos, sin, strided=x):
        return _rope_rust(x, cos, sin, interleaved)
    r = 2 * cos.shape[-1]
    if r < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :r], cos, sin, interleaved), x[..., r:]), -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether Rust may read these as they are; torch says what is wrong with others."""
    if x.dim() != 4 or x.stride(3) != 1 or sin.shape != cos.shape or cos.dim() not in (2, 3):
        return False
    b, t, _, d = x.shape
    rows = cos.shape[0] if cos.dim() == 3 else 1
    return rows in (1, b) and cos.shape[-2] == t and 2 * cos.shape[-1] <= d


def _rope_rust(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    b, t, h, d = x.shape
    _rust.rope(
        (b, t, h, d, cos.shape[-1]),
        (x.data_ptr(), (x.stride(0), x.stride(1), x.stride(2))),
        (cos.data_ptr(), sin.data_ptr(), cos.dim() == 3 and cos.shape[0] > 1),
        interleaved,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
