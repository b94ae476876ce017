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
