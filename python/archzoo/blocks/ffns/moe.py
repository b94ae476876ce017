"""Mixture of experts: the routers and experts of DeepSeek, Mixtral, Qwen, Granite, gpt-oss and Llama 4."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from archzoo.blocks.balance import Balance, Capacity, report
from archzoo.blocks.context import Context, Routing
from archzoo.blocks.ffns.glu import GLU, SwiGLUConfig
from archzoo.blocks.ffns.mlp import MLP, MLPConfig
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import FfnConfig, Site, require
from archzoo.ops.experts import GATED, Activation, Ffns, experts, routed
from archzoo.ops.linear import linear
from archzoo.ops.moe import GroupScore, Score, capacity, gate


class MoEConfig(FfnConfig):
    """`experts` routed feed-forwards of width `hidden`, `top_k` per token, plus `shared` always-on ones.

    Router: `score` of the logits; `router_bias` is on them; `selection_bias` (V3) takes part in the choice
    only; with `groups` the choice is among the `top_groups` best of them by `group_score`; `renormalize`
    makes the top_k weights sum to 1 before `scale`; `scale_input` multiplies an expert's input by the weight
    instead of its output (Llama 4). The shared experts are one SwiGLU of width shared * (shared_hidden or
    hidden); `shared_gate` multiplies it by a sigmoid of x (Qwen2-MoE). `residual` is the width of a dense
    GELU MLP beside the experts, softmax(Linear(d, 2)) weighs the two (PR-MoE, 2201.05596).

    Training: `jitter` e multiplies the router's input by U(1 - e, 1 + e) (Switch); `sample_second` takes the
    second of two experts with twice its normalised weight as probability (GShard); `balance` adds losses.
    `capacity` bounds what an expert takes: with `renormalize` the weights that are left sum to 1.

    choice "experts" (2202.09368): each expert takes the ceil(tokens * top_k / experts) tokens of a call that
    score it highest, so a token gets top_k experts on average. Later tokens take part in that: such a model
    has no decode cache.
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
    choice: Literal["tokens", "experts"] = "tokens"
    residual: PositiveInt | None = None
    jitter: NonNegativeFloat = 0.0
    sample_second: bool = False
    balance: Balance | None = None
    capacity: Capacity | None = None

    def check(self, hidden_size: int) -> None:
        e, k, g, top = self.experts, self.top_k, self.groups, self.top_groups
        require(k <= e, f"moe: top_k ({k}) exceeds experts ({e})")
        require(e % g == 0, f"moe: experts ({e}) must be a multiple of groups ({g})")
        require(top <= g, f"moe: top_groups ({top}) exceeds groups ({g})")
        reach = e // g * top
        require(k <= reach, f"moe: top_k ({k}) exceeds the {reach} experts of {top} of {g} groups")
        require(self.shared > 0 or not self.shared_gate, "moe: shared_gate needs shared experts")
        require(k == 2 or not self.sample_second, f"moe: sample_second needs top_k 2, found {k}")
        if self.balance is not None:
            devices, limit = self.balance.devices, self.balance.device_limit
            require(e % devices == 0, f"moe: experts ({e}) must be a multiple of balance.devices ({devices})")
            require(limit <= devices, f"moe: balance.device_limit ({limit}) exceeds devices ({devices})")
        if self.choice == "experts":
            plain = MoEConfig(experts=e, top_k=k, hidden=self.hidden)
            other = (
                "score",
                "selection_bias",
                "groups",
                "renormalize",
                "sample_second",
                "capacity",
                "balance",
            )
            extras = [name for name in other if getattr(self, name) != getattr(plain, name)]
            require(not extras, f"moe: choice 'experts' is a softmax alone, found {', '.join(extras)}")

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
                "residual": 96 if self.residual else None,
                "balance": self.balance and self.balance.model_copy(update={"devices": 2, "device_limit": 1}),
            }
        )

    @property
    def causal(self) -> bool:
        return self.choice == "tokens"

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
        if self.residual is not None:
            shared += MLPConfig(hidden=self.residual).params(hidden_size) + 2 * hidden_size + 2
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
        self.config, self.index = config, site.index
        c = config
        self.router = Linear(site.hidden_size, c.experts, bias=c.router_bias)
        if c.selection_bias:
            self.register_buffer("selection_bias", torch.empty(c.experts, dtype=torch.float32))
        else:
            self.selection_bias = None
        self.load: Tensor | None = None  # [E] of the batch so far, for `CausalLM.update_router_bias`
        self.experts = Experts(c, site.hidden_size)
        self.shared = GLU(SwiGLUConfig(hidden=c.shared_width), site) if c.shared else None
        self.shared_gate = Linear(site.hidden_size, 1, bias=False) if c.shared_gate else None
        self.residual = MLP(MLPConfig(hidden=c.residual), site) if c.residual else None
        self.coefficient = Linear(site.hidden_size, 2) if c.residual else None

    def logits(self, x: Tensor) -> Tensor:
        """Router logits [N, E] of x [N, d]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if self.training and self.config.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        bias = None if self.router.bias is None else self.router.bias.to(wide)
        return linear(x, self.router.weight.to(wide), bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [N, k] of logits [N, E]."""
        c = self.config
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

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [N, k] of x [N, d], before anything is dropped."""
        return self.choose(self.logits(x))

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        run = self._tokens_choose if self.config.choice == "tokens" else self._experts_choose
        out = run(x.flatten(0, -2), ctx).view_as(x)
        if self.residual is not None and self.coefficient is not None:
            weight = self.coefficient(x).softmax(-1)
            out = weight[..., :1] * out + weight[..., 1:] * self.residual(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(self.shared_gate(x))
        return out + shared

    def _tokens_choose(self, x: Tensor, ctx: Context | None) -> Tensor:
        c = self.config
        logits = self.logits(x)
        weights, ids = self.choose(logits)
        kept = self._kept(weights, ids, ctx)
        if ctx is not None and ctx.aux is not None:
            balance = c.balance if self.training else None
            report(ctx.aux, ctx.sequences, self.index, logits, ids, kept, c.score, balance)
        if kept is not ids and c.renormalize:
            weights = weights * (kept < c.experts)
            weights = c.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts(x, weights, kept, self._ffns(), dropless=kept is ids)

    def _ffns(self) -> Ffns:
        e, c = self.experts, self.config
        return Ffns(e.gate_up, e.down, e.gate_up_bias, e.down_bias, c.activation, c.scale_input)

    def _kept(self, weights: Tensor, ids: Tensor, ctx: Context | None) -> Tensor:
        """`ids` with the number of experts for every assignment that is not carried out."""
        c = self.config
        if c.sample_second and self.training:
            chance = 2 * weights[:, 1] / weights.sum(-1)
            second = torch.where(torch.rand_like(chance) < chance, ids[:, 1], c.experts)
            ids = torch.stack((ids[:, 0], second), 1)
        if c.capacity is None:
            return ids
        slots = c.capacity.slots(ids.shape[0], c.top_k, c.experts, self.training)
        if slots is None:
            return ids
        if ctx is not None and ctx.valid is not None:  # padding takes no slot
            ids = torch.where(ctx.valid.view(-1, 1), ids, c.experts)
        seed = torch.randint(2**62, (), device=ids.device) if c.capacity.drop == "random" else None
        return capacity(ids, c.experts, slots, policy=c.capacity.drop, weights=weights.detach(), seed=seed)

    def _experts_choose(self, x: Tensor, ctx: Context | None) -> Tensor:
        c, tokens = self.config, x.shape[0]
        p = self.logits(x).softmax(-1).t()
        count = min(tokens, math.ceil(tokens * c.top_k / c.experts))
        valid = None if ctx is None or ctx.valid is None else ctx.valid.flatten()
        if valid is not None:
            p = p * valid
        token = p.detach().sort(dim=-1, descending=True, stable=True).indices[:, :count]
        if ctx is not None and ctx.aux is not None:
            self._report_chosen(p.detach(), token, valid, ctx)
        counts = torch.full((c.experts,), count, dtype=torch.int32, device=x.device)
        scale = p.gather(1, token).flatten()
        return routed(x, token.flatten(), scale, counts, self._ffns(), dropless=True)

    def _report_chosen(self, p: Tensor, token: Tensor, valid: Tensor | None, ctx: Context) -> None:
        """`dropped` is the share of tokens that no expert took."""
        real = torch.ones_like(p[0]) if valid is None else valid.to(p.dtype)
        taken = torch.zeros_like(real).index_fill(0, token.flatten(), 1.0) * real
        total = real.sum().clamp_min(1)
        assert ctx.aux is not None
        ctx.aux.routings[self.index] = Routing(
            real[token].sum(-1), p.sum(-1) / total, 1 - taken.sum() / total
        )
