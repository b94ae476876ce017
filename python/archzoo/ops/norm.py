"""RMSNorm (1910.07467), with a fused residual sum, with LayerNorm Scaling (2502.05795), and gated (Mamba-2, 2405.21060).

Statistics and products are in float32 (float64 for float64 inputs); the result has the dtype of the input.
`*_reference` is the definition of each op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archzoo.errors import InputError
from archzoo.ops.backend import choose


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _groups(x: Tensor, group_size: int | None) -> Tensor:
    size = group_size or x.shape[-1]
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * scale.  x [..., d], weight [d] -> y [..., d]."""
    h = _wide(x)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * scale
    return (y if weight is None else y * weight).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """summed = x + residual, y = rms_norm(summed).  x, residual [..., d] -> y, summed [..., d]."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps, scale), summed


def gated_rms_norm_reference(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """norm(y * silu(gate)) * weight, or norm(y) * weight * silu(gate).  y, gate [..., d], weight [d] -> [..., d].

    Statistics are taken over each group of `group_size` channels (None: all of them).
    """
    g = F.silu(_wide(gate))
    h = _wide(y) if norm_before_gate else _wide(y) * g
    out = rms_norm_reference(_groups(h, group_size), None, eps).flatten(-2) * weight
    return (out * g if norm_before_gate else out).to(y.dtype)


# --- CPU ---------------------------------------------------------------------------------------------------------
# Two passes over x forward and a closed-form backward: half the time of autograd over the definition.


def _rms_forward(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    y = x * (rstd * scale)
    return (y if weight is None else y.mul_(weight)), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, scale):  # type: ignore[no-untyped-def]
        y, rstd = _rms_forward(x, weight, eps, scale)
        ctx.save_for_backward(x, weight, rstd)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        rows = (dy * x).flatten(0, -2)
        dot = rows.sum(-1) if weight is None else rows @ weight
        dw = None if weight is None else rows.t() @ (rstd.flatten() * ctx.scale)
        dx = (dy if weight is None else dy * weight) * (rstd * ctx.scale)
        dx.addcmul_(x, dot.view_as(rstd) * rstd.pow(3), value=-ctx.scale / x.shape[-1])
        return dx, dw, None, None


def _rms_norm_cpu(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    if torch.compiler.is_compiling():  # inductor fuses the definition
        return rms_norm_reference(x, weight, eps, scale)
    h, w = _wide(x), None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled() and (x.requires_grad or (w is not None and w.requires_grad)):
        return _RMSNorm.apply(h, w, eps, scale).to(x.dtype)  # type: ignore[no-any-return]
    return _rms_forward(h, w, eps, scale)[0].to(x.dtype)


def _gated_rms_norm_cpu(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int | None, norm_before_gate: bool
) -> Tensor:
    g = F.silu(_wide(gate))
    h = _wide(y) if norm_before_gate else _wide(y) * g
    if group_size is None or group_size == h.shape[-1]:
        out = _rms_norm_cpu(h, weight, eps, 1.0)
    else:
        out = _rms_norm_cpu(_groups(h, group_size), None, eps, 1.0).flatten(-2) * weight
    return (out * g if norm_before_gate else out).to(y.dtype)


# --- Ops ---------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * scale.  x [..., d], weight [d] -> y [..., d].

    `scale` is the factor 1/sqrt(layer) of LayerNorm Scaling.
    """
    if choose(x) == "cpu":
        return _rms_norm_cpu(x, weight, eps, scale)
    return rms_norm_reference(x, weight, eps, scale)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """summed = x + residual, y = rms_norm(summed).  x, residual [..., d], weight [d] -> y, summed [..., d]."""
    if choose(x) == "cpu":
        summed = x + residual
        return _rms_norm_cpu(summed, weight, eps, scale), summed
    return add_rms_norm_reference(x, residual, weight, eps, scale)


def gated_rms_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """norm(y * silu(gate)) * weight, or norm(y) * weight * silu(gate).  y, gate [..., d], weight [d] -> [..., d].

    Statistics are taken over each group of `group_size` channels (None: all of them).
    """
    if group_size is not None and (group_size < 1 or y.shape[-1] % group_size):
        raise InputError(f"gated_rms_norm: group_size {group_size} does not divide {y.shape[-1]} channels")
    if choose(y) == "cpu":
        return _gated_rms_norm_cpu(y, gate, weight, eps, group_size, norm_before_gate)
    return gated_rms_norm_reference(y, gate, weight, eps, group_size, norm_before_gate)
