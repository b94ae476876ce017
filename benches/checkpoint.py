"""Loading and saving sharded checkpoints against the public ways, in random order, warm and cold.

python benches/checkpoint.py [--gigabytes 2.4] [--rounds 5] [--folder /tmp] [--experts 256] [--layers 58]

Loads end when the bytes are in parameters that existed before. `cold` drops the files from the page cache of
this machine; what a host below it caches is not known.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Row, report  # isort: skip
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import archzoo
from archzoo import checkpoint
from archzoo.checkpoint import Rank
from archzoo.checkpoint.source import bytes_of
from archzoo.model import skeleton

Runs = dict[str, Callable[[], object]]


def shuffled(runs: Runs, rounds: int, before: Callable[[], object] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each run; every round has its own order, since a fixed one favours some."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    choose = random.Random(0)
    for turn in range(rounds + 1):
        for name in choose.sample(list(runs), len(runs)):
            before()
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def weights(gigabytes: float) -> dict[str, Tensor]:
    """Tensors of a small mixture of experts: most of 1 MiB, some larger, norms."""
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    layers = round(gigabytes * 1e9 / (64 * 3 * 2**20 + 16 * 2**20))
    block = torch.randn(2**23, generator=generator).bfloat16()
    for i in range(layers):
        for e in range(64):
            for part in ("gate", "up", "down"):
                out[f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight"] = block[: 2**19].view(512, 1024)
        out[f"model.layers.{i}.self_attn.weight"] = block.view(2048, 4096)
        out[f"model.layers.{i}.norm.weight"] = block[:2048]
    return {name: tensor.clone() for name, tensor in out.items()}


def preadv(files: dict[str, list[tuple[str, int, Tensor]]], threads: int) -> None:
    """The plainest fast way: positioned reads into the parameters, threads taking tensors in turns."""
    jobs = [job for file in files.values() for job in file]
    handles = {path: os.open(path, os.O_RDONLY) for path in files}

    def work(thread: int) -> None:
        share = -(-len(jobs) // threads)
        for path, offset, tensor in jobs[thread * share : (thread + 1) * share]:
            memory, done = memoryview(bytes_of(tensor)), 0
            while done < len(memory):
                done += os.preadv(handles[path], [memory[done:]], offset + done)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    for handle in handles.values():
        os.close(handle)


def layout(folder: Path, targets: dict[str, Tensor]) -> dict[str, list[tuple[str, int, Tensor]]]:
    """By file: file, offset and destination of each tensor, in the order of the file."""
    files: dict[str, list[tuple[str, int, Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = [(info["data_offsets"][0] + 8 + length, name) for name, info in header.items()]
        files[str(path)] = [(str(path), offset, targets[name]) for offset, name in sorted(entries)]
    return files


def drop(folder: Path) -> None:
    """Forget the files' pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def durable_writes(tensors: list[Tensor], folder: Path, threads: int = 2, step: int = 32 << 20) -> None:
    """What the disk allows: the tensors' memory into files whose space is taken first, then fsync.

    Pages are handed to the disk while more are written: where it was tried, as fast as O_DIRECT at its best.
    """

    def work(thread: int) -> None:
        mine = tensors[thread::threads]
        handle = os.open(folder / str(thread), os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(handle, 0, sum(tensor.nbytes for tensor in mine))
        done = told = 0
        for tensor in mine:
            memory, start = memoryview(bytes_of(tensor)), done
            while done < start + len(memory):
                done += os.write(handle, memory[done - start :])
            if done - told >= step:
                os.posix_fadvise(handle, told, done - told, os.POSIX_FADV_DONTNEED)
                told = done
        os.fsync(handle)
        os.close(handle)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def loads(root: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> Runs:
    """Every way to fill `targets`."""
    folder = root / "sharded"
    shards = sorted(folder.glob("*.safetensors"))
    files = layout(folder, targets)

    def ours() -> None:
        checkpoint.open(folder).read_into(targets)

    def ours_verified() -> None:
        checkpoint.open(folder).read_into(targets, verify=True)

    def by_safe_open() -> None:
        for path in shards:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    targets[name].copy_(file.get_tensor(name))

    def by_load_file() -> None:
        for path in shards:
            for name, tensor in load_file(path).items():
                targets[name].copy_(tensor)

    def by_torch() -> None:
        for name, tensor in torch.load(root / "torch.pt", weights_only=True).items():
            targets[name].copy_(tensor)

    def by_dcp() -> None:
        dcp.load(targets, checkpoint_id=root / "dcp", no_dist=True)

    return {
        "archzoo": ours,
        "archzoo, checksums": ours_verified,
        "safe_open + copy": by_safe_open,
        "load_file + copy": by_load_file,
        "preadv, 2 threads": lambda: preadv(files, 2),
        "torch.load": by_torch,
        "DCP": by_dcp,
    }


def seconds(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def loading(root: Path, options: argparse.Namespace, notes: dict[str, float]) -> list[Row]:
    tensors = weights(options.gigabytes)
    size = sum(t.nbytes for t in tensors.values()) / 1e9
    checkpoint.save(tensors, root / "sharded", max_shard_size="400MB")
    torch.save(tensors, root / "torch.pt")
    dcp.save(tensors, checkpoint_id=root / "dcp", no_dist=True)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    runs = loads(root, tensors, targets)
    for name, run in runs.items():
        for target in targets.values():
            target.zero_()
        run()
        assert all(torch.equal(targets[key], tensor) for key, tensor in tensors.items()), name
    del tensors
    rows = []
    warm = seconds(shuffled(runs, options.rounds))
    goals = {"torch.load": 3.0, "DCP": 4.0, "preadv, 2 threads": 0.95, "archzoo, checksums": 0.0}
    for name in list(runs)[1:]:
        ratio = warm[name] / warm["archzoo"]
        rows.append(
            Row("warm load", "GB/s", size / warm["archzoo"], size / warm[name], name, ratio,
                goals.get(name, 1.0), 0.0, "")
        )  # fmt: skip
    cold_runs = {name: runs[name] for name in list(runs)[:1] + list(runs)[2:5]}
    cold = shuffled(cold_runs, options.rounds, lambda: drop(root / "sharded"))
    for what, pick in (("median", statistics.median), ("worst", max)):
        ours = pick(cold["archzoo"])
        for name in list(cold_runs)[1:]:
            peer = pick(cold[name])
            goal = 1.0 if "preadv" in name else 0.0
            case = f"cold load, {what}"
            rows.append(Row(case, "GB/s", size / ours, size / peer, name, peer / ours, goal, 0.0, ""))
    notes["gigabytes"] = size
    return rows


def saving(root: Path, options: argparse.Namespace) -> list[Row]:
    tensors = weights(options.gigabytes)
    size = sum(t.nbytes for t in tensors.values()) / 1e9
    target = root / "save"

    def fresh() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()

    def by_save_file() -> None:
        save_file(tensors, target / "model.safetensors")

    def by_save_file_and_fsync() -> None:
        by_save_file()
        sync(target / "model.safetensors")

    runs = {
        "archzoo, with fsync": lambda: checkpoint.save(tensors, target / "out", max_shard_size="400MB"),
        "save_file, no fsync": by_save_file,
        "save_file + fsync": by_save_file_and_fsync,
        "durable limit": lambda: durable_writes(list(tensors.values()), target),
        "torch.save": lambda: torch.save(tensors, target / "model.pt"),
        "DCP": lambda: dcp.save(tensors, checkpoint_id=target / "dcp", no_dist=True),
    }
    median = seconds(shuffled(runs, min(options.rounds, 3), fresh))
    shutil.rmtree(target)
    ours = median["archzoo, with fsync"]
    goals = {"save_file, no fsync": 1 / 1.3, "durable limit": 0.95}
    return [
        Row("save", "GB/s", size / ours, size / median[name], name, median[name] / ours,
            goals.get(name, 1.0), 0.0, "")
        for name in list(runs)[1:]
    ]  # fmt: skip


def experts(root: Path, options: argparse.Namespace, notes: dict[str, float]) -> list[Row]:
    """A checkpoint of DeepSeek-V3's structure, small dims, into fused experts."""
    from transformers import AutoModelForCausalLM

    config = archzoo.config("deepseek-v3").tiny()
    config = config.override(
        f"layers.count={options.layers + 1}",
        f"layers.override.0.indices={list(range(1, options.layers + 1))}",
        f"layers.override.0.ffn.experts={options.experts}",
    )
    model = archzoo.build(config, dtype=torch.bfloat16)
    archzoo.save(model, root / "deepseek", max_shard_size="100MB")
    del model
    folder = root / "deepseek"
    notes["expert tensors"] = float(sum(".experts." in name for name in checkpoint.open(folder).keys()))  # noqa: SIM118
    runs: Runs = {
        "archzoo": lambda: archzoo.load(folder),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    }
    median = seconds(shuffled(runs, min(options.rounds, 3)))
    ours, theirs = median["archzoo"], median["transformers"]
    part, whole = expert_bytes(folder, Rank(expert=(1, 4))), expert_bytes(folder, Rank())
    return [
        Row("fused experts", "s", ours, theirs, "transformers", theirs / ours, 5.0, 0.0, ""),
        Row("a rank with 1/4 of the experts reads", "MB", part / 1e6, whole / 1e6, "all of them",
            whole / part, 4.0, 0.0, ""),
    ]  # fmt: skip


def expert_bytes(folder: Path, rank: Rank) -> int:
    """Bytes of expert weights that a rank reads."""
    reader = checkpoint.open(folder)
    config, family = checkpoint.read_config(folder)
    checkpoint.read_part(skeleton(config, torch.bfloat16), reader, family, rank)
    infos = {name: reader.info(name) for name in reader.keys() if ".experts." not in name}  # noqa: SIM118
    return reader.bytes_read - sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in infos.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--only", choices=["load", "save", "experts"])
    options = parser.parse_args()
    notes: dict[str, float] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        if options.only in (None, "load"):
            rows += loading(root, options, notes)
            for part in ("sharded", "dcp"):
                shutil.rmtree(root / part)
            (root / "torch.pt").unlink()
        if options.only in (None, "save"):
            rows += saving(root, options)
        if options.only in (None, "experts"):
            rows += experts(root, options, notes)
    report("checkpoint", rows, notes)


if __name__ == "__main__":
    main()
