"""The routed feed-forwards of a mixture of experts: rows sorted by expert, a product per expert."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.ops.backend import choose

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


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Activation = "swiglu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scale_input: bool = False,
) -> Tensor:
    """sum_k weights[t, k] * FFN_{ids[t, k]}(x[t]) -> [T, d]: x [T, d], weights and ids [T, k].

    up [E, 2I, d] (gate rows first; [E, I, d] for gelu), down [E, d, I], biases [E, 2I] and [E, d]. The id E
    means no expert: it adds nothing. scale_input multiplies x instead of the result (Llama 4).
    """
    count = up.shape[0]
    order = ids.flatten().argsort(stable=True)
    counts = ids.new_zeros(count + 1).scatter_add(0, ids.flatten(), ids.new_ones(ids.numel()))[:count]
    rows, scale = order // ids.shape[1], weights.flatten()[order]
    return routed(
        x, rows, scale, counts, up, down,
        activation=activation, up_bias=up_bias, down_bias=down_bias, scale_input=scale_input,
    )  # fmt: skip


def routed(
    x: Tensor,
    token: Tensor,
    scale: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Activation = "swiglu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scale_input: bool = False,
) -> Tensor:
    """The same for assignments sorted by expert: row r is token[r], times scale[r]; counts [E] rows each.

    Rows behind the last count belong to no expert.
    """
    product = _grouped_product if _aligned(x, up, down) else _looped_product
    count = int(counts.sum()) if token.shape[0] else 0
    token, scale = token[:count], scale[:count, None].to(x.dtype)
    expert = torch.repeat_interleave(counts) if up_bias is not None or down_bias is not None else None
    h = x[token]
    if scale_input:
        h = h * scale
    h = product(h, up, counts)
    if up_bias is not None:
        h = h + up_bias[expert]
    h = product(activate(h, activation), down, counts)
    if down_bias is not None:
        h = h + down_bias[expert]
    if not scale_input:
        h = h * scale
    return torch.zeros_like(x).index_add(0, token, h)


def _aligned(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """grouped_mm takes no fp64 and needs 16-byte rows and at least one token."""
    ok = all((n * x.element_size()) % 16 == 0 for n in (up.shape[2], down.shape[2], up.shape[1]))
    return ok and x.dtype != torch.float64 and x.shape[0] > 0 and choose(x) != "reference"


def _grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _looped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows sorted by expert times the weight [E, N, K] of their expert: the definition."""
    parts = rows.split(counts.tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])
