"""Find, configure, build, load and save models."""

from __future__ import annotations

import fnmatch
import gc
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from archzoo import checkpoint
from archzoo.configuration import ModelConfig
from archzoo.costs import Cost
from archzoo.costs import cost as config_cost
from archzoo.errors import InputError, UnknownNameError
from archzoo.model import CausalLM, skeleton

CONFIGS = Path(__file__).parent / "configs"


@cache
def _files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((CONFIGS / "models").glob("**/*.toml"))}


@cache
def aliases() -> dict[str, str]:
    """Short names and the full variant each points at."""
    found: dict[str, str] = tomllib.loads((CONFIGS / "aliases.toml").read_text(encoding="utf-8"))
    return found


def list_models(pattern: str = "*", *, with_aliases: bool = True) -> list[str]:
    """Names that match a shell wildcard, in natural order."""
    names = [*_files(), *(aliases() if with_aliases else ())]
    hits = [name for name in names if fnmatch.fnmatch(name, pattern)]
    return sorted(hits, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


def config(name: str) -> ModelConfig:
    """The frozen, validated config of a registered model, or of a TOML file when `name` is a path."""
    if name.endswith(".toml"):
        return ModelConfig.from_toml(name)
    full = aliases().get(name, name)
    if full not in _files():
        raise UnknownNameError("model", name, [*_files(), *aliases()])
    return _registered(full)


@cache
def _registered(name: str) -> ModelConfig:
    return ModelConfig.from_toml(_files()[name])


def cost(model: str | ModelConfig, seq_len: int = 4096, batch_size: int = 1, dtype: str = "bfloat16") -> Cost:
    """Parameters, FLOPs and bytes of a model, by name or config; a pure function of the config."""
    cfg = config(model) if isinstance(model, str) else model
    return config_cost(cfg, seq_len, batch_size, dtype)


def build(
    model: str | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CausalLM:
    """A freshly initialised model (seeded); device="meta" allocates nothing."""
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type, found {dtype}")
    cfg = config(model) if isinstance(model, str) else model
    built = skeleton(cfg, dtype)
    if torch.device(device).type != "meta":
        built.to_empty(device=device)
        built.init_weights(seed)
    return built


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> CausalLM:
    """The model of any supported Hugging Face folder, or of a Llama's .gguf file; the files tell the family.

    dtype None keeps the stored one, float32 for what a GGUF file quantises. DeepSeek-V3's and GLM-4.5's
    multi-token prediction modules are left out, as transformers does, unless `mtp`. `verify` compares the
    weights with their checksums, where the folder has such; `progress` shows a bar. All or nothing: an error
    leaves no half-loaded model.
    """
    cfg, family = checkpoint.read_config(folder, mtp)
    reader = checkpoint.open(folder)
    model = skeleton(cfg, dtype or torch.float32)
    with _uncollected():
        forms = checkpoint.match(model, reader, family)
        if dtype is None:
            checkpoint.adopt_dtypes(model, reader, family, forms)
        model.to_empty(device=device)
        with checkpoint.shown(reader, f"read {reader.path.name}", progress):
            checkpoint.read_into(model, reader, family, forms, verify=verify)
    return model.eval()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would look again and again at the many views of many experts."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def save(
    model: CausalLM,
    folder: str | Path,
    *,
    max_shard_size: int | str = "4GB",
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """Write a Hugging Face style folder, key for key, atomically: the old folder stays until it is whole."""
    checkpoint.write_model(model, folder, max_shard_size=max_shard_size, extra_files=extra_files)
