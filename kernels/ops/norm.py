# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""RMSNorm, plain, after a residual sum, and gated: forward and backward. Definitions: archzoo/ops/norm.py.

A program holds ROWS whole rows (of one group, for the gated norm) in registers. Backward programs walk over
the rows with a stride and store one partial weight gradient each, so that the sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels.ops.launch import contiguous, persistent, rows, tile


@triton.jit(do_not_specialize=["n"])
def rms_norm_fwd(
    X, RES, W, Y, SUM, n, d, stride_x, stride_res, eps, scale, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    col = tl.arange(0, COLS)[None, :]
    mask = (row < n) & (col < d)
    x = tl.load(X + row * stride_x + col, mask, 0.0).to(tl.float32)
    if RES is not None:
        x += tl.load(RES + row * stride_res + col, mask, 0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + row * d + col, rounded, mask)
        x = rounded.to(tl.float32)
    y = x * (tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / d + eps) * scale)
    if W is not None:
        y *= tl.load(W + col, col < d, 0.0).to(tl.float32)
    tl.store(Y + row * d + col, y.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def rms_norm_bwd(
    DY, DSUM, X, W, DX, DW, n, d, stride_dy, stride_dsum, stride_x, eps, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    col = tl.arange(0, COLS)[None, :]
    dw = tl.zeros([1, COLS], tl.float32)
    for i in range(pid, tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = (i * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        mask = (row < n) & (col < d)
        x = tl.load(X + row * stride_x + col, mask, 0.0).to(tl.float32)
        dy = tl.load(DY + row * stride_dy + col, mask, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / d + eps)
        h = tl.where(mask, x * rstd, 0.0)  # with eps = 0, a row of padding is NaN
        if W is not None:
            dw += tl.sum(dy * h, 0, keep_dims=True)
            dy *= tl.load(W + col, col < d, 0.0).to(tl.float32)
        dx = (dy - h * (tl.sum(dy * h, 1, keep_dims=True) / d)) * (rstd * scale)
        if DSUM is not None:
            dx += tl.load(DSUM + row * stride_dsum + col, mask, 0.0).to(tl.float32)
        tl.store(DX + row * d + col, dx.to(DX.dtype.element_ty), mask)
    if W is not None:
        tl.store(DW + pid * d + col, dw * scale, col < d)


@triton.jit(do_not_specialize=["n"])
def gated_rms_norm_fwd(
    Y, Z, W, OUT, n, d, size, stride_y, stride_z, eps,
    NORM_FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    lane = tl.arange(0, COLS)[None, :]
    col = tl.program_id(1) * size + lane
    mask = (row < n) & (lane < size)
    h = tl.load(Y + row * stride_y + col, mask, 0.0).to(tl.float32)
    z = tl.load(Z + row * stride_z + col, mask, 0.0).to(tl.float32)
    z *= tl.sigmoid(z)
    if not NORM_FIRST:
        h *= z
    h *= tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / size + eps)
    h *= tl.load(W + col, lane < size, 0.0).to(tl.float32)
    if NORM_FIRST:
        h *= z
    tl.store(OUT + row * d + col, h.to(OUT.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def gated_rms_norm_bwd(
    DOUT, Y, Z, W, DY, DZ, DW, n, d, size, stride_dout, stride_y, stride_z, eps,
    NORM_FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    lane = tl.arange(0, COLS)[None, :]
    col = tl.program_id(1) * size + lane
    dw = tl.zeros([1, COLS], tl.float32)
    for i in range(pid, tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = (i * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        mask = (row < n) & (lane < size)
        y = tl.load(Y + row * stride_y + col, mask, 0.0).to(tl.float32)
        z = tl.load(Z + row * stride_z + col, mask, 0.0).to(tl.float32)
        g = tl.load(DOUT + row * stride_dout + col, mask, 0.0).to(tl.float32)
        silu = z * tl.sigmoid(z)
        if NORM_FIRST:
            h = y
            g *= silu
        else:
            h = y * silu
        rstd = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / size + eps)
        h = tl.where(mask, h * rstd, 0.0)  # with eps = 0, a row of padding is NaN
        dw += tl.sum(g * h, 0, keep_dims=True)
        w = tl.load(W + col, lane < size, 0.0).to(tl.float32)
        g *= w
        g = (g - h * (tl.sum(g * h, 1, keep_dims=True) / size)) * rstd
        # Loaded again, from L1, to save registers: the modifier keeps the compiler from reusing a register.
        z = tl.load(Z + row * stride_z + col, mask, 0.0, cache_modifier=".ca").to(tl.float32)
        sig = tl.sigmoid(z)
        dsilu = sig * (1 + z * (1 - sig))
        if NORM_FIRST:
            dout = tl.load(DOUT + row * stride_dout + col, mask, 0.0, cache_modifier=".ca").to(tl.float32)
            dy, dz = g, dout * w * h * dsilu
        else:
            y = tl.load(Y + row * stride_y + col, mask, 0.0, cache_modifier=".ca").to(tl.float32)
            dy, dz = g * z * sig, g * y * dsilu
        tl.store(DY + row * d + col, dy.to(DY.dtype.element_ty), mask)
        tl.store(DZ + row * d + col, dz.to(DZ.dtype.element_ty), mask)
    tl.store(DW + pid * d + col, dw, lane < size)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """x [..., d] (+ residual) -> y, summed; summed is x itself without a residual."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(y)
    if x.numel():
        x2, r2, d = rows(x), None if residual is None else rows(residual), x.shape[-1]
        config = tile(d)
        with torch.cuda.device_of(x):
            rms_norm_fwd[(triton.cdiv(len(x2), config["ROWS"]),)](
                x2, r2, contiguous(weight), y, None if residual is None else summed, len(x2), d,
                x2.stride(0), 0 if r2 is None else r2.stride(0), eps, float(scale), **config,
            )  # fmt: skip
    return y, summed


def rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """-> dx [..., d] in the dtype of x, dw [d] in the dtype of the weight."""
    d, dx = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = tile(d)
    n = x.numel() // d
    programs = persistent(triton.cdiv(n, config["ROWS"]), x.device)
    dw = None if weight is None else torch.empty(programs, d, dtype=torch.float32, device=x.device)
    if n:
        dy2, x2, ds2 = rows(dy), rows(x), None if dsummed is None else rows(dsummed)
        with torch.cuda.device_of(x):
            rms_norm_bwd[(programs,)](
                dy2, ds2, x2, contiguous(weight), dx, dw, n, d,
                dy2.stride(0), 0 if ds2 is None else ds2.stride(0), x2.stride(0), eps, float(scale), **config,
            )  # fmt: skip
    return dx, None if weight is None or dw is None else dw.sum(0).to(weight.dtype)


def gated_rms_norm(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> Tensor:
    """y, gate [..., d] -> [..., d], statistics per `size` channels."""
    out, d = torch.empty(y.shape, dtype=y.dtype, device=y.device), y.shape[-1]
    if y.numel():
        y2, z2, config = rows(y), rows(gate), tile(size)
        with torch.cuda.device_of(y):
            gated_rms_norm_fwd[(triton.cdiv(len(y2), config["ROWS"]), d // size)](
                y2, z2, weight.contiguous(), out, len(y2), d, size, y2.stride(0), z2.stride(0), eps,
                norm_before_gate, **config,
            )  # fmt: skip
    return out


def gated_rms_norm_backward(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dy, dgate [..., d], dw [d]."""
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = torch.empty(y.shape, dtype=gate.dtype, device=y.device)
    config, d = tile(size, 1024), y.shape[-1]
    n = y.numel() // d
    programs = persistent(triton.cdiv(n, config["ROWS"]), y.device)
    dw = torch.empty(programs, d, dtype=torch.float32, device=y.device)
    if n:
        dout2, y2, z2 = rows(dout), rows(y), rows(gate)
        with torch.cuda.device_of(y):
            gated_rms_norm_bwd[(programs, d // size)](
                dout2, y2, z2, weight.contiguous(), dy, dz, dw, n, d, size,
                dout2.stride(0), y2.stride(0), z2.stride(0), eps, norm_before_gate, **config,
            )  # fmt: skip
    return dy, dz, dw.sum(0).to(weight.dtype)
