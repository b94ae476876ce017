"""`archzoo ckpt`: commands on checkpoints, without a model."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from archzoo.cli.app import Commands, console, si
from archzoo.errors import InputError

ckpt = typer.Typer(cls=Commands, help="Work on checkpoints.")


@ckpt.callback()
def group() -> None:
    """Work on checkpoints."""


@ckpt.command("compress")
def compress_command(
    folder: Annotated[Path, typer.Argument(help="Folder with safetensors weights, plain or compressed.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; may be the same.")],
    plain: Annotated[bool, typer.Option("--plain", help="The other way: write plain weights.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Most bytes of a shard before it is compressed.")
    ] = "4GB",
) -> None:
    """Store floating-point weights losslessly in less; archzoo reads the folder as before, others do not."""
    from archzoo import checkpoint
    from archzoo.checkpoint.shards import atomic_folder, write_shards

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    before = _weights(folder)
    tensors = checkpoint.load(folder, progress=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(out) as tmp:
        start = time.perf_counter()
        with console().status("write plain" if plain else "compress and write"):
            write_shards(tensors, tmp, max_shard_size, not plain)
        seconds = time.perf_counter() - start
        if out.resolve() != folder.resolve():
            for path in folder.iterdir():
                if path.is_file() and not path.name.startswith("model"):
                    shutil.copyfile(path, tmp / path.name)
    after = _weights(out)
    table = Table("", "files", "bytes", "of plain")
    for what, files in (("before", before), ("after", after)):
        table.add_row(what, str(len(files)), si(sum(files), "B"), f"{sum(files) / size:.3f}")
    console().print(table)
    console().print(
        f"{len(tensors):,} tensors, written in {seconds:.1f} s: {si(size / seconds, 'B/s')} of plain"
    )


def _weights(folder: Path) -> list[int]:
    """Sizes of the weight files."""
    return [path.stat().st_size for path in folder.glob("*.safetensors")]
