"""Mamba-2 (2405.21060): the state-spaces form, and Zebra-Llama's grouped form (2505.17272)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.registry import Initialised, Mixer, MixerConfig, Site, require
from archzoo.errors import CacheError
from archzoo.ops.conv import causal_conv1d, causal_conv1d_state, causal_conv1d_step
from archzoo.ops.norm import gated_rms_norm
from archzoo.ops.ssd import CHUNK, ssd, ssd_step

DT_RANGE = (1e-3, 0.1)  # of softplus(dt_bias) at initialisation
DT_FLOOR = 1e-4
A_RANGE = (1.0, 16.0)


class Mamba2Config(MixerConfig):
    """`heads` of head_dim channels, each with a state of head_dim x state_size.

    B and C have `groups` heads. kv_heads (Zebra, MambaInLlama) projects x and B to fewer heads, repeated
    after the convolution, or before it with repeat_before_conv. The gated norm runs over each of the
    `groups` parts of the channels.
    """

    kind: Literal["mamba2"] = "mamba2"
    heads: PositiveInt
    head_dim: PositiveInt
    state_size: PositiveInt
    groups: PositiveInt = 1
    kv_heads: PositiveInt | None = None
    repeat_before_conv: bool = False
    conv_kernel: PositiveInt = 4
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def splits(self) -> tuple[int, int, int, int, int]:
        """Rows of in_proj: z, x, B, C, dt."""
        x_heads, b_groups = self.kv_heads or self.heads, self.kv_heads or self.groups
        x, b, c = x_heads * self.head_dim, b_groups * self.state_size, self.groups * self.state_size
        return self.inner, x, b, c, self.heads

    @property
    def conv_splits(self) -> tuple[int, int, int]:
        """Channels of the convolution: x, B, C."""
        _, x, b, c, _ = self.splits
        rep = self.heads // self.kv_heads if self.kv_heads and self.repeat_before_conv else 1
        return x * rep, b * rep, c

    def check(self, hidden_size: int) -> None:
        require(
            self.heads % self.groups == 0,
            f"mamba2: heads ({self.heads}) must be a multiple of groups ({self.groups})",
        )
        if self.kv_heads is not None:
            require(
                self.heads % self.kv_heads == 0,
                f"mamba2: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
            )

    def tiny(self) -> Mamba2Config:
        groups = 4 if self.groups == self.heads else min(self.groups, 2)
        return self.model_copy(
            update={
                "heads": 4,
                "head_dim": 16,
                "state_size": 8,
                "groups": groups,
                "kv_heads": 2 if self.kv_heads else None,
            }
        )

    def params(self, hidden_size: int) -> int:
        conv = sum(self.conv_splits) * (self.conv_kernel + 1)
        return hidden_size * (sum(self.splits) + self.inner) + conv + 3 * self.heads + self.inner

    def flops(self, hidden_size: int, new: int, total: int) -> int:
        linear = hidden_size * (sum(self.splits) + self.inner) + sum(self.conv_splits) * self.conv_kernel
        state = 2 * self.inner * self.state_size
        chunk = min(CHUNK, new)
        inside = chunk * (self.groups * self.state_size + self.inner) if new > 1 else 0
        return 2 * new * (linear + state + inside)

    def state_bytes(self, hidden_size: int, itemsize: int) -> int:
        ssm = self.inner * self.state_size * max(itemsize, 4)
        return ssm + self.conv_kernel * sum(self.conv_splits) * itemsize

    def build(self, site: Site) -> Mamba2:
        return Mamba2(self, site)


class Mamba2State:
    """conv [B, K, channels]: the last K raw inputs; ssm [B, H, P, N] fp32."""

    truncatable = False

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def truncate(self, length: int) -> None:
        raise CacheError("a Mamba-2 state is recurrent and cannot be truncated; clone() the cache before")

    def reorder(self, rows: Tensor) -> None:
        self.conv, self.ssm = self.conv[rows], self.ssm[rows]

    def clone(self) -> Mamba2State:
        return Mamba2State(self.conv.clone(), self.ssm.clone())

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes


class GatedNorm(nn.Module):
    """RMSNorm of y gated by silu(z), over each group of channels."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        c = self.config
        return gated_rms_norm(y, z, self.weight, c.norm_eps, c.inner // c.groups, c.norm_before_gate)


class Mamba2(Mixer, Initialised):
    """x [B, T, d] -> [B, T, d]; state: Mamba2State."""

    def __init__(self, config: Mamba2Config, site: Site) -> None:
        super().__init__()
        self.config = c = config
        self.depth = site.count
        channels = sum(c.conv_splits)
        self.in_proj = Linear(site.hidden_size, sum(c.splits), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, c.conv_kernel, groups=channels)
        self.dt_bias = nn.Parameter(torch.empty(c.heads))
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.D = nn.Parameter(torch.empty(c.heads))
        self.norm = GatedNorm(c)
        self.out_proj = Linear(c.inner, site.hidden_size, bias=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """The published initialisation: A in [1, 16], dt log-uniform in [1e-3, 0.1], D = 1."""
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5), generator=generator)
        assert self.conv1d.bias is not None
        bound = self.config.conv_kernel**-0.5
        nn.init.uniform_(self.conv1d.bias, -bound, bound, generator=generator)
        with torch.no_grad():
            nn.init.uniform_(self.A_log, *A_RANGE, generator=generator).log_()
            low, high = (math.log(v) for v in DT_RANGE)
            dt = torch.empty_like(self.dt_bias, dtype=torch.float64)
            dt = dt.uniform_(low, high, generator=generator).exp_().clamp_(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            nn.init.ones_(self.D)
            nn.init.ones_(self.norm.weight)
            nn.init.kaiming_uniform_(self.in_proj.weight, a=math.sqrt(5), generator=generator)
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5), generator=generator)
            self.out_proj.weight.mul_(self.depth**-0.5)

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        c = self.config
        conv = torch.zeros((batch, c.conv_kernel, sum(c.conv_splits)), device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        ssm = torch.zeros((batch, c.heads, c.head_dim, c.state_size), device=device, dtype=wide)
        return Mamba2State(conv, ssm)

    def forward(self, x: Tensor, ctx: Context, state: Mamba2State | None = None) -> Tensor:
        c = self.config
        z, xbc, dt = self.in_proj(x).split((c.inner, sum(c.splits[1:4]), c.heads), -1)
        if c.kv_heads and c.repeat_before_conv:
            xs, b, cs = xbc.split(c.splits[1:4], -1)
            xbc = torch.cat((self._repeat(xs, c.head_dim), self._repeat(b, c.state_size), cs), -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*c.dt_limit)
        if ctx.valid is not None:  # padding neither enters the convolution nor touches the state
            xbc = xbc * ctx.valid[..., None]
            dt = dt * ctx.valid[..., None]
            if state is not None and ctx.start:
                xbc = self._close_gap(xbc, ctx.valid, state)
        a = dt * -torch.exp(self.A_log.to(wide))
        if state is not None and x.shape[1] == 1:
            y = self._step(xbc, dt, a, state)
        else:
            y = self._scan(xbc, dt, a, ctx, state)
        return self.out_proj(self.norm(y, z))

    def _repeat(self, t: Tensor, width: int) -> Tensor:
        """Each of the kv_heads parts of the channels [..., kv_heads * width] heads / kv_heads times."""
        kv_heads = self.config.kv_heads or 1
        parts = t.unflatten(-1, (kv_heads, width))
        return parts.repeat_interleave(self.config.heads // kv_heads, -2).flatten(-2)

    def _close_gap(self, xbc: Tensor, valid: Tensor, state: Mamba2State) -> Tensor:
        """Move the left padding of xbc [B, T, C] before the carried inputs, which then meet the new ones."""
        taps = state.conv.shape[1]
        line = torch.cat((state.conv, xbc), 1)
        gap = (~valid).sum(1, keepdim=True)
        at = torch.arange(line.shape[1], device=line.device)
        source = torch.where(at < taps + gap, at - gap, at)[..., None]
        moved = line.gather(1, source.clamp(min=0).expand_as(line)) * (source >= 0)
        state.conv = moved[:, :taps].clone()
        return moved[:, taps:]

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels after the convolution -> x [..., H, P], B [..., GB, N], C [..., G, N]."""
        c = self.config
        xs, b, cs = xbc.split(c.conv_splits, -1)
        xs = xs.unflatten(-1, (-1, c.head_dim))
        if xs.shape[-2] != c.heads:
            xs = xs.repeat_interleave(c.heads // xs.shape[-2], -2)
        return xs, b.unflatten(-1, (-1, c.state_size)), cs.unflatten(-1, (-1, c.state_size))

    def _scan(self, xbc: Tensor, dt: Tensor, a: Tensor, ctx: Context, state: Mamba2State | None) -> Tensor:
        past = None if state is None else state.conv
        if state is not None:
            state.conv = causal_conv1d_state(xbc, self.config.conv_kernel, past)
        xbc = causal_conv1d(xbc, self.conv1d.weight, self.conv1d.bias, "silu", past, ctx.seq_idx)
        xs, b, cs = self._split(xbc)
        start = None if state is None else state.ssm
        y, end = ssd((xs * dt[..., None]).to(xs.dtype), a, b, cs, state=start, seq_idx=ctx.seq_idx)
        if state is not None:
            state.ssm = end.contiguous()
        return torch.addcmul(y, xs, self.D[:, None].to(y.dtype)).flatten(2)

    def _step(self, xbc: Tensor, dt: Tensor, a: Tensor, state: Mamba2State) -> Tensor:
        conv = causal_conv1d_step(xbc[:, 0], state.conv, self.conv1d.weight, self.conv1d.bias, "silu")
        xs, b, cs = self._split(conv)
        y = ssd_step(xs * dt[:, 0, :, None].to(xs.dtype), a[:, 0], b, cs, state.ssm)
        return torch.addcmul(y, xs, self.D[:, None].to(y.dtype)).flatten(1).unsqueeze(1)
