"""Safetensors files and sharded folders as torch tensors; the bytes move in Rust."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import CheckpointError, InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


@contextmanager
def _faults() -> Iterator[None]:
    """Rust's checkpoint errors as archzoo's."""
    try:
        yield
    except _rust.CheckpointError as error:
        raise CheckpointError(str(error)) from None


def bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor, shared, as a 1-D array."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class Reader:
    """An open checkpoint; nothing is read until asked for, everything was checked when it opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _faults():
            self._reader = _rust.CheckpointReader(str(path))

    def keys(self) -> list[str]:
        return self._reader.keys()

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...], str]:
        """(dtype, shape, file) of one tensor."""
        with _faults():
            tag, shape, file = self._reader.info(name)
        if tag not in DTYPES:
            raise CheckpointError(f"{file}: tensor '{name}' has dtype {tag}, which torch cannot hold")
        return DTYPES[tag], tuple(shape), file

    def dtype(self) -> torch.dtype:
        """The most frequent floating-point dtype by bytes."""
        total: dict[torch.dtype, int] = {}
        for name in self.keys():
            dtype, shape, _ = self.info(name)
            if dtype.is_floating_point:
                total[dtype] = total.get(dtype, 0) + int(np.prod(shape))
        return max(total, key=lambda d: total[d]) if total else torch.float32

    def read_into(self, targets: Mapping[str, Tensor | tuple[Tensor, tuple[int, int]]]) -> None:
        """Read tensors (or row ranges of them) straight into contiguous CPU tensors of the stored dtype."""
        requests = []
        for name, target in targets.items():
            tensor, rows = target if isinstance(target, tuple) else (target, None)
            dtype, shape, file = self.info(name)
            wanted = shape if rows is None else (rows[1] - rows[0], *shape[1:])
            if tensor.dtype != dtype or tuple(tensor.shape) != wanted or not tensor.is_contiguous():
                raise CheckpointError(
                    f"{file}: tensor '{name}' is {dtype} {list(wanted)}, the destination is "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            requests.append((name, bytes_of(tensor), rows))
        with _faults():
            self._reader.read_into(requests)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or the rows `start:stop` of it."""
        dtype, shape, _ = self.info(name)
        if rows is None:
            out = torch.empty(shape, dtype=dtype)
            self.read_into({name: out})
            return out
        start, stop, step = rows.indices(shape[0] if shape else 0)
        if step != 1 or stop < start:
            raise InputError(f"rows must be a plain start:stop range, found {rows}")
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        self.read_into({name: (out, (start, stop))})
        return out


def open(path: str | Path) -> Reader:
    """Open a .safetensors file or a folder with one or several; CheckpointError names the fault."""
    return Reader(path)


def load(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file or folder."""
    reader = Reader(path)
    out = {}
    for name in reader.keys():  # noqa: SIM118
        dtype, shape, _ = reader.info(name)
        out[name] = torch.empty(shape, dtype=dtype)
    reader.read_into(out)
    return out


def shard_bytes(size: int | str) -> int:
    """Bytes of "4GB", "200MB", "64KB" (powers of 1000) or a plain number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", size, re.IGNORECASE)
    if not match:
        raise InputError(f"max_shard_size '{size}': expected a size such as '4GB' or '200MB'")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def write_shards(tensors: Mapping[str, Tensor], folder: str | Path, max_shard_size: int | str) -> None:
    """Write shards (and an index when there are several) into an existing folder."""
    items = []
    for name, tensor in tensors.items():
        if tensor.dtype not in TAGS:
            raise InputError(f"tensor '{name}': dtype {tensor.dtype} cannot be written to safetensors")
        plain = tensor.detach().cpu().contiguous()
        items.append((name, TAGS[tensor.dtype], tuple(tensor.shape), bytes_of(plain)))
    with _faults():
        _rust.write_shards(str(folder), items, shard_bytes(max_shard_size))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling of `folder` that takes its place, whole, when the block ends without an error."""
    with _faults():
        writer = _rust.FolderWriter(str(folder))
    try:
        yield Path(writer.path)
        with _faults():
            writer.commit()
    except BaseException:
        writer.abort()
        raise


def save(tensors: Mapping[str, Tensor], folder: str | Path, max_shard_size: int | str = "4GB") -> None:
    """Write tensors as a sharded safetensors folder, atomically."""
    with atomic_folder(folder) as tmp:
        write_shards(tensors, tmp, max_shard_size)
