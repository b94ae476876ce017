"""Where the elements of a tensor come from that is to be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]


class Later(NamedTuple):
    """A tensor that is made when it is written, by any thread, and not kept."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous CPU tensor, shared, as a 1-D array."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def made(source: Tensor | Later) -> Bytes:
    """The bytes of a tensor, in memory by now."""
    tensor = source.make() if isinstance(source, Later) else source
    return bytes_of(tensor.detach().cpu().contiguous())
