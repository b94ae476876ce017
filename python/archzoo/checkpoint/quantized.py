"""Weights stored in fewer bits: which tensors of a file they are, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.checkpoint.shards import Reader
from archzoo.errors import CheckpointError
from archzoo.ops.fp8 import BLOCK, dequantize_blocks
from archzoo.ops.mxfp4 import GROUP, dequantize_mxfp4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """Weight X of a shape is the tensors X + suffix, of the shapes that `shapes` gives; `decode` takes them.

    The first of them has `dtype`; X has `dims` dimensions.
    """

    suffixes: tuple[str, ...]
    dtype: torch.dtype
    dims: int
    shapes: Callable[[Shape], tuple[Shape, ...]]
    decode: Callable[..., Tensor]

    def names(self, name: str) -> list[str]:
        """The file's tensors of weight `name`."""
        return [name + suffix for suffix in self.suffixes]

    def check(self, reader: Reader, name: str, shape: Shape) -> None:
        """Raise CheckpointError unless the tensors have the shapes that a weight of `shape` asks for."""
        for part, expected in zip(self.names(name), self.shapes(shape), strict=True):
            _, found, file = reader.info(part)
            if found != expected:
                raise CheckpointError(
                    f"{file}: tensor '{part}' has shape {list(found)}, "
                    f"a weight {list(shape)} asks for {list(expected)}"
                )


FORMATS = (
    # DeepSeek-V3 (2412.19437): a scale per block
    Format(
        suffixes=("", "_scale_inv"),
        dtype=torch.float8_e4m3fn,
        dims=2,
        shapes=lambda s: (s, (-(-s[0] // BLOCK), -(-s[1] // BLOCK))),
        decode=dequantize_blocks,
    ),
    # gpt-oss: experts [E, in, out] as rows of `out`, in groups of `in`
    Format(
        suffixes=("_blocks", "_scales"),
        dtype=torch.uint8,
        dims=3,
        shapes=lambda s: (
            (s[0], s[2], -(-s[1] // GROUP), GROUP // 2),
            (s[0], s[2], -(-s[1] // GROUP)),
        ),
        decode=lambda blocks, scales: dequantize_mxfp4(blocks, scales).transpose(1, 2),
    ),
)


PACKED = {form.dtype for form in FORMATS}


def stored_as(reader: Reader, stored: Collection[str], name: str, shape: Shape) -> Format | None:
    """The format of a weight of that shape; None when it is stored as it is, or not at all."""
    if name in stored and reader.info(name)[0] not in PACKED:
        return None
    for form in FORMATS:
        names = form.names(name)
        found = len(shape) == form.dims and all(n in stored for n in names)
        if found and reader.info(names[0])[0] == form.dtype:
            return form
    return None
