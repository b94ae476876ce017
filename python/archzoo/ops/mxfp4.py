"""Microscaling 4-bit floats (OCP MX v1.0): e2m1 values in groups of 32 that share a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the 3 low bits; the fourth is the sign


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 blocks [E, R, G, 16] and exponents [E, R, G] -> bf16 [E, R, 32 G].

    A byte holds two values, the low half first. Exact: a value has one bit behind its first, and
    2^(scale - 127) is a bf16 number.
    """
    experts, rows, groups, _ = blocks.shape
    low = torch.tensor([*VALUES, *(-v for v in VALUES)], device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    table = torch.stack((low[byte & 15], low[byte >> 4]), -1)  # [256, 2]
    out = torch.empty(experts, rows, groups * GROUP, dtype=torch.bfloat16, device=blocks.device)
    for expert, block, scale in zip(out, blocks, scales, strict=True):  # one at a time: 8 bytes a value here
        values = table[block.int()].flatten(-2)
        expert.copy_(torch.ldexp(values, scale.int().unsqueeze(-1) - 127).flatten(-2))
    return out
