"""Rotary position embeddings: inverse frequencies of every scaling, and their application."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor


class RopeConfig(BaseModel):
    """Rotary embedding of the first `dim` channels of a head.

    `interleaved` pairs channels (2p, 2p+1) as DeepSeek stores them; otherwise (p, p + dim/2).
    `mscale_all_dim` also scales the softmax of MLA (DeepSeek); see `softmax_factor`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["default", "linear", "ntk", "yarn", "llama3"] = "default"
    theta: PositiveFloat = 10000.0
    interleaved: bool = False
    factor: PositiveFloat = 1.0
    original_max_positions: PositiveInt | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in ("yarn", "llama3"):
            self._original()
        return self

    @property
    def key(self) -> tuple[object, ...]:
        """All fields; torch.compile can hash this, not the config."""
        scaling = (self.factor, self.original_max_positions, self.beta_fast, self.beta_slow, self.truncate)
        factors = (self.mscale, self.mscale_all_dim, self.attention_factor)
        bands = (self.low_freq_factor, self.high_freq_factor)
        return (self.kind, self.theta, self.interleaved, *scaling, *factors, *bands)

    def inv_freq(self, dim: int) -> list[float]:
        """Angles per position of the dim/2 pairs, radians."""
        theta = self.theta
        if self.kind == "ntk":
            theta = self.theta * self.factor ** (dim / (dim - 2))
        plain = [theta ** (-2 * p / dim) for p in range(dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        if self.kind == "yarn":
            return self._yarn(plain, dim)
        if self.kind == "llama3":
            return [self._llama3(f) for f in plain]
        return plain

    def _yarn(self, plain: list[float], dim: int) -> list[float]:
        def correction(beta: float) -> float:
            original = self._original()
            return dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(self.theta))

        low, high = correction(self.beta_fast), correction(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # as published: avoids a division by zero
        out = []
        for p, f in enumerate(plain):
            ramp = min(max((p - low) / (high - low), 0.0), 1.0)
            out.append(f * (1 - ramp) + f / self.factor * ramp)
        return out

    def _llama3(self, f: float) -> float:
        wavelength, original = 2 * math.pi / f, self._original()
        if wavelength < original / self.high_freq_factor:
            return f
        if wavelength > original / self.low_freq_factor:
            return f / self.factor
        t = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - t) * f / self.factor + t * f

    def _original(self) -> int:
        if self.original_max_positions is None:
            raise ValueError(f"kind '{self.kind}' needs original_max_positions")
        return self.original_max_positions

    def _m(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    @property
    def table_factor(self) -> float:
        """Factor on cos and sin (YaRN's attention factor)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def softmax_factor(self) -> float:
        """Factor on MLA's softmax scale: m(mscale_all_dim)^2 when a scaling is on."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return self._m(self.mscale_all_dim) ** 2

    def table(self, positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., T, dim/2] of `positions` [..., T], computed in at least fp32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        freq = torch.tensor(self.inv_freq(dim), dtype=wide, device=positions.device)
        angle = positions.clamp(min=0)[..., None].to(wide) * freq
        m = self.table_factor
        return (angle.cos() * m).to(dtype), (angle.sin() * m).to(dtype)
