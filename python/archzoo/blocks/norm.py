"""RMSNorm with the optional LayerNorm-Scaling factor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archzoo.blocks.registry import Initialised
from archzoo.ops.norm import add_rms_norm, rms_norm


class RMSNorm(Initialised):
    """y = x * rsqrt(mean(x^2) + eps) * weight * scale, statistics in fp32; x [..., d]."""

    def __init__(self, size: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.scale = eps, scale

    def reset_parameters(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.scale)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), fused where a kernel exists."""
        return add_rms_norm(x, residual, self.weight, self.eps, self.scale)
