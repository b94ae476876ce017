"""Gated feed-forward: down(act(gate x) * up x) (SwiGLU, GeGLU; 2002.05202)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear, plain, together
from archzoo.blocks.registry import FfnConfig, Site
from archzoo.ops.linear import swiglu


class _GLUConfig(FfnConfig):
    hidden: PositiveInt
    bias: bool = False

    def tiny(self) -> Self:
        return self.model_copy(update={"hidden": 96})

    def params(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.hidden + (2 * self.hidden + hidden_size) * self.bias

    def build(self, site: Site) -> GLU:
        return GLU(self, site)


class SwiGLUConfig(_GLUConfig):
    """`hidden` channels between; act = SiLU."""

    kind: Literal["swiglu"] = "swiglu"


class GeGLUConfig(_GLUConfig):
    """`hidden` channels between; act = GELU in its tanh form."""

    kind: Literal["geglu"] = "geglu"


class GLU(nn.Module):
    """x [B, T, d] -> [B, T, d]."""

    def __init__(self, config: _GLUConfig, site: Site) -> None:
        super().__init__()
        self.gelu = config.kind == "geglu"
        self.fused = not (self.gelu or config.bias)
        self.gate_proj = Linear(site.hidden_size, config.hidden, bias=config.bias)
        self.up_proj = Linear(site.hidden_size, config.hidden, bias=config.bias)
        self.down_proj = Linear(config.hidden, site.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        if self.fused and plain(self.gate_proj, self.up_proj, self.down_proj):
            return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        gate, up = together(x, self.gate_proj, self.up_proj)
        act = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down_proj(act * up)
