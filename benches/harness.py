"""Shared by all benchmarks: interleaved rounds, medians, floors of this machine, table, JSON and plot."""

from __future__ import annotations

import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads take cores from others

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from archzoo import _rust

RESULTS = Path(__file__).parent / "results"
CONSOLE = Console(width=150)


@dataclass
class Row:
    """One comparison: medians in `unit`, ratio > 1 when archzoo is faster, and the share of a floor."""

    case: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    goal: float
    floor: float
    floor_name: str


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each run; rounds alternate so that a busy machine hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        names = list(runs) if turn % 2 else list(reversed(runs))
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def best(
    case: str, times: dict[str, float], floor: float, floor_name: str, goal: float = 1.0, unit: str = "ms"
) -> Row:
    """Ours beside the fastest of the others, of times in seconds."""
    peer = min((name for name in times if name != "ours"), key=times.__getitem__)
    scale = {"ms": 1e3, "us": 1e6}[unit]
    ours, theirs = times["ours"], times[peer]
    return Row(case, unit, ours * scale, theirs * scale, peer, theirs / ours, goal, floor / ours, floor_name)


def gemm_rate() -> float:
    """FLOP/s of a 512 x 512 x 2048 fp32 product."""
    a, b = torch.randn(512, 2048), torch.randn(2048, 512)
    seconds = interleaved({"gemm": lambda: a @ b}, 20, 3)["gemm"]
    return 2 * 512 * 512 * 2048 / seconds


def read_bandwidth() -> float:
    """Bytes/s of a sum over 256 MB."""
    block = torch.ones(64 * 2**20)
    seconds = interleaved({"sum": lambda: block.sum()}, 7, 2)["sum"]
    return block.nbytes / seconds


def batch1_linears(weights: list[torch.Tensor]) -> float:
    """Seconds of torch's own product of one row with every weight."""
    rows = {w.shape[1]: torch.randn(1, w.shape[1]) for w in weights}

    def run() -> None:
        for w in weights:
            F.linear(rows[w.shape[1]], w)

    return interleaved({"linears": run}, 5, 2)["linears"]


def hf_step(model: Any, ids: torch.Tensor, past: Any = None) -> tuple[Any, Any]:
    """(output, cache) of a transformers model after more tokens; the cache's name depends on the version."""
    names = ("cache", "past_key_values", "cache_params")
    name = next(n for n in names if n in inspect.signature(model.forward).parameters)
    out = model(ids, use_cache=True, **({} if past is None else {name: past}))
    return out, next(out[n] for n in names if n in out)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": _rust.instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def report(name: str, rows: list[Row], notes: dict[str, float]) -> None:
    """Print the table; write benches/results/local/<name>.json and .png."""
    where = f"{_rust.instruction_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(title=f"{name}: {where}")
    for column in ("case", "archzoo", "peer", "peer is", "ratio", "goal", "of floor", "floor is"):
        table.add_column(
            column, justify="right" if column in ("archzoo", "peer", "ratio", "goal") else "left"
        )
    for row in rows:
        ok = row.ratio >= row.goal
        table.add_row(
            row.case,
            f"{row.ours:.4g} {row.unit}",
            f"{row.peer:.4g} {row.unit}",
            row.peer_name,
            f"[{'green' if ok else 'red'}]{row.ratio:.2f}x[/]",
            f"{row.goal:.2f}x",
            f"{row.floor:.2f}" if row.floor else "",
            row.floor_name,
        )
    CONSOLE.print(table)
    for key, value in notes.items():
        CONSOLE.print(f"{key}: {value:.4g}")
    folder = write_results(name, {"rows": [asdict(row) for row in rows], "notes": notes})
    _plot(folder / f"{name}.png", name, rows)


def write_results(name: str, content: dict[str, object]) -> Path:
    """Write benches/results/local/<name>.json with what the figures were taken on; the folder."""
    folder = RESULTS / "local"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return folder


def _plot(path: Path, title: str, rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.2))
    axes.barh([row.case for row in rows], [row.ratio for row in rows], color="tab:blue")
    axes.plot([row.goal for row in rows], range(len(rows)), "k|", markersize=16, label="goal")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the peer")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
