"""What all launchers share: 2-D tiles over rows, and the number of programs that keep a GPU busy."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # its default differs between versions of Triton


def tile(d: int, elements: int = 2048) -> dict[str, int]:
    """ROWS, COLS and num_warps of a tile that holds whole rows of d elements, 16 to 32 elements a thread."""
    cols = triton.next_power_of_2(d)
    rows = max(1, elements // cols)
    return {"ROWS": rows, "COLS": cols, "num_warps": min(16, max(1, rows * cols // 512)), **OPTIONS}


def persistent(tiles: int, device: torch.device) -> int:
    """How many programs share `tiles` tiles when each accumulates one partial weight gradient."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(tiles, 8 * cores)


def unit(x: Tensor) -> Tensor:
    """x with stride 1 on its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """x [..., d] -> [N, d] with stride 1 on its last axis; a copy only when a view is impossible."""
    return unit(x.reshape(x.numel() // x.shape[-1], x.shape[-1]))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
