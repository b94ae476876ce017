"""`archzoo list | show | cost`: pure functions of the configs, no tensor is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archzoo.cli.app import console, model_config, si
from archzoo.errors import UnknownNameError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from archzoo.configuration import LayerSpec, ModelConfig

SeqLen = Annotated[int, typer.Option("--seq-len", "--tokens", min=1, help="Context length in tokens.")]
Batch = Annotated[int, typer.Option(min=1, help="Number of sequences.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.")]


def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell wildcard, such as 'zebra*'.")] = "*",
) -> None:
    """List the models: parameters, cache bytes per token (bfloat16), layers. Aliases are in italics."""
    from rich.table import Table

    from archzoo import zoo

    names = zoo.list_models(pattern)
    if not names:
        raise UnknownNameError("model", pattern, zoo.list_models())
    table = Table("name", box=None)
    for title in ("parameters", "active", "KV bytes/token"):
        table.add_column(title, justify="right")
    table.add_column("layers")
    for name in names:
        if full := zoo.aliases().get(name):
            table.add_row(f"[italic]{name}[/italic]", "", "", "", f"[italic]is {full}[/italic]")
            continue
        cfg = zoo.config(name)
        cost = zoo.cost(cfg)
        numbers = (si(cost.params), si(cost.active_params), f"{cost.cache_bytes_per_token:,}")
        table.add_row(name, *numbers, summary(cfg))
    console().print(table)


def show_command(
    name: Annotated[str, typer.Argument(help="A name of the zoo, a TOML file or a Hugging Face folder.")],
    seq_len: SeqLen = 4096,
    batch_size: Batch = 1,
    dtype: Dtype = "bfloat16",
) -> None:
    """Show one model: its layers, and what it costs at a context length."""
    from rich.table import Table

    from archzoo import zoo

    cfg = model_config(name)
    out = console()
    out.print(f"[bold]{cfg.name}[/bold]  {cfg.source}", highlight=False)
    out.print(
        f"vocabulary {cfg.vocab_size:,}, hidden size {cfg.hidden_size:,}, {cfg.layers.count} layers, "
        f"{cfg.max_positions:,} positions, {'tied' if cfg.tie_embeddings else 'untied'} embeddings",
        highlight=False,
    )
    layers = Table("layers", "mixer", "feed-forward", "other", box=None, title_justify="left")
    layers.add_column("parameters each", justify="right")
    layers.add_column("cache bytes/token each", justify="right")
    for indices, spec in runs(cfg):
        ffn = "" if spec.ffn is None else describe(spec.ffn)
        mixer = spec.mixer
        step = mixer.cache_bytes(cfg.hidden_size, seq_len + 1, 2) - mixer.cache_bytes(
            cfg.hidden_size, seq_len, 2
        )
        layers.add_row(
            indices, describe(mixer), ffn, other(spec), f"{spec.params(cfg.hidden_size):,}", f"{step:,}"
        )
    out.print(layers)
    cost = zoo.cost(cfg, seq_len, batch_size, dtype)
    totals = Table(f"{seq_len:,} tokens, batch {batch_size}, {dtype}", box=None)
    totals.add_column("", justify="right")
    totals.add_column("", justify="right")
    for key, value in asdict(cost).items():
        unit = "FLOP" if key.endswith("flops") else "B" if "bytes" in key else ""
        totals.add_row(key.replace("_", " "), f"{value:,}", si(value, unit))
    out.print(totals)


def cost_command(
    names: Annotated[list[str], typer.Argument(help="Names of the zoo, TOML files or folders.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Add each number's ratio to the first model.")
    ] = False,
    seq_len: SeqLen = 4096,
    batch_size: Batch = 1,
    dtype: Dtype = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: cache bytes against context.")] = None,
) -> None:
    """Compare what models cost: parameters, FLOPs, bytes of weights and of the decode cache."""
    from rich.table import Table

    from archzoo import zoo

    configs = {name: model_config(name) for name in names}
    costs = {name: asdict(zoo.cost(cfg, seq_len, batch_size, dtype)) for name, cfg in configs.items()}
    if as_json:
        typer.echo(json.dumps(costs, indent=2))
    else:
        table = Table(f"{seq_len:,} tokens, batch {batch_size}, {dtype}", box=None)
        for name in costs:
            table.add_column(name, justify="right")
        first = next(iter(costs.values()))
        for key, base in first.items():
            cells = []
            for cost in costs.values():
                ratio = f"  ({cost[key] / base:.3g}x)" if compare and base else ""
                cells.append(si(cost[key], "B" if "bytes" in key else "") + ratio)
            table.add_row(key.replace("_", " "), *cells)
        console().print(table)
    if plot is not None:
        contexts = [2**i for i in range(9, 18)]
        lines = {
            name: [zoo.cost(cfg, n, batch_size, dtype).cache_bytes for n in contexts]
            for name, cfg in configs.items()
        }
        from archzoo.cli.plots import plot_lines

        plot_lines(plot, contexts, lines, "context (tokens)", f"cache bytes ({dtype}, batch {batch_size})")


def runs(cfg: ModelConfig) -> list[tuple[str, LayerSpec]]:
    """Each distinct layer and where it stands, as ("0-4, 6", spec)."""
    places: dict[LayerSpec, list[str]] = {}
    for spec, group in groupby(enumerate(cfg.specs), key=lambda item: item[1]):
        indices = [index for index, _ in group]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"{indices[0]}"
        places.setdefault(spec, []).append(span)
    return [(", ".join(spans), spec) for spec, spans in places.items()]


def summary(cfg: ModelConfig) -> str:
    """ "22 mamba2 + 6 mla, swiglu"."""

    def counted(names: list[str]) -> str:
        kinds = dict.fromkeys(names)
        if len(kinds) == 1:
            return next(iter(kinds))
        return " + ".join(f"{names.count(kind)} {kind}" for kind in kinds)

    mixers = counted([spec.mixer.kind for spec in cfg.specs])
    ffns = counted([spec.ffn.kind if spec.ffn else "none" for spec in cfg.specs])
    extra = sorted({word for spec in cfg.specs for word in other(spec).split(", ") if word})
    return ", ".join([f"{cfg.layers.count} layers: {mixers}", *([ffns] if ffns != "none" else []), *extra])


def describe(block: BaseModel) -> str:
    """A block's kind and the settings that differ from its defaults, one line."""
    return " ".join((block.kind, *_settings(block.model_dump(exclude_defaults=True, exclude={"kind"}))))  # type: ignore[attr-defined]


def _settings(data: dict[str, object], prefix: str = "") -> list[str]:
    out = []
    for key, value in data.items():
        if isinstance(value, dict):
            out += _settings(value, f"{prefix}{key}.")
        else:
            out.append(f"{prefix}{key}={value}")
    return out


def other(spec: LayerSpec) -> str:
    """Norm scheme and depth policy where they are not the plain ones."""
    words = [describe(spec.depth)] if spec.depth.kind != "every" else []
    words += [f"norm {spec.residual.kind}"] if spec.residual.kind != "pre" else []
    return ", ".join(words)
