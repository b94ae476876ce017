"""`archzoo ckpt`: look at checkpoints, check, compare, cut anew and convert them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from archzoo.cli.app import Commands, console, si, torch_dtype
from archzoo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from archzoo.checkpoint import Reader

ckpt_app = typer.Typer(cls=Commands, help="Look at checkpoints, check, compare, cut anew and convert them.")

Checkpoint = Annotated[Path, typer.Argument(help="Folder, .safetensors file or index.")]
ShardSize = Annotated[str, typer.Option(help="Most bytes of a shard: 4GB, 200MB, ...")]
CHUNK = 1 << 22  # elements compared at once


class Layout(StrEnum):
    """What `ckpt convert` writes."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"


class Codec(StrEnum):
    """How `ckpt compress` stores weights."""

    HUFFMAN = "huffman"
    DFLOAT11 = "dfloat11"
    PLAIN = "plain"


@ckpt_app.command("ls")
def ls_command(
    path: Checkpoint,
    pattern: Annotated[str, typer.Option(help="Only names that match, such as '*.experts.*'.")] = "*",
) -> None:
    """List tensors: name, dtype, shape, bytes and file."""
    from fnmatch import fnmatchcase

    from archzoo import checkpoint

    reader = checkpoint.open(path)
    table = Table("tensor", "dtype", "shape", "bytes", "file")
    table.columns[3].justify = "right"
    total = elements = count = 0
    for name in reader.keys():  # noqa: SIM118
        if not fnmatchcase(name, pattern):
            continue
        dtype, shape, file = reader.info(name)
        size = math.prod(shape)
        total, elements, count = total + size * dtype.itemsize, elements + size, count + 1
        kind = str(dtype).removeprefix("torch.")
        table.add_row(
            name, kind, " x ".join(map(str, shape)), si(size * dtype.itemsize, "B"), Path(file).name
        )
    console().print(table)
    console().print(f"{count:,} tensors, {si(elements)} elements, {si(total, 'B')}")


@ckpt_app.command("verify")
def verify_command(path: Checkpoint) -> None:
    """Check every byte against the checksums; a line for each fault."""
    from archzoo import checkpoint

    found = checkpoint.verify(path, progress=True)
    for file in found.unchecked:
        console().print(f"{file}: no checksums: only its structure was checked")
    console().print(f"{path}: {found.tensors:,} tensors, {si(found.bytes, 'B')}: no faults")


@ckpt_app.command("diff")
def diff_command(
    first: Checkpoint,
    second: Checkpoint,
    tolerance: Annotated[float, typer.Option(help="Relative difference that is none.")] = 0.0,
) -> None:
    """Tell which tensors differ and by how much; exit code 1 if any do."""
    from archzoo import checkpoint

    readers = checkpoint.open(first), checkpoint.open(second)
    names = [reader.keys() for reader in readers]
    lines = []
    table = Table("tensor", "largest difference", "relative", "elements that differ")
    common = set(names[0]) & set(names[1])
    same = 0
    with checkpoint.shown(readers[0], "compare", True):
        for name in (n for n in names[0] if n in common):
            (dtype, shape, _), (other_dtype, other_shape, _) = (r.info(name) for r in readers)
            if shape != other_shape:
                lines.append(f"{name}: {list(shape)} against {list(other_shape)}")
                continue
            if dtype != other_dtype:
                lines.append(f"{name}: {dtype} against {other_dtype}")
            largest, relative, count = _difference(readers, name)
            if count and not relative <= tolerance:
                table.add_row(name, f"{largest:.3g}", f"{relative:.3g}", f"{count:,} of {math.prod(shape):,}")
            else:
                same += 1
    lines += [f"{name}: only in {first}" for name in names[0] if name not in common]
    lines += [f"{name}: only in {second}" for name in names[1] if name not in common]
    if table.row_count:
        console().print(table)
    for line in lines:
        console().print(line, soft_wrap=True)
    console().print(f"{same:,} tensors are equal, {table.row_count:,} differ")
    if table.row_count or lines:
        raise typer.Exit(1)


def _difference(readers: tuple[Reader, Reader], name: str) -> tuple[float, float, int]:
    """Largest |a - b|, |a - b| / |a| (Frobenius), and how many elements differ, in bounded memory."""
    import torch

    largest = squares = norm = 0.0
    count = 0
    for a, b in zip(*(_chunks(reader, name) for reader in readers), strict=True):
        # Equal bits are equal, NaN or not.
        if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            norm += float(a.double().square().sum())
            continue
        x, y = a.double(), b.double()
        gap = torch.where(x == y, 0.0, (x - y).abs())
        count += int((gap != 0).sum())
        norm += float(x.square().sum())
        squares += float(gap.square().sum())
        largest = max(largest, float(gap.max())) if not gap.isnan().any() else math.nan
    return largest, math.sqrt(squares / norm) if norm else math.inf if squares else 0.0, count


def _chunks(reader: Reader, name: str) -> Iterator[Tensor]:
    """A tensor, flat, in rows of about CHUNK elements."""
    _, shape, _ = reader.info(name)
    if not shape:
        yield reader.read(name)[None]
        return
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield reader.read(name, slice(start, min(start + step, shape[0]))).flatten()


@ckpt_app.command("reshard")
def reshard_command(path: Checkpoint, out: Path, max_shard_size: ShardSize = "4GB") -> None:
    """Cut a checkpoint into other shards, with checksums; every tensor keeps its bytes."""
    from archzoo import checkpoint

    reader = checkpoint.open(path)
    checkpoint.save(checkpoint.copied(reader), out, max_shard_size)
    files = len(list(out.glob("*.safetensors")))
    console().print(f"{out}: {len(reader.keys()):,} tensors in {files} files")


@ckpt_app.command("compress")
def compress_command(
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write; may be the same.")],
    codec: Annotated[
        Codec, typer.Option(help="dfloat11 is the public format; plain undoes both.")
    ] = Codec.HUFFMAN,
    max_shard_size: ShardSize = "4GB",
) -> None:
    """Store floating-point weights losslessly in less; archzoo reads the folder as before, others do not."""
    import time

    from archzoo import checkpoint

    reader = checkpoint.open(path)
    plain, before = reader.nbytes(), _weight_bytes(path)
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console()
    ) as bar:
        bar.add_task(f"write {out.name}", total=None)
        compress = None if codec is Codec.PLAIN else codec.value
        checkpoint.save(checkpoint.copied(reader), out, max_shard_size, compress)
    seconds = time.perf_counter() - start
    table = Table("", "bytes", "of plain")
    for what, size in (("before", before), ("after", _weight_bytes(out))):
        table.add_row(what, si(size, "B"), f"{size / max(plain, 1):.3f}")
    console().print(table)
    console().print(
        f"{len(reader.keys()):,} tensors in {seconds:.1f} s: {si(plain / seconds, 'B/s')} of plain weights"
    )


def _weight_bytes(path: Path) -> int:
    """Size of the weight files."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@ckpt_app.command("convert")
def convert_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a torch.distributed.checkpoint folder.")],
    out: Path,
    to: Annotated[Layout, typer.Option(help="Layout to write.")] = Layout.SAFETENSORS,
    dtype: Annotated[str | None, typer.Option(help="Of floating-point tensors; default: as stored.")] = None,
    max_shard_size: ShardSize = "4GB",
) -> None:
    """Between safetensors and torch.distributed.checkpoint folders, and between dtypes."""
    from archzoo import checkpoint
    from archzoo.checkpoint.distributed import from_dcp, to_dcp

    is_dcp = (path / ".metadata").is_file()
    if to is Layout.DCP:
        if is_dcp or dtype is not None:
            raise InputError("convert: to dcp, the source is a safetensors checkpoint and keeps its dtypes")
        to_dcp(path, out)
        console().print(f"{out}: written as a torch.distributed.checkpoint folder")
        return
    if is_dcp:
        if dtype is not None:
            raise InputError("convert: from dcp, tensors keep their dtypes")
        for name, value in from_dcp(path, out, max_shard_size=max_shard_size).items():
            console().print(f"left out, since it is no tensor: {name} = {value!r}")
    else:
        target = None if dtype is None else torch_dtype(dtype)
        reader = checkpoint.open(path)
        checkpoint.save(checkpoint.copied(reader, target), out, max_shard_size)
    console().print(f"{out}: {len(checkpoint.open(out).keys()):,} tensors")
