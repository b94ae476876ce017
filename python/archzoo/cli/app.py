"""The typer application, and what its commands share: the console, errors, folders by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from archzoo.errors import ArchzooError, ConfigError

if TYPE_CHECKING:
    import torch

    from archzoo.configuration import ModelConfig

# Read when torch starts its threads. Threads that wait by spinning make a shared machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Commands(TyperGroup):
    """An ArchzooError is one red line and exit code 2: the user's input is wrong, not the program."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArchzooError as error:
            Console(stderr=True, soft_wrap=True).print(f"[red]{escape(str(error))}[/red]", highlight=False)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    help="A zoo of language-model architectures: look at them, convert one into another, distil, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def console() -> Console:
    """Standard output; a pipe gets wide lines instead of wrapped ones."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=160, highlight=False)


def model_config(name: str) -> ModelConfig:
    """The config of a registered name, a TOML file or a Hugging Face folder."""
    from archzoo import checkpoint, zoo

    return checkpoint.read_config(name)[0] if Path(name).is_dir() else zoo.config(name)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What a converted model takes over from its source besides weights and config."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def torch_dtype(name: str) -> torch.dtype:
    """A floating-point dtype by name."""
    import torch

    from archzoo.costs import ITEMSIZE

    if name not in ITEMSIZE:
        raise ConfigError(f"dtype '{name}': expected one of {', '.join(ITEMSIZE)}")
    found: torch.dtype = getattr(torch, name)
    return found


def si(number: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"."""
    power = 0
    while abs(number) >= 1000 and power < 5:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if number < 100 else f"{number:.0f}"
    return f"{digits} {' kMGTP'[power].strip()}{unit}".strip()
