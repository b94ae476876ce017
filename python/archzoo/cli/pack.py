"""`archzoo pack`: text files into packed tokens, and the check of what was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archzoo.cli.app import console, si
from archzoo.errors import InputError


def pack_command(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Text, JSONL (.gz and .zst too) or Parquet files, and folders with such files."),
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or another tokenizer file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; goes on where a killed run was.")] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a shard.")] = 100_000_000,
    text_key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text.")] = "text",
    append_eos: Annotated[bool, typer.Option("--append-eos", help="End every document with it.")] = False,
    eos_token: Annotated[str | None, typer.Option(help="End of text, if it is not a usual one.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="INPUTS are packed folders: check them.")] = False,
) -> None:
    """Encode text into memory-mapped token shards for training."""
    from archzoo import Tokenizer
    from archzoo.data import verify_pack, write_pack

    if verify:
        for folder in inputs:
            manifest = verify_pack(folder)
            console().print(f"{folder}: all {len(manifest.shards)} shards are intact")
        return
    if tokenizer is None or out is None:
        raise InputError("packing needs --tokenizer and --out (or --verify and packed folders)")
    manifest = write_pack(
        inputs,
        Tokenizer.from_file(tokenizer),
        out,
        shard_tokens=shard_tokens,
        text_key=text_key,
        append_eos=append_eos,
        eos_token=eos_token,
        progress=True,
    )
    console().print(
        f"{out}: {si(manifest.tokens)} tokens of {manifest.documents:,} documents "
        f"in {len(manifest.shards)} shards of {manifest.dtype}"
    )
