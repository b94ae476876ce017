"""A Rust-accelerated zoo of language-model architectures for PyTorch.

Everything is imported on first use: `import archzoo` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archzoo import checkpoint, data, distill, ops, parallel
    from archzoo.configuration import ModelConfig
    from archzoo.conversion import convert
    from archzoo.costs import Cost, cost
    from archzoo.data.bpe import train_bpe
    from archzoo.errors import (
        ArchzooError,
        CacheError,
        CheckpointError,
        ConfigError,
        InputError,
        PackError,
        TokenizerError,
        UnknownNameError,
    )
    from archzoo.generation import generate
    from archzoo.model import CausalLM, Output
    from archzoo.tokenizer import Ragged, Tokenizer
    from archzoo.zoo import build, config, list_models, load, save

__version__ = "0.1.0"

_HOMES = {
    "archzoo.configuration": ["ModelConfig"],
    "archzoo.conversion": ["convert"],
    "archzoo.costs": ["Cost"],
    "archzoo.data.bpe": ["train_bpe"],
    "archzoo.errors": [
        "ArchzooError",
        "CacheError",
        "CheckpointError",
        "ConfigError",
        "InputError",
        "PackError",
        "TokenizerError",
        "UnknownNameError",
    ],
    "archzoo.generation": ["generate"],
    "archzoo.model": ["CausalLM", "Output"],
    "archzoo.tokenizer": ["Ragged", "Tokenizer"],
    "archzoo.zoo": ["build", "config", "cost", "list_models", "load", "save"],
}
_ATTRIBUTES = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("checkpoint", "data", "distill", "ops", "parallel")

__all__ = [
    "ArchzooError",
    "CacheError",
    "CausalLM",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "InputError",
    "ModelConfig",
    "Output",
    "PackError",
    "Ragged",
    "Tokenizer",
    "TokenizerError",
    "UnknownNameError",
    "build",
    "checkpoint",
    "config",
    "convert",
    "cost",
    "data",
    "distill",
    "generate",
    "list_models",
    "load",
    "ops",
    "parallel",
    "save",
    "train_bpe",
]


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"archzoo.{name}")
    else:
        raise AttributeError(f"module 'archzoo' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
