"""Line plots as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_lines(
    path: Path,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    *,
    x_log: bool = True,
    y_log: bool = True,
) -> None:
    """One line a name over `x`; a line that is shorter than `x` ends early."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in lines.items():
        marker = "o" if len(values) < 20 else None
        axes.plot(x[: len(values)], values, label=name, marker=marker, markersize=4)
    if x_log:
        axes.set_xscale("log", base=2)
    if y_log:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_loads(path: Path, loads: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Heat maps of router loads, one a name: layers down, experts across, 1 = the mean of the layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = max(len(load) for load in loads.values())
    figure = Figure(figsize=(8, (0.3 * layers + 0.8) * len(loads)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(loads), 1, squeeze=False)
    for axes, (name, load) in zip(grid[:, 0], loads.items(), strict=True):
        share = [[value * len(row) / max(sum(row), 1) for value in row] for row in load]
        image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=4)
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("layer")
    grid[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=grid[:, 0], label="load / mean load")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
