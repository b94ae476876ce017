"""Linear layers. On a CPU, decoding multiplies few rows: that is bound by reading the weights, and Rust reads
them faster than a blocked matrix product does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo import _rust
from archzoo.ops.backend import addressable, choose

FEW_ROWS = 16  # more rows are served as well by torch's packed product
SLOW_BFLOAT16 = not _rust.has_bfloat16()  # torch's product is then many times slower than one in fp32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if few(x, weight, bias):
        return _few_rows(x, [(weight, bias)])[0]
    return F.linear(x, weight, bias)


def linears(x: Tensor, parts: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Several linear layers of one input, in one pass where that is faster."""
    if all(few(x, weight, bias) for weight, bias in parts):
        return _few_rows(x, parts)
    return [F.linear(x, weight, bias) for weight, bias in parts]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x): x [..., d], gate and up [I, d], down [d, I] -> [..., d]."""
    if (
        few(x, gate)
        and few(x, up)
        and gate.shape == up.shape == down.shape[::-1]
        and _readable(down, x.dtype)
    ):
        rows = (x if x.dtype == torch.float32 else x.float()).contiguous()
        out, d = torch.empty_like(rows), x.shape[-1]
        _rust.swiglu(
            (rows.numel() // d, d, gate.shape[0]),
            rows.data_ptr(),
            (gate.data_ptr(), up.data_ptr(), down.data_ptr()),
            x.dtype == torch.bfloat16,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out if x.dtype == torch.float32 else out.to(x.dtype)
    g, u = linears(x, [(gate, None), (up, None)])
    return linear(F.silu(g) * u, down)


def few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether Rust's product applies: no gradient; few rows, or bf16 that the CPU cannot multiply."""
    many = x.numel() > FEW_ROWS * weight.shape[1] and not (SLOW_BFLOAT16 and x.dtype == torch.bfloat16)
    if many or x.numel() == 0 or not addressable(x, weight, bias):
        return False
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.shape[-1] != weight.shape[1]:
        return False  # F.linear says what is wrong
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1] or bias.stride(0) != 1):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return choose(x) == "cpu" and _readable(weight, x.dtype) and not torch.is_autocast_enabled("cpu")


def _readable(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether Rust may read this weight as it lies."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    return weight.dtype == dtype and not trained and weight.is_contiguous() and addressable(weight)


def _few_rows(x: Tensor, parts: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    x = x.contiguous()
    k = x.shape[-1]
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight, _ in parts]
    addresses = [
        (weight.data_ptr(), weight.shape[0], 0 if bias is None else bias.data_ptr(), out.data_ptr())
        for (weight, bias), out in zip(parts, outs, strict=True)
    ]
    _rust.linear(
        x.data_ptr(), x.numel() // k, k, x.dtype == torch.bfloat16, torch.get_num_threads(), addresses
    )
    return outs
