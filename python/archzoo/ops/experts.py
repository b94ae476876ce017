"""The routed feed-forwards of a mixture of experts: rows sorted by expert, a product per expert."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo import _rust
from archzoo.ops.backend import addressable, choose
from archzoo.ops.moe import plan

Activation = Literal["swiglu", "clamped_swiglu", "gelu"]
GATED = ("swiglu", "clamped_swiglu")  # their first product makes gate and up, the others' only one

ALPHA, LIMIT = 1.702, 7.0  # of clamped_swiglu


def activate(h: Tensor, kind: Activation) -> Tensor:
    """Between the two products: [..., 2I] (gate first, then up) -> [..., I]; gelu (exact) keeps its width.

    swiglu is silu(gate) * up; clamped_swiglu (gpt-oss) is (up + 1) * gate * sigmoid(1.702 gate) with gate
    at most 7 and up within 7 of 0.
    """
    if kind == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, -1)
    if kind == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(gate * ALPHA)


class Ffns(NamedTuple):
    """The feed-forwards of E experts, fused."""

    up: Tensor
    """[E, 2I, d], gate rows first; [E, I, d] for gelu."""
    down: Tensor
    """[E, d, I]."""
    up_bias: Tensor | None = None
    """[E, 2I]."""
    down_bias: Tensor | None = None
    """[E, d]."""
    activation: Activation = "swiglu"
    scale_input: bool = False
    """A row's weight multiplies what goes in, not what comes out (Llama 4)."""

    @property
    def bare(self) -> bool:
        """Plain SwiGLU."""
        biased = self.up_bias is not None or self.down_bias is not None
        return self.activation == "swiglu" and not biased and not self.scale_input


def experts(x: Tensor, weights: Tensor, ids: Tensor, ffns: Ffns, *, dropless: bool = False) -> Tensor:
    """sum_k weights[t, k] * FFN_{ids[t, k]}(x[t]) -> [T, d]: x [T, d], weights and ids [T, k].

    The id E means no expert: it adds nothing; dropless promises that there is none.
    """
    by_expert = plan(ids, ffns.up.shape[0])
    scale = weights.flatten()[by_expert.order]
    return routed(x, by_expert.token, scale, by_expert.counts, ffns, dropless=dropless)


def routed(
    x: Tensor, token: Tensor, scale: Tensor, counts: Tensor, ffns: Ffns, *, dropless: bool = False
) -> Tensor:
    """The same for assignments sorted by expert: row r is token[r], times scale[r]; counts [E] int32.

    Rows behind the last count belong to no expert.
    """
    up, down, up_bias, down_bias, activation, scale_input = ffns
    if _rust_takes(x, token, scale, counts, ffns):
        grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, scale, up, down, up_bias, down_bias)
        )
        if not grad:
            if ffns.bare and _many_rows(x, token, counts):
                return _mm_routed(x, token, scale, counts, up, down)[0]
            return _rust_routed(x, token, scale, counts, ffns)[0]
        if ffns.bare:
            out: Tensor = _Routed.apply(x, scale, up, down, token, counts)
            return out
    product = _grouped_product if _aligned(x, up, down) else _looped_product
    # No look at the counts: a GPU would have to wait.
    ends, scale = counts.cumsum(0, dtype=torch.int32), scale[:, None].to(x.dtype)
    row = torch.arange(token.shape[0], device=x.device, dtype=torch.int32)
    real = (row < ends[-1])[:, None]

    def masked(rows: Tensor) -> Tensor:
        """What grouped_mm leaves in rows of no expert, and in their gradients, was never written."""
        return rows if dropless else torch.where(real, rows, 0)

    h = masked(x[token])
    if scale_input:
        h = h * scale
    h = product(h, up, ends)
    if up_bias is not None or down_bias is not None:
        expert = torch.searchsorted(ends, row, right=True).clamp(max=up.shape[0] - 1)
    if up_bias is not None:
        h = h + up_bias[expert]
    h = masked(product(masked(activate(h, activation)), down, ends))
    if down_bias is not None:
        h = h + down_bias[expert]
    if not scale_input:
        h = h * scale
    return torch.zeros_like(x).index_add(0, token, masked(h))


# --- CPU -------------------------------------------------------------------------------------------
# One pass over the assignments in Rust: nothing of the size [assignments, d] is written, only experts
# with rows are read, bf16 weights are multiplied in fp32.


def _rust_takes(x: Tensor, token: Tensor, scale: Tensor, counts: Tensor, ffns: Ffns) -> bool:
    up, down, up_bias, down_bias, activation, _ = ffns
    if x.device.type != "cpu" or choose(x) != "cpu" or activation not in GATED:
        return False
    tensors = x, scale, token, counts, up, down, up_bias, down_bias
    if not addressable(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or (token.dtype, counts.dtype) != (
        torch.int64,
        torch.int32,
    ):
        return False
    weights = [t for t in (up, down, up_bias, down_bias) if t is not None]
    if any(t.dtype != x.dtype or not t.is_contiguous() for t in weights) or x.numel() == 0:
        return False
    e, rows, d = up.shape
    hidden = rows // 2
    shapes = [x.shape[1:] == (d,), down.shape == (e, d, hidden), counts.shape == (e,), rows == 2 * hidden]
    shapes += [up_bias is None or up_bias.shape == (e, rows), down_bias is None or down_bias.shape == (e, d)]
    return all(shapes)  # torch says what is wrong


def _rust_routed(
    x: Tensor, token: Tensor, scale: Tensor, counts: Tensor, ffns: Ffns, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """The output, and [assignments, 2I] from before the activation (empty unless asked for)."""
    up, down, up_bias, down_bias, activation, scale_input = ffns
    rows, scale, token, counts = (
        x.float().contiguous(),
        scale.float(),
        token.contiguous(),
        counts.contiguous(),
    )
    e, width, d = up.shape
    out, kept = torch.zeros_like(rows), rows.new_empty((token.shape[0], width) if keep else (0,))
    _rust.experts(
        (x.shape[0], token.shape[0], e, d, width // 2),
        rows.data_ptr(),
        token.data_ptr(),
        scale.contiguous().data_ptr(),
        counts.data_ptr(),
        (
            up.data_ptr(),
            down.data_ptr(),
            0 if up_bias is None else up_bias.data_ptr(),
            0 if down_bias is None else down_bias.data_ptr(),
        ),
        x.dtype == torch.bfloat16,
        activation,
        scale_input,
        kept.data_ptr() if keep and kept.numel() else 0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype), kept


MANY_ROWS = 128  # per expert, from which on torch's packed fp32 product is the faster one


def _many_rows(x: Tensor, token: Tensor, counts: Tensor) -> bool:
    return x.dtype == torch.float32 and token.shape[0] >= MANY_ROWS * counts.shape[0]


def _mm_routed(
    x: Tensor, token: Tensor, scale: Tensor, counts: Tensor, up: Tensor, down: Tensor, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """As `_rust_routed` for SwiGLU, an expert at a time."""
    out, hidden = torch.zeros_like(x), down.shape[2]
    kept = x.new_empty((token.shape[0], up.shape[1]) if keep else (0,))
    start = 0
    for e, count in enumerate(counts.tolist()):
        if not count:
            continue
        rows = slice(start, start := start + count)
        h = torch.mm(x[token[rows]], up[e].t(), out=kept[rows] if keep else None)
        act = F.silu(h[:, :hidden]).mul_(h[:, hidden:])
        out.index_add_(0, token[rows], torch.mm(act, down[e].t()).mul_(scale[rows, None]))
    return out, kept


def _lazy_zeros(like: Tensor) -> Tensor:
    """Zeros whose pages do not exist until they are written: most experts may get no gradient."""
    storage = {2: np.uint16, 4: np.float32}[like.element_size()]
    return torch.from_numpy(np.zeros(tuple(like.shape), storage)).view(like.dtype)


class _Routed(torch.autograd.Function):
    """`routed` for SwiGLU without biases; the backward pass goes expert by expert, in fp32."""

    @staticmethod
    def forward(ctx, x, scale, up, down, token, counts):  # type: ignore[no-untyped-def]
        if _many_rows(x, token, counts):
            out, h = _mm_routed(x, token, scale, counts, up, down, keep=True)
        else:
            out, h = _rust_routed(x, token, scale, counts, Ffns(up, down), keep=True)
        ctx.save_for_backward(x, scale, up, down, token, counts, h)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, scale, up, down, token, counts, h = ctx.saved_tensors
        need_x, need_scale, need_up, need_down = ctx.needs_input_grad[:4]
        x32, dout, scale32 = x.float(), dout.float().contiguous(), scale.float()
        dx = torch.zeros_like(x32) if need_x else None
        dscale = torch.zeros_like(scale32) if need_scale else None
        dup = _lazy_zeros(up) if need_up else None
        ddown = _lazy_zeros(down) if need_down else None
        start = 0
        for e, count in enumerate(counts.tolist()):
            if not count:
                continue
            rows = slice(start, start := start + count)
            at, s = token[rows], scale32[rows, None]
            d_out = dout[at]
            gate, up_rows = h[rows].chunk(2, -1)
            sig = torch.sigmoid(gate)
            silu = gate * sig
            act = silu * up_rows
            d_act = d_out @ down[e].float()
            if dscale is not None:
                dscale[rows] = torch.linalg.vecdot(d_act, act)
            if ddown is not None:
                _into(ddown[e], d_out.mul_(s).t(), act)
            d_act *= s
            d_h = torch.empty_like(h[rows])
            slope = sig.addcmul_(silu, 1 - sig)  # of silu: sig + silu (1 - sig)
            torch.mul(d_act, slope, out=d_h[:, : gate.shape[1]]).mul_(up_rows)
            torch.mul(d_act, silu, out=d_h[:, gate.shape[1] :])
            if dup is not None:
                _into(dup[e], d_h.t(), x32[at])
            if dx is not None:
                dx.index_add_(0, at, d_h @ up[e].float())
        dx = None if dx is None else dx.to(x.dtype)
        return dx, None if dscale is None else dscale.to(scale.dtype), dup, ddown, None, None


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, whatever the dtype of out."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


# --- GPU, and what Rust does not take ------------------------------------------------------------------


def _aligned(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """grouped_mm takes no fp64 and needs 16-byte rows and at least one token."""
    ok = all((n * x.element_size()) % 16 == 0 for n in (up.shape[2], down.shape[2], up.shape[1]))
    return ok and x.dtype != torch.float64 and x.shape[0] > 0 and choose(x) != "reference"


def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _looped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times the weight [E, N, K] of their expert, 0 behind the last: the definition."""
    if rows.is_meta:
        return rows.new_empty(rows.shape[0], weight.shape[1])
    parts = rows.tensor_split(ends.long().cpu())
    products = [part @ w.t() for part, w in zip(parts, weight, strict=False)]
    return torch.cat([*products, rows.new_zeros(parts[-1].shape[0], weight.shape[1])])
