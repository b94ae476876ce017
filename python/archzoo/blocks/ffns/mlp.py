"""The feed-forward of the first Transformers and GPTs: down(gelu(up x)), with biases."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import FfnConfig, Site


class MLPConfig(FfnConfig):
    """`hidden` channels between; exact GELU."""

    kind: Literal["mlp"] = "mlp"
    hidden: PositiveInt
    bias: bool = True

    def tiny(self) -> MLPConfig:
        return self.model_copy(update={"hidden": 96})

    def params(self, hidden_size: int) -> int:
        return 2 * hidden_size * self.hidden + (self.hidden + hidden_size) * self.bias

    def build(self, site: Site) -> MLP:
        return MLP(self, site)


class MLP(nn.Module):
    """x [B, T, d] -> [B, T, d]."""

    def __init__(self, config: MLPConfig, site: Site) -> None:
        super().__init__()
        self.up_proj = Linear(site.hidden_size, config.hidden, bias=config.bias)
        self.down_proj = Linear(config.hidden, site.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))
