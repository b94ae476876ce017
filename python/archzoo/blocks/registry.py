"""Block configs: what every block owns, and how a `kind` in a TOML finds its class.

A block is one file that defines a config class (with `kind`) and the module it builds. Files in
`mixers/`, `ffns/` and `depth/` are found by themselves; nothing else lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from archzoo.cache import State
from archzoo.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """Where a block stands: layer `index` (from 0) of `count`, in a model of width `hidden_size`."""

    index: int
    count: int
    hidden_size: int
    norm_eps: float


class BlockConfig(BaseModel):
    """Base of all block configs: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    slot: ClassVar[str] = ""
    kind: str

    def check(self, hidden_size: int) -> None:
        """Raise ConfigError when the block cannot stand in a model of this width."""

    def tiny(self) -> BlockConfig:
        """The same block with small dimensions (hidden size 64), for tests and dry runs."""
        return self

    @abstractmethod
    def params(self, hidden_size: int) -> int:
        """Number of parameters."""

    def active_params(self, hidden_size: int) -> int:
        """Parameters that one token uses."""
        return self.params(hidden_size)


class Initialised(nn.Module):
    """A module that fills all its parameters itself; others get N(0, init_std) and zero biases."""

    def reset_parameters(self, generator: torch.Generator) -> None:
        raise NotImplementedError


class Mixer(nn.Module):
    """A token mixer: `forward(x [B, T, d], ctx, state=None) -> [B, T, d]`."""

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty decode state for `batch` sequences with room for `slots` tokens."""
        raise NotImplementedError


class DepthPolicy(nn.Module):
    """Runs a layer's body on some tokens: `forward(x, ctx, state, body) -> (y, mixed)`."""

    def new_state(
        self, mixer: Mixer, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> State:
        """The decode state of a layer whose mixer is `mixer`."""
        raise NotImplementedError


class MixerConfig(BlockConfig):
    """Base of token-mixer configs (attention, state space)."""

    slot = "mixers"

    @abstractmethod
    def flops(self, hidden_size: int, new: int, total: int) -> int:
        """FLOPs (2 per multiply-add) of one sequence: `new` tokens, the last one seeing `total`."""

    def cache_bytes(self, hidden_size: int, seq_len: int, itemsize: int) -> int:
        """Bytes of the part of the decode state that grows with `seq_len`, one sequence."""
        return 0

    def state_bytes(self, hidden_size: int, itemsize: int) -> int:
        """Bytes of the constant part of the decode state, one sequence."""
        return 0

    @abstractmethod
    def build(self, site: Site) -> Mixer:
        """The module."""


class FfnConfig(BlockConfig):
    """Base of feed-forward configs."""

    slot = "ffns"

    @property
    def causal(self) -> bool:
        """Whether the output of a token depends on no later one."""
        return True

    def flops(self, hidden_size: int, tokens: int) -> int:
        """FLOPs (2 per multiply-add) of `tokens` tokens."""
        return 2 * self.active_params(hidden_size) * tokens

    @abstractmethod
    def build(self, site: Site) -> nn.Module:
        """The module: `forward(x [B, T, d], ctx) -> [B, T, d]`."""


class DepthConfig(BlockConfig):
    """Base of depth policies: which tokens a layer processes."""

    slot = "depth"

    def params(self, hidden_size: int) -> int:
        return 0

    def tokens(self, seq_len: int) -> int:
        """How many of `seq_len` tokens the layer processes."""
        return seq_len

    @abstractmethod
    def build(self, site: Site) -> DepthPolicy | None:
        """The policy as a module around the layer's body, or None for every token."""


def kinds(base: type[BlockConfig]) -> dict[str, type[BlockConfig]]:
    """All block configs of one slot by `kind`, from the files of its folder."""
    folder = importlib.import_module(f"archzoo.blocks.{base.slot}")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    found: dict[str, type[BlockConfig]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            found[kind] = cls
    return dict(sorted(found.items()))


def require(ok: bool, message: str) -> None:
    """Raise ConfigError(message) unless ok."""
    if not ok:
        raise ConfigError(message)
