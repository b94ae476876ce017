"""Block-scaled 8-bit floats as DeepSeek-V3 stores and trains with them (2412.19437 section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
FLOOR = 1e-4  # smallest amax: keeps the scale of a zero tile finite and invertible


def dequantize_blocks(w: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """w [R, C] in 8 bits times its block's scale [ceil(R/block), ceil(C/block)] -> fp32 [R, C]."""
    rows, columns = w.shape
    wide = scale.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return w.float() * wide


def quantize_blocks(w: Tensor, block: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """w [R, C] -> 8 bits [R, C] and fp32 scales [ceil(R/block), ceil(C/block)], one per square block."""
    rows, columns = w.shape
    padded = F.pad(w.float(), (0, -columns % block, 0, -rows % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [r, block, c, block]
    scale = _scale(tiles.abs().amax((1, 3)), power_of_two)
    small = (tiles / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(FP8)
    return small.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def quantize_tiles(x: Tensor, block: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., C] -> 8 bits [..., C] and fp32 scales [..., ceil(C/block)], one per `block` channels."""
    columns = x.shape[-1]
    tiles = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    scale = _scale(tiles.abs().amax(-1), power_of_two)
    small = (tiles / scale[..., None]).clamp(-LARGEST, LARGEST).to(FP8)
    return small.flatten(-2)[..., :columns].contiguous(), scale


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    scale = amax.clamp(min=FLOOR) / LARGEST
    return torch.exp2(scale.log2().ceil()) if power_of_two else scale
