"""Safetensors files and sharded folders as torch tensors; the bytes move in Rust."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from archzoo import _rust
from archzoo.checkpoint import dfloat11
from archzoo.checkpoint.dfloat11 import DFloat11Folder
from archzoo.checkpoint.source import Bytes, Later, made
from archzoo.data.gguf import GgufFile
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
T = TypeVar("T")
STAGE = 1 << 25  # bytes read at once on their way to other memory
CASTS = {torch.float32, torch.bfloat16, torch.float16}  # cast into each other while they are read


class Part(NamedTuple):
    """What is read of a tensor: `start, stop` on its first dims, all of the others, into `destination`."""

    name: str
    destination: Tensor
    ranges: tuple[tuple[int, int], ...] = ()


@contextmanager
def _faults() -> Iterator[None]:
    """Rust's checkpoint errors as archzoo's."""
    try:
        yield
    except _rust.CheckpointError as error:
        raise CheckpointError(str(error)) from None


class Reader:
    """An open checkpoint; nothing is read until asked for, everything was checked when it opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _faults():
            if self.path.suffix == ".gguf":
                self._reader: _rust.CheckpointReader | GgufFile | DFloat11Folder = GgufFile(path)
            elif config := dfloat11.config_of(self.path):
                self._reader = DFloat11Folder(self.path, config)
            else:
                self._reader = _rust.CheckpointReader(str(path))
        self._infos = self._reader.infos()

    def keys(self) -> list[str]:
        """Names of the tensors: by file name, then in the order of their bytes."""
        return list(self._infos)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...], str]:
        """(dtype, shape, file) of one tensor."""
        if name not in self._infos:
            raise CheckpointError(
                f"{self.path}: tensor '{name}': expected in the checkpoint, found in no file"
            )
        tag, shape, file, _ = self._infos[name]
        if tag not in DTYPES:
            raise CheckpointError(f"{file}: tensor '{name}' has dtype {tag}, which torch cannot hold")
        return DTYPES[tag], shape, file

    def has_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has that shape; a folder of DFloat11 that does not tell it takes it from here."""
        if isinstance(self._reader, DFloat11Folder):
            return self._reader.shape(name, shape)
        return self.info(name)[1] == shape

    def mapped(self, name: str) -> Tensor:
        """One tensor as a private map of the file: its bytes are read when they are used, and may be dropped.

        The file must stay as it is while the tensor is used. One that is compressed or quantised is read.
        """
        dtype, shape, file = self.info(name)
        start = self._infos[name][3]
        if start is None:
            return self.read(name)
        stop = start + math.prod(shape) * dtype.itemsize
        raw = torch.from_file(file, shared=False, size=stop, dtype=torch.uint8)[start:]
        aligned = raw if start % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).reshape(shape)

    def is_plain(self, name: str) -> bool:
        """Whether the file has a tensor's bytes as they are, neither compressed nor quantised."""
        return self._infos[name][3] is not None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        infos = (self.info(name) for name in self.keys())
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in infos)

    def dtype(self) -> torch.dtype:
        """The most frequent floating-point dtype by bytes."""
        total: dict[torch.dtype, int] = {}
        for name in self.keys():
            dtype, shape, _ = self.info(name)
            if dtype.is_floating_point:
                total[dtype] = total.get(dtype, 0) + int(np.prod(shape))
        return max(total, key=lambda d: total[d]) if total else torch.float32

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read from the tensors so far, also by a read that is under way."""
        return self._reader.bytes_read

    def read_into(self, targets: Mapping[str, Tensor], *, verify: bool = False) -> None:
        """Read tensors into contiguous tensors of their shape; `read_parts` tells the rest."""
        self.read_parts([Part(name, tensor) for name, tensor in targets.items()], verify=verify)

    def read_parts(self, parts: Iterable[Part], *, verify: bool = False) -> None:
        """Read tensors, or boxes of them, into contiguous tensors, all in parallel.

        Memory of the CPU is filled straight from the file, that of a GPU by way of STAGE pinned bytes, or a
        whole tensor. Between float32, bfloat16 and float16 they are cast on the way, rounded to nearest even.
        With `verify` tensors that are read as a whole are compared with their checksums, where the file has
        such.
        """
        requests, away, parts = [], [], list(parts)  # which keep the memory
        for name, tensor, ranges in parts:
            dtype, shape, file = self.info(name)
            wanted = (*(stop - start for start, stop in ranges), *shape[len(ranges) :])
            cast = tensor.dtype != dtype
            fits = not cast or {tensor.dtype, dtype} <= CASTS
            fits = fits and not tensor.is_meta
            if not fits or tensor.shape != wanted or not tensor.is_contiguous():
                order = "" if tensor.is_contiguous() else ", not contiguous"
                raise CheckpointError(
                    f"{file}: tensor '{name}' is {dtype} {list(wanted)}, the destination is "
                    f"{tensor.dtype} {list(tensor.shape)}{order}"
                )
            if tensor.device.type != "cpu":
                away.append(Part(name, tensor, ranges))
                continue
            tag = TAGS[tensor.dtype] if cast else None
            requests.append((name, tensor.data_ptr(), tensor.nbytes, list(ranges), tag))
        with _faults():
            if isinstance(self._reader, _rust.CheckpointReader):
                self._reader.read_into(requests, verify)
            elif here := [part for part in parts if part.destination.device.type == "cpu"]:
                if isinstance(self._reader, DFloat11Folder):
                    self._reader.fill(here, verify)
                else:
                    self._reader.fill(here)
        for group in stages(away, lambda part: part.destination.nbytes):
            buffers = [
                torch.empty_like(part.destination, device="cpu", pin_memory=part.destination.is_cuda)
                for part in group
            ]
            staged = [part._replace(destination=b) for part, b in zip(group, buffers, strict=True)]
            self.read_parts(staged, verify=verify)
            for part, buffer in zip(group, buffers, strict=True):
                part.destination.copy_(buffer)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """One tensor, or the rows `start:stop` (dim 0) and columns (dim 1) of it."""
        dtype, shape, _ = self.info(name)
        ranges = []
        for dim, part in enumerate((rows, columns) if columns else (rows,) if rows else ()):
            size = shape[dim] if dim < len(shape) else 0
            start, stop, step = (part or slice(None)).indices(size)
            if step != 1 or stop < start:
                raise InputError(f"rows and columns must be plain start:stop ranges, found {part}")
            ranges.append((start, stop))
        sizes = (*(stop - start for start, stop in ranges), *shape[len(ranges) :])
        out = torch.empty(sizes, dtype=dtype)
        self.read_parts([Part(name, out, tuple(ranges))])
        return out


def stages(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in groups of at most STAGE bytes, or of one."""
    group: list[T] = []
    size = 0
    for item in items:
        count = nbytes(item)
        if group and size + count > STAGE:
            yield group
            group, size = [], 0
        group.append(item)
        size += count
    if group:
        yield group


def open(path: str | Path) -> Reader:
    """Open a .safetensors or .gguf file or a folder with one or several of the former.

    CheckpointError names the fault. Tensors of a GGUF file go by their Hugging Face names, quantised ones are
    float32.
    """
    return Reader(path)


def load(path: str | Path, *, verify: bool = False, progress: bool = False) -> dict[str, Tensor]:
    """All tensors of a file or folder; with `verify` compared with their checksums."""
    reader = Reader(path)
    out = {}
    for name in reader.keys():  # noqa: SIM118
        dtype, shape, _ = reader.info(name)
        out[name] = torch.empty(shape, dtype=dtype)
    with shown(reader, f"read {reader.path.name}", progress):
        reader.read_into(out, verify=verify)
    return out


@dataclass(frozen=True)
class Verified:
    """What `verify` has read without finding a fault."""

    tensors: int
    bytes: int
    unchecked: tuple[Path, ...]
    """Files without checksums: only their structure was checked."""


def verify(path: str | Path, *, progress: bool = False) -> Verified:
    """Check every byte of a file or folder against its checksums, in parallel.

    Raises CheckpointError, a line for each fault, with file, tensor, expected and found. Of files without
    checksums, as the public savers write them, only the structure can be checked; they are listed.
    """
    reader = Reader(path)
    with shown(reader, f"verify {reader.path.name}", progress), _faults():
        faults = reader._reader.verify()
    if faults:
        raise CheckpointError("\n".join(faults))
    return Verified(len(reader.keys()), reader.bytes_read, tuple(reader._reader.unchecked_files))


@contextmanager
def shown(reader: Reader, what: str, progress: bool) -> Iterator[None]:
    """A progress bar of the bytes that the block reads, if `progress`."""
    if not progress:
        yield
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    done, before = Event(), reader.bytes_read
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=reader.nbytes())

        def follow() -> None:
            while not done.wait(0.1):
                bar.update(task, completed=reader.bytes_read - before)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            bar.update(task, completed=reader.bytes_read - before)


def shard_bytes(size: int | str) -> int:
    """Bytes of "4GB", "200MB", "64KB" (powers of 1000) or a plain number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", size, re.IGNORECASE)
    if not match:
        raise InputError(f"max_shard_size '{size}': expected a size such as '4GB' or '200MB'")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def write_shards(
    tensors: Mapping[str, Tensor | Later],
    folder: str | Path,
    max_shard_size: int | str,
    compress: bool = False,
) -> None:
    """Write shards (and an index when there are several) into an existing folder.

    With `compress`, floating-point tensors are stored losslessly in less where that can be.
    """
    items: list[tuple[str, str, tuple[int, ...], Bytes | Callable[[], Bytes]]] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in TAGS:
            raise InputError(f"tensor '{name}': dtype {tensor.dtype} cannot be written to safetensors")
        content = partial(made, tensor) if isinstance(tensor, Later) else made(tensor)
        items.append((name, TAGS[tensor.dtype], tuple(tensor.shape), content))
    with _faults():
        _rust.write_shards(str(folder), items, shard_bytes(max_shard_size), compress)


@contextmanager
def atomic_folder(folder: str | Path, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary sibling of `folder` that takes its place, whole, when the block ends without an error.

    Other files than weights stay as they were unless they are written anew or `obsolete`.
    """
    with _faults():
        writer = _rust.FolderWriter(str(folder))
    try:
        yield Path(writer.path)
        with _faults():
            writer.commit(obsolete)
    except BaseException:
        writer.abort()
        raise


@dataclass(frozen=True)
class Contents:
    """What a folder is to hold: tensors in shards, other files, and no longer the `obsolete` ones."""

    tensors: Mapping[str, Tensor | Later]
    files: Mapping[str, bytes] = field(default_factory=dict)
    obsolete: tuple[str, ...] = ()


def write_contents(
    contents: Contents, folder: str | Path, max_shard_size: int | str, compress: str | None = None
) -> None:
    """Write a folder atomically: until all of it is on the disk, an older one stays as it was.

    compress: as `save` has it.
    """
    if compress not in (None, "huffman", "dfloat11"):
        raise InputError(f"compress '{compress}': expected 'huffman', 'dfloat11' or None")
    with atomic_folder(folder, contents.obsolete) as tmp:
        tensors = contents.tensors
        for name, content in contents.files.items():
            _write(tmp / name, content)
        older = next((p for p in (tmp / "config.json", Path(folder) / "config.json") if p.exists()), None)
        config = _json_object(older) if older else {}
        if compress == "dfloat11":
            if config is None:
                raise CheckpointError(f"{older}: not a JSON object, which dfloat11's settings go into")
            tensors, settings = dfloat11.encode(tensors)
            _write_config(tmp, config | {dfloat11.KEY: settings})
        elif config and dfloat11.KEY in config:
            del config[dfloat11.KEY]  # of the weights that were there
            _write_config(tmp, config)
        write_shards(tensors, tmp, max_shard_size, compress == "huffman")


def _json_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if it is damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    _write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error}") from None


def copied(reader: Reader, dtype: torch.dtype | None = None) -> Contents:
    """A checkpoint as `save` writes it anew: tensors that stay in their files until then, and other files.

    With `dtype` floating-point tensors of at least 16 bits are cast.
    """
    wide = {torch.float64, *CASTS}
    tensors: dict[str, Tensor | Later] = {}
    for name in reader.keys():  # noqa: SIM118
        stored, shape, _ = reader.info(name)
        target = dtype if dtype is not None and stored in wide else stored
        if target == stored and reader.is_plain(name):
            tensors[name] = reader.mapped(name)
        else:
            tensors[name] = Later(target, shape, partial(_cast, reader, name, target))
    folder = reader.path if reader.path.is_dir() else None
    files = {}
    for path in sorted(folder.iterdir()) if folder else ():
        if path.is_file() and not (
            path.name.startswith("model") and path.suffix in (".json", ".safetensors")
        ):
            files[path.name] = path.read_bytes()
    if "config.json" in files and dtype is not None:
        config = json.loads(files["config.json"])
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        config.pop("dtype", None)
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return Contents(tensors, files)


def _cast(reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
    return reader.mapped(name).to(dtype)


def save(
    tensors: Mapping[str, Tensor] | Contents,
    folder: str | Path,
    max_shard_size: int | str = "4GB",
    compress: str | None = None,
) -> None:
    """Write tensors, or what `training_state` gives, as a sharded safetensors folder, atomically.

    compress: "huffman" stores floating-point tensors losslessly in less (bfloat16: two thirds); "dfloat11"
    does so with matrices in bfloat16, in the public format, and adds its part to config.json. `load`, `open`
    and `archzoo.load` read both as if they were plain. None leaves tensors plain, for other readers.
    """
    contents = tensors if isinstance(tensors, Contents) else Contents(tensors)
    write_contents(contents, folder, max_shard_size, compress)
