"""Causal depthwise convolution over time with an optional SiLU (Mamba, 2312.00752).

Layout [B, T, C] throughout. Products are in float32 (float64 for float64 inputs); y has the dtype of x.
`*_reference` is the definition of each op.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError
from archzoo.ops.backend import choose, launchable, native
from archzoo.ops.norm import cast, wide


def _weight(weight: Tensor, activation: str | None) -> Tensor:
    """[C, K] from [C, K] or [C, 1, K]; checks the name of the activation on the way."""
    if activation not in ("silu", None):
        raise InputError(f"causal_conv1d: activation must be 'silu' or None, not {activation!r}")
    return weight.squeeze(1) if weight.dim() == 3 else weight


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """y[t] = act(sum_k weight[:, k] x[t - K + 1 + k] + bias); see `causal_conv1d`."""
    weight = _weight(weight, activation)
    (B, T, C), K = x.shape, weight.shape[1]
    past = x.new_zeros(B, K - 1, C) if state is None else state[:, 1:]
    taps = torch.cat([wide(past), wide(x)], 1)
    y = torch.zeros_like(x, dtype=taps.dtype) if bias is None else bias.to(taps.dtype)
    for k in range(K):
        tap = taps[:, k : k + T]
        if seq_idx is not None:  # inputs before x belong to the first sequence
            source = seq_idx[:, (torch.arange(T, device=x.device) - (K - 1 - k)).clamp(min=0)]
            tap = torch.where((source == seq_idx).unsqueeze(-1), tap, 0)
        y = y + tap * weight[:, k]
    return (y if activation is None else F.silu(y)).to(x.dtype)


def causal_conv1d_step_reference(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """Roll `state` left, append x, take the dot product; see `causal_conv1d_step`."""
    weight = _weight(weight, activation)
    taps = torch.cat([state[:, 1:], cast(x, state.dtype).unsqueeze(1)], 1)
    state.copy_(taps)
    y = (wide(taps) * weight.t()).sum(1)
    y = y if bias is None else y + bias
    return cast(y if activation is None else F.silu(y), x.dtype)


# --- CPU -------------------------------------------------------------------------------------------
# K shifted multiply-adds in place: three times as fast as F.conv1d(groups=C), which wants [B, C, T].


def _conv_forward(taps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    w, T = weight.t().contiguous(), taps.shape[1] - weight.shape[1] + 1
    y = taps[:, :T] * w[0] if bias is None else torch.addcmul(bias, taps[:, :T], w[0])
    for k in range(1, len(w)):
        y.addcmul_(taps[:, k : k + T], w[k])
    return y


class _Conv(torch.autograd.Function):
    """taps [B, K - 1 + T, C] (x with its past), weight [C, K], bias [C] -> y [B, T, C]."""

    @staticmethod
    def forward(ctx, taps, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(taps, weight)
        return _conv_forward(taps, weight, bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        taps, weight = ctx.saved_tensors
        w, T = weight.t().contiguous(), dy.shape[1]
        dtaps = dw = db = None
        if ctx.needs_input_grad[0]:
            dtaps = torch.zeros_like(taps)
            for k in range(len(w)):
                dtaps[:, k : k + T].addcmul_(dy, w[k])
        if ctx.needs_input_grad[1]:
            dw = torch.stack([(dy * taps[:, k : k + T]).sum((0, 1)) for k in range(len(w))], 1)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 1))
        return dtaps, dw, db


def _causal_conv1d_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> Tensor:
    (B, T, C), K = x.shape, weight.shape[1]
    fits = weight.shape[0] == C and (bias is None or bias.shape == (C,))
    fits = fits and (state is None or state.shape == (B, K, C))
    if fits and x.numel() and x.stride(2) == 1 and native(weight, bias, state, strided=x):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _rust.conv(
            (B, T, C, K),
            (x.data_ptr(), x.stride(0), x.stride(1)),
            0 if state is None else state.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            activation is not None,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y
    h = wide(x)
    weight, bias = cast(weight, h.dtype), None if bias is None else cast(bias, h.dtype)
    taps = F.pad(h, (0, 0, K - 1, 0)) if state is None else torch.cat([cast(state[:, 1:], h.dtype), h], 1)
    needs_grad = taps.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        y = _Conv.apply(taps, weight, bias)
        y = y if activation is None else F.silu(y)
    else:
        y = _conv_forward(taps, weight, bias)
        y = y if activation is None else F.silu(y, inplace=True)
    return cast(y, x.dtype)


# --- Triton -------------------------------------------------------------------------------------------

_MAX_TAPS = 4  # the kernels unroll K * K loads; longer convolutions take the definition


def _conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    from archzoo.kernels.ops import conv

    return conv.conv1d(x, weight, bias, silu, state, seq_idx)


@torch.library.custom_op("archzoo::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from archzoo.kernels.ops import conv

    dx, dw, db, dstate = conv.conv1d_backward(dy, x, weight, bias, silu, state, seq_idx)
    return dx, dw, x.new_empty(0) if db is None else db, x.new_empty(0) if dstate is None else dstate


def _conv_step_triton(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from archzoo.kernels.ops import conv

    return conv.conv1d_step(x, state, weight, bias, silu)


# The operators that torch records; `launchable` tells when none is needed.
_conv_op = torch.library.custom_op("archzoo::causal_conv1d", _conv_triton, mutates_args=())
_conv_step_op = torch.library.custom_op(
    "archzoo::causal_conv1d_step", _conv_step_triton, mutates_args=("state",)
)


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    return _new(x)


@_conv_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    db, dstate = (x.new_empty(0) if t is None else _new(t) for t in (bias, state))
    return _new(x), _new(weight), db, dstate


@_conv_step_op.register_fake
def _(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _new(x)


def _conv_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, ctx.silu, state, seq_idx = inputs
    ctx.save_for_backward(x, weight, bias, state, seq_idx)


def _conv_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, state, seq_idx = ctx.saved_tensors
    dx, dw, db, dstate = _conv_backward_op(dy, x, weight, bias, ctx.silu, state, seq_idx)
    return dx, dw, None if bias is None else db, None, None if state is None else dstate, None


_conv_op.register_autograd(_conv_grad, setup_context=_conv_setup)


# --- Ops -------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """y[t] = act(sum_k weight[:, k] x[t - K + 1 + k] + bias), a causal depthwise convolution.

    Args:
        x: [B, T, C].
        weight: [C, K] or [C, 1, K].
        bias: [C] or None.
        activation: "silu" or None.
        state: [B, K, C], the last K inputs before x, oldest first (only the last K - 1 matter); None: zeros.
        seq_idx: [B, T] integers; taps from another sequence count as zero. `state` belongs to seq_idx[:, 0].
    Returns:
        y [B, T, C].
    """
    weight = _weight(weight, activation)
    backend = choose(x)
    if backend == "cpu" and seq_idx is None:
        return _causal_conv1d_cpu(x, weight, bias, activation, state)
    if backend == "triton" and weight.shape[1] <= _MAX_TAPS:
        run = _conv_triton if launchable(x, weight, bias, state, seq_idx) else _conv_op
        y: Tensor = run(x, weight, bias, activation == "silu", state, seq_idx)
        return y
    return causal_conv1d_reference(x, weight, bias, activation, state, seq_idx)


def causal_conv1d_state(x: Tensor, kernel_size: int, state: Tensor | None = None) -> Tensor:
    """The last `kernel_size` inputs after x [B, T, C], zero-padded on the left -> state [B, K, C]."""
    K, T = kernel_size, x.shape[1]
    if T >= K:
        return x[:, T - K :].clone(memory_format=torch.contiguous_format)  # a view would keep all of x alive
    past = x.new_zeros(x.shape[0], K - T, x.shape[2]) if state is None else state[:, T:].to(x.dtype)
    return torch.cat([past, x], 1)


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """One step of `causal_conv1d`, without gradients.  x [B, C] -> y [B, C].

    `state` [B, K, C] is updated in place: rolled left, x appended. The rest is as in `causal_conv1d`.
    """
    if choose(x) == "triton" and state.is_contiguous():
        run = _conv_step_triton if launchable(x, state, weight, bias) else _conv_step_op
        y: Tensor = run(x, state, _weight(weight, activation), bias, activation == "silu")
        return y
    taps = _weight(weight, activation)
    (b, c), sizes = x.shape, (taps.shape[0], 0 if bias is None else bias.shape[0])
    fits = state.shape == (b, taps.shape[1], c) and sizes == (c, 0 if bias is None else c)
    if fits and x.numel() and native(x, state, taps, bias):
        y, (rows, channels) = torch.empty_like(x), x.shape
        pointers = x.data_ptr(), state.data_ptr(), taps.data_ptr(), 0 if bias is None else bias.data_ptr()
        _rust.conv_step(*pointers, rows, channels, taps.shape[1], activation == "silu", y.data_ptr())
        return y
    return causal_conv1d_step_reference(x, state, weight, bias, activation)
