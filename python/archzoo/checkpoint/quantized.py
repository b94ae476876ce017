"""Weights stored in fewer bits: which tensors of a file they are, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.checkpoint.shards import Reader
from archzoo.errors import CheckpointError, InputError
from archzoo.ops.fp8 import BLOCK, dequantize_blocks
from archzoo.ops.mxfp4 import GROUP, dequantize_mxfp4

Shape = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stored:
    """Tensor X + suffix of the file: its dims are dims of weight X, `step` elements each, then `inner`."""

    suffix: str
    axes: tuple[tuple[int, int], ...]
    """(dim of the weight, step)"""
    inner: Shape = ()

    def shape(self, weight: Shape) -> Shape:
        return (*(-(-weight[dim] // step) for dim, step in self.axes), *self.inner)

    def ranges(self, weight: Ranges) -> Ranges:
        """Where a part of the weight is that is cut between steps."""
        return tuple((weight[dim][0] // step, -(-weight[dim][1] // step)) for dim, step in self.axes)


@dataclass(frozen=True)
class Format:
    """A weight of a shape is several tensors of the file; `decode` takes them, or a part of each.

    The first of them has `dtype`; the weight has `dims` dimensions.
    """

    tensors: tuple[Stored, ...]
    dtype: torch.dtype
    dims: int
    decode: Callable[..., Tensor]

    def names(self, name: str) -> list[str]:
        """The file's tensors of weight `name`."""
        return [name + stored.suffix for stored in self.tensors]

    def check(self, reader: Reader, name: str, shape: Shape) -> None:
        """Raise CheckpointError unless the tensors have the shapes that a weight of `shape` asks for."""
        for stored in self.tensors:
            part, expected = name + stored.suffix, stored.shape(shape)
            _, found, file = reader.info(part)
            if found != expected:
                raise CheckpointError(
                    f"{file}: tensor '{part}' has shape {list(found)}, "
                    f"a weight {list(shape)} asks for {list(expected)}"
                )

    def parts(self, name: str, shape: Shape, ranges: Ranges) -> list[tuple[str, Ranges]]:
        """Names and ranges of what a part of weight `name` is made of.

        Raises InputError where it is cut within a block.
        """
        if not ranges:
            return [(part, ()) for part in self.names(name)]
        whole = (*ranges, *((0, size) for size in shape[len(ranges) :]))
        for stored in self.tensors:
            for dim, step in stored.axes:
                start, stop = whole[dim]
                if start % step or (stop % step and stop != shape[dim]):
                    raise InputError(
                        f"'{name}' is stored in blocks of {step} along dim {dim}, "
                        f"which a part from {start} to {stop} cuts"
                    )
        return [(name + stored.suffix, stored.ranges(whole)) for stored in self.tensors]


FORMATS = (
    # DeepSeek-V3 (2412.19437): a scale per block
    Format(
        tensors=(Stored("", ((0, 1), (1, 1))), Stored("_scale_inv", ((0, BLOCK), (1, BLOCK)))),
        dtype=torch.float8_e4m3fn,
        dims=2,
        decode=dequantize_blocks,
    ),
    # gpt-oss: experts [E, in, out] as rows of `out`, in groups of `in`
    Format(
        tensors=(
            Stored("_blocks", ((0, 1), (2, 1), (1, GROUP)), (GROUP // 2,)),
            Stored("_scales", ((0, 1), (2, 1), (1, GROUP))),
        ),
        dtype=torch.uint8,
        dims=3,
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
