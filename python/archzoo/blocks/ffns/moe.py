"""Mixture of experts: the routers and experts of DeepSeek, Mixtral, Qwen, Granite, gpt-oss and Llama 4."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.ffns.glu import GLU, SwiGLUConfig
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import FfnConfig, Site, require
from archzoo.ops.experts import GATED, Activation, experts
from archzoo.ops.moe import GroupScore, Score, gate


class MoEConfig(FfnConfig):
    """`experts` routed feed-forwards of width `hidden`, `top_k` per token, plus `shared` always-on ones.

    Router: `score` of the logits; `router_bias` is on them; `selection_bias` (V3) takes part in the choice
    only; with `groups` the choice is among the `top_groups` best of them by `group_score`; `renormalize`
    makes the top_k weights sum to 1 before `scale`; `scale_input` multiplies an expert's input by the weight
    instead of its output (Llama 4). The shared experts are one SwiGLU of width shared * (shared_hidden or
    hidden); `shared_gate` multiplies it by a sigmoid of x (Qwen2-MoE).
    """

    kind: Literal["moe"] = "moe"
    experts: PositiveInt
    top_k: PositiveInt
    hidden: PositiveInt
    activation: Activation = "swiglu"
    bias: bool = False
    shared: NonNegativeInt = 0
    shared_hidden: PositiveInt | None = None
    shared_gate: bool = False
    score: Score = "softmax"
    router_bias: bool = False
    selection_bias: bool = False
    groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    group_score: GroupScore = "top2_sum"
    renormalize: bool = False
    scale: float = 1.0
    scale_input: bool = False

    def check(self, hidden_size: int) -> None:
        e, k, g, top = self.experts, self.top_k, self.groups, self.top_groups
        require(k <= e, f"moe: top_k ({k}) exceeds experts ({e})")
        require(e % g == 0, f"moe: experts ({e}) must be a multiple of groups ({g})")
        require(top <= g, f"moe: top_groups ({top}) exceeds groups ({g})")
        reach = e // g * top
        require(k <= reach, f"moe: top_k ({k}) exceeds the {reach} experts of {top} of {g} groups")
        require(self.shared > 0 or not self.shared_gate, "moe: shared_gate needs shared experts")

    def tiny(self) -> MoEConfig:
        groups = 4 if self.groups > 1 else 1
        return self.model_copy(
            update={
                "experts": 8,
                "top_k": min(self.top_k, 2),
                "hidden": 32,
                "shared": min(self.shared, 2),
                "shared_hidden": 48 if self.shared_hidden else None,
                "groups": groups,
                "top_groups": min(self.top_groups, 2),
            }
        )

    @property
    def shared_width(self) -> int:
        return self.shared * (self.shared_hidden or self.hidden)

    @property
    def up_rows(self) -> int:
        """Rows of an expert's first product."""
        return self.hidden * (2 if self.activation in GATED else 1)

    def _per_expert(self, hidden_size: int) -> int:
        weights = hidden_size * (self.up_rows + self.hidden)
        return weights + (self.up_rows + hidden_size) * self.bias

    def params(self, hidden_size: int) -> int:
        router = self.experts * (hidden_size + self.router_bias + self.selection_bias)
        shared = hidden_size * (3 * self.shared_width + self.shared_gate)
        return router + shared + self.experts * self._per_expert(hidden_size)

    def active_params(self, hidden_size: int) -> int:
        idle = (self.experts - self.top_k) * self._per_expert(hidden_size)
        return self.params(hidden_size) - idle

    def flops(self, hidden_size: int, tokens: int) -> int:
        weights = self.model_copy(update={"bias": False, "router_bias": False, "selection_bias": False})
        return 2 * weights.active_params(hidden_size) * tokens  # a bias is no product

    def build(self, site: Site) -> MoE:
        return MoE(self, site)


class Experts(nn.Module):
    """The routed experts, fused: gate_up [E, 2I, d] (gate rows first; [E, I, d] for gelu), down [E, d, I]."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        c = config
        self.gate_up = nn.Parameter(torch.empty(c.experts, c.up_rows, hidden_size))
        self.down = nn.Parameter(torch.empty(c.experts, hidden_size, c.hidden))
        self.gate_up_bias = nn.Parameter(torch.empty(c.experts, c.up_rows)) if c.bias else None
        self.down_bias = nn.Parameter(torch.empty(c.experts, hidden_size)) if c.bias else None


class MoE(nn.Module):
    """x [B, T, d] -> [B, T, d]; routed in fp32."""

    def __init__(self, config: MoEConfig, site: Site) -> None:
        super().__init__()
        self.config = c = config
        self.router = Linear(site.hidden_size, c.experts, bias=c.router_bias)
        if c.selection_bias:
            self.register_buffer("selection_bias", torch.empty(c.experts, dtype=torch.float32))
        else:
            self.selection_bias = None
        self.experts = Experts(c, site.hidden_size)
        self.shared = GLU(SwiGLUConfig(hidden=c.shared_width), site) if c.shared else None
        self.shared_gate = Linear(site.hidden_size, 1, bias=False) if c.shared_gate else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, k] of x [T, d]."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.router.bias is None else self.router.bias.to(wide)
        logits = F.linear(x.to(wide), self.router.weight.to(wide), bias)
        return gate(
            logits,
            top_k=c.top_k,
            score=c.score,
            bias=self.selection_bias,
            groups=c.groups,
            top_groups=c.top_groups,
            group_score=c.group_score,
            renormalize=c.renormalize,
            scale=c.scale,
        )

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        c, flat = self.config, x.flatten(0, -2)
        weights, ids = self.route(flat)
        out = experts(
            flat,
            weights,
            ids,
            self.experts.gate_up,
            self.experts.down,
            activation=c.activation,
            up_bias=self.experts.gate_up_bias,
            down_bias=self.experts.down_bias,
            scale_input=c.scale_input,
        ).view_as(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(self.shared_gate(x))
        return out + shared
