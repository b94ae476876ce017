# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Causal depthwise convolution over [B, T, C]: forward, backward, one step. Definitions: archzoo/ops/conv.py.

A program owns BT steps of BC channels of one sequence. The K shifted loads of a tile hit the L1 cache. The
backward pass recomputes what precedes the activation, also for the K - 1 steps after its tile, and stores
partial weight gradients, so that their sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels.ops.launch import OPTIONS, contiguous, unit


@triton.jit
def _tap(X, STATE, SEQ, t, shift, c, T, C, stride_t, K: tl.constexpr):
    """x[t - shift, c] in float32 [BT, BC]; zero for t outside [0, T) and in another sequence than t."""
    j = t - shift
    seen = (t >= 0) & (t < T)
    if SEQ is not None:
        seen = seen & (tl.load(SEQ + t, seen, 0) == tl.load(SEQ + tl.maximum(j, 0), seen, 0))
    j, seen, c = j[:, None], seen[:, None] & (c < C)[None, :], c[None, :]
    x = tl.load(X + j * stride_t + c, seen & (j >= 0), 0.0).to(tl.float32)
    if STATE is not None:
        x += tl.load(STATE + (j + K) * C + c, seen & (j < 0), 0.0).to(tl.float32)
    return x


@triton.jit
def _linear(X, W, BIAS, STATE, SEQ, t, c, T, C, stride_t, K: tl.constexpr):
    """The convolution before its activation at steps t, channels c, in float32 [BT, BC]."""
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + c, c < C, 0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(W + c * K + k, c < C, 0.0).to(tl.float32)[None, :]
        y += w * _tap(X, STATE, SEQ, t, K - 1 - k, c, T, C, stride_t, K)
    return y


@triton.jit(do_not_specialize=["T"])
def conv_fwd(
    X, W, BIAS, STATE, SEQ, Y, T, C, stride_b, stride_t,
    K: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if STATE is not None:
        STATE += b * K * C
    if SEQ is not None:
        SEQ += b * T
    y = _linear(X + b * stride_b, W, BIAS, STATE, SEQ, t, c, T, C, stride_t, K)
    if SILU:
        y *= tl.sigmoid(y)
    mask = (t < T)[:, None] & (c < C)[None, :]
    tl.store(Y + (b * T + t[:, None]) * C + c[None, :], y.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def conv_bwd(
    DY, X, W, BIAS, STATE, SEQ, DX, DSTATE, DW, DB, T, C, stride_b, stride_t,
    K: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    partial = b * tl.num_programs(0) + tl.program_id(0)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    X += b * stride_b
    if STATE is not None:
        STATE += b * K * C
        t -= K  # the first K steps are those of the state
    if SEQ is not None:
        SEQ += b * T
    dx = tl.zeros([BT, BC], tl.float32)
    for shift in tl.static_range(K):  # x[t] reaches y[t + shift]
        u = t + shift
        inside = (u >= 0) & (u < T)
        dy = tl.load(DY + (b * T + u[:, None]) * C + c[None, :], inside[:, None] & (c < C)[None, :], 0.0)
        dy = dy.to(tl.float32)
        if SILU:
            y = _linear(X, W, BIAS, STATE, SEQ, u, c, T, C, stride_t, K)
            sig = tl.sigmoid(y)
            dy *= sig * (1 + y * (1 - sig))
        if shift == 0:
            for k in tl.static_range(K):
                dw = tl.sum(dy * _tap(X, STATE, SEQ, t, K - 1 - k, c, T, C, stride_t, K), 0)
                tl.store(DW + (partial * K + k) * C + c, dw, c < C)
            if BIAS is not None:
                tl.store(DB + partial * C + c, tl.sum(dy, 0), c < C)
        if SEQ is not None:
            same = tl.load(SEQ + u, inside, 0) == tl.load(SEQ + tl.maximum(t, 0), inside, 0)
            dy = tl.where(same[:, None], dy, 0.0)
        dx += dy * tl.load(W + c * K + (K - 1 - shift), c < C, 0.0).to(tl.float32)[None, :]
    t, c = t[:, None], c[None, :]
    tl.store(DX + (b * T + t) * C + c, dx.to(DX.dtype.element_ty), (t >= 0) & (t < T) & (c < C))
    if STATE is not None:
        tl.store(DSTATE + (b * K + K + t) * C + c, dx.to(DSTATE.dtype.element_ty), (t < 0) & (c < C))


@triton.jit
def conv_step(X, STATE, W, BIAS, Y, C, stride_x, K: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < C
    STATE += b * K * C
    y = tl.zeros([BC], tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + c, mask, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        if k < K - 1:
            s = tl.load(STATE + (k + 1) * C + c, mask, 0.0)
        else:
            s = tl.load(X + b * stride_x + c, mask, 0.0).to(tl.float32).to(STATE.dtype.element_ty)
        tl.store(STATE + k * C + c, s, mask)
        y += s.to(tl.float32) * tl.load(W + c * K + k, mask, 0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(Y + b * C + c, y.to(Y.dtype.element_ty), mask)


TILE = {"BT": 8, "BC": 128, "num_warps": 2, **OPTIONS}
TILE_BWD = {"BT": 64, "BC": 32, "num_warps": 4, **OPTIONS}
STEP = {"BC": 256, "num_warps": 4, **OPTIONS}


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """x [B, T, C], weight [C, K] -> y [B, T, C]."""
    (B, T, C), K = x.shape, weight.shape[1]
    y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    if y.numel():
        x = unit(x)
        grid = triton.cdiv(T, TILE["BT"]), triton.cdiv(C, TILE["BC"]), B
        with torch.cuda.device_of(x):
            conv_fwd[grid](
                x, weight.contiguous(), contiguous(bias), contiguous(state), contiguous(seq_idx), y,
                T, C, x.stride(0), x.stride(1), K, silu, **TILE,
            )  # fmt: skip
    return y


def conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> dx [B, T, C], dweight [C, K], dbias [C], dstate [B, K, C]."""
    (B, T, C), K = x.shape, weight.shape[1]
    blocks = triton.cdiv(T + (0 if state is None else K), TILE_BWD["BT"]) if x.numel() else 0
    dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    dw = torch.empty(B * blocks, K, C, dtype=torch.float32, device=x.device)
    db = None if bias is None else torch.empty(B * blocks, C, dtype=torch.float32, device=x.device)
    dstate = None if state is None else torch.zeros(B, K, C, dtype=state.dtype, device=x.device)
    if x.numel():
        x = unit(x)
        with torch.cuda.device_of(x):
            conv_bwd[(blocks, triton.cdiv(C, TILE_BWD["BC"]), B)](
                dy.contiguous(), x, weight.contiguous(), contiguous(bias), contiguous(state),
                contiguous(seq_idx), dx, dstate, dw, db, T, C, x.stride(0), x.stride(1), K, silu, **TILE_BWD,
            )  # fmt: skip
    dbias = None if bias is None or db is None else db.sum(0).to(bias.dtype)
    return dx, dw.sum(0).t().contiguous().to(weight.dtype), dbias, dstate


def conv1d_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """x [B, C], state [B, K, C] contiguous, updated in place -> y [B, C]."""
    (B, C), K = x.shape, weight.shape[1]
    y = torch.empty(B, C, dtype=x.dtype, device=x.device)
    if y.numel():
        x = unit(x)
        with torch.cuda.device_of(x):
            conv_step[(triton.cdiv(C, STEP["BC"]), B)](
                x, state, weight.contiguous(), contiguous(bias), y, C, x.stride(0), K, silu, **STEP
            )
    return y
