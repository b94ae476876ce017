"""RMSNorm (1910.07467): plain, after a residual sum, with LayerNorm Scaling (2502.05795), gated (2405.21060).

Statistics and products are in float32 (float64 for float64 inputs); the result has the dtype of the input.
`*_reference` is the definition of each op.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError
from archzoo.ops.backend import choose, launchable, native, row_stride


def wide(x: Tensor) -> Tensor:
    """x in the dtype of computation."""
    return x if x.dtype == torch.float64 else x.float()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), whose no-op costs as much as a small kernel."""
    return x if x.dtype == dtype else x.to(dtype)


def _groups(x: Tensor, group_size: int | None) -> Tensor:
    size = group_size or x.shape[-1]
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def rms_norm_reference(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * scale.  x [..., d], weight [d] -> y [..., d]."""
    h = wide(x)
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
    """norm(y * silu(gate)) * weight, or norm(y) * weight * silu(gate).  y, gate, result [..., d], weight [d].

    Statistics are taken over each group of `group_size` channels (None: all of them).
    """
    g = F.silu(wide(gate))
    h = wide(y) if norm_before_gate else wide(y) * g
    out = rms_norm_reference(_groups(h, group_size), None, eps).flatten(-2) * weight
    return (out * g if norm_before_gate else out).to(y.dtype)


# --- CPU -------------------------------------------------------------------------------------------
# Two passes over x forward and a closed-form backward: half the time of autograd over the definition.

_SMALL = 2**16  # elements; below, the overhead of calls counts and one call into Rust wins


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


def _rms_forward(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    y = x * (_rstd(x, eps) * scale)
    return y if weight is None else y.mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.scale = eps, scale
        return _rms_forward(x, weight, eps, scale)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rstd = _rstd(x, ctx.eps)
        rows = (dy * x).flatten(0, -2)
        dot = rows.sum(-1) if weight is None else torch.mv(rows, weight)  # mv: not for autocast
        dw = None if weight is None else torch.mv(rows.t(), rstd.flatten() * ctx.scale)
        dx = (dy if weight is None else dy * weight) * (rstd * ctx.scale)
        dx = dx.addcmul_(x, dot.view_as(rstd) * rstd.pow(3), value=-ctx.scale / x.shape[-1])
        return dx, dw, None, None


def _fits(x: Tensor, weight: Tensor | None) -> bool:
    return weight is None or weight.shape == x.shape[-1:]


def _rms_norm_rust(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    y, summed = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    _rust.rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        x.numel() // max(x.shape[-1], 1),
        x.shape[-1],
        eps,
        scale,
        y.data_ptr(),
        summed.data_ptr(),
    )
    return y, summed


def _rms_norm_cpu(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    if 0 < x.numel() < _SMALL and _fits(x, weight) and native(x, weight):
        return _rms_norm_rust(x, None, weight, eps, scale)[0]
    if torch.compiler.is_compiling():  # inductor fuses the definition
        return rms_norm_reference(x, weight, eps, scale)
    grad = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    h = wide(x)
    w = None if weight is None else cast(weight, h.dtype)
    y: Tensor = _RMSNorm.apply(h, w, eps, scale) if grad else _rms_forward(h, w, eps, scale)
    return cast(y, x.dtype)


def _gated_rms_norm_cpu(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> Tensor:
    if y.numel() and y.shape == gate.shape and _fits(y, weight) and native(y, weight, strided=gate):
        out, d, stride = torch.empty_like(y), y.shape[-1], row_stride(gate)
        if stride:
            _rust.gated_rms_norm(
                y.data_ptr(),
                (gate.data_ptr(), stride),
                weight.data_ptr(),
                y.numel() // d,
                d,
                size,
                eps,
                norm_before_gate,
                out.data_ptr(),
                torch.get_num_threads(),
            )
            return out
    g = F.silu(wide(gate))
    h = wide(y) if norm_before_gate else wide(y) * g
    if size == y.shape[-1]:
        out = _rms_norm_cpu(h, weight, eps, 1.0)
    else:
        out = _rms_norm_cpu(_groups(h, size), None, eps, 1.0).flatten(-2) * weight
    return cast(out * g if norm_before_gate else out, y.dtype)


# --- Triton -------------------------------------------------------------------------------------------

_MAX_ROW = 8192  # channels that fit the registers of one program; longer rows take the definition


def _rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    from archzoo.kernels.ops import norm

    return norm.rms_norm(x, None, weight, eps, scale)[0]


def _add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    from archzoo.kernels.ops import norm

    return norm.rms_norm(x, residual, weight, eps, scale)


@torch.library.custom_op("archzoo::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    from archzoo.kernels.ops import norm

    dx, dw = norm.rms_norm_backward(dy, dsummed, x, weight, eps, scale)
    return dx, x.new_empty(0) if dw is None else dw


def _gated_rms_norm_triton(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> Tensor:
    from archzoo.kernels.ops import norm

    return norm.gated_rms_norm(y, gate, weight, eps, size, norm_before_gate)


# The operators that torch records; `launchable` tells when none is needed.
_rms_norm_op = torch.library.custom_op("archzoo::rms_norm", _rms_norm_triton, mutates_args=())
_add_rms_norm_op = torch.library.custom_op("archzoo::add_rms_norm", _add_rms_norm_triton, mutates_args=())
_gated_rms_norm_op = torch.library.custom_op(
    "archzoo::gated_rms_norm", _gated_rms_norm_triton, mutates_args=()
)


@torch.library.custom_op("archzoo::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward_op(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from archzoo.kernels.ops import norm

    return norm.gated_rms_norm_backward(dout, y, gate, weight, eps, size, norm_before_gate)


def _new(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    return _new(x)


@_add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return _new(x, dtype), _new(x, dtype)


@_rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    return _new(x), x.new_empty(0) if weight is None else _new(weight)


@_gated_rms_norm_op.register_fake
def _(y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool) -> Tensor:
    return _new(y)


@_gated_rms_norm_backward_op.register_fake
def _(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(y), _new(gate), _new(weight)


def _rms_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *ctx.args = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dw = _rms_norm_backward_op(dy, None, x, weight, *ctx.args)
    return dx, None if weight is None else dw, None, None


def _add_rms_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, *ctx.args = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_grad(ctx: Any, dy: Tensor, dsummed: Tensor) -> tuple[Any, ...]:
    summed, weight = ctx.saved_tensors
    dx, dw = _rms_norm_backward_op(dy, dsummed, summed, weight, *ctx.args)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), None if weight is None else dw, None, None


def _gated_rms_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    y, gate, weight, *ctx.args = inputs
    ctx.save_for_backward(y, gate, weight)


def _gated_rms_norm_grad(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return *_gated_rms_norm_backward_op(dout, *ctx.saved_tensors, *ctx.args), None, None, None


_rms_norm_op.register_autograd(_rms_norm_grad, setup_context=_rms_norm_setup)
_add_rms_norm_op.register_autograd(_add_rms_norm_grad, setup_context=_add_rms_norm_setup)
_gated_rms_norm_op.register_autograd(_gated_rms_norm_grad, setup_context=_gated_rms_norm_setup)


# --- Ops -------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * scale.  x [..., d], weight [d] -> y [..., d].

    `scale` is the factor 1/sqrt(layer) of LayerNorm Scaling.
    """
    backend = choose(x)
    if backend == "cpu":
        return _rms_norm_cpu(x, weight, eps, scale)
    if backend == "triton" and x.shape[-1] <= _MAX_ROW:
        run = _rms_norm_triton if launchable(x, weight) else _rms_norm_op
        y: Tensor = run(x, weight, eps, scale)
        return y
    return rms_norm_reference(x, weight, eps, scale)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """summed = x + residual, y = rms_norm(summed).  x, residual, y, summed [..., d], weight [d]."""
    backend = choose(x)
    if backend == "cpu":
        fits = x.shape == residual.shape and _fits(x, weight)
        if fits and 0 < x.numel() < _SMALL and native(x, residual, weight):
            return _rms_norm_rust(x, residual, weight, eps, scale)
        summed = x + residual
        return _rms_norm_cpu(summed, weight, eps, scale), summed
    if backend == "triton" and x.shape[-1] <= _MAX_ROW and x.shape == residual.shape:
        add = _add_rms_norm_triton if launchable(x, residual, weight) else _add_rms_norm_op
        both: tuple[Tensor, Tensor] = add(x, residual, weight, eps, scale)
        return both
    return add_rms_norm_reference(x, residual, weight, eps, scale)


def gated_rms_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """norm(y * silu(gate)) * weight, or norm(y) * weight * silu(gate).  y, gate, result [..., d], weight [d].

    Statistics are taken over each group of `group_size` channels (None: all of them).
    """
    size = y.shape[-1] if group_size is None else group_size
    if size < 1 or y.shape[-1] % size:
        raise InputError(f"gated_rms_norm: group_size {size} does not divide {y.shape[-1]} channels")
    backend = choose(y)
    if backend == "cpu":
        return _gated_rms_norm_cpu(y, gate, weight, eps, size, norm_before_gate)
    if backend == "triton" and size <= _MAX_ROW and y.shape == gate.shape:
        run = _gated_rms_norm_triton if launchable(y, gate, weight) else _gated_rms_norm_op
        out: Tensor = run(y, gate, weight, eps, size, norm_before_gate)
        return out
    return gated_rms_norm_reference(y, gate, weight, eps, size, norm_before_gate)
