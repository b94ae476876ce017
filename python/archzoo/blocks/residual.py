"""Residual schemes: how a sublayer F is added to the stream."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ResidualConfig(BaseModel):
    """`pre`: x + F(N(x)). `lns` (LayerNorm Scaling, 2502.05795): x + F(N(x) / sqrt(l)), l from 1.

    `scale` multiplies F's output (Granite).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["pre", "lns"] = "pre"
    scale: float = 1.0

    def norm_scale(self, index: int) -> float:
        """Factor on the output of both norms of layer `index` (from 0)."""
        return float((index + 1) ** -0.5) if self.kind == "lns" else 1.0
