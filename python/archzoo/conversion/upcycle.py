"""Dense feed-forwards become mixtures of experts: whole copies (LLaVA-MoD) or segments (DeepSeekMoE)."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from archzoo.blocks.balance import Balance
from archzoo.blocks.ffns.glu import GLU, SwiGLUConfig
from archzoo.blocks.ffns.moe import MoEConfig
from archzoo.blocks.registry import FfnConfig
from archzoo.conversion.settings import fault, layer_indices
from archzoo.errors import ConfigError, InputError


class Upcycling(BaseModel):
    """`experts` copies of the dense feed-forward in each of `layers` (default 0, 2, 4 ...; 2408.15881).

    Each copy is cut into `segments` narrower experts (2401.06066); the first `shared` segments are always on
    and not copied. A token gets `top_k` routed experts (default: as many as two copies have) whose weights
    sum to segments - shared. So copies alone compute what the dense model does, and segments do when every
    routed expert is chosen with the same weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: tuple[int, ...] | None = None
    experts: PositiveInt = 4
    top_k: PositiveInt | None = None
    segments: PositiveInt = 1
    shared: NonNegativeInt = 0

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Validated settings; errors name the setting and what was found."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ConfigError(fault(error)) from None

    def moe_layers(self, count: int) -> tuple[int, ...]:
        """Which of `count` layers get experts, ascending."""
        return tuple(range(0, count, 2)) if self.layers is None else layer_indices(self.layers, count)

    def moe(self, source: FfnConfig | None, hidden_size: int) -> MoEConfig:
        """The mixture that replaces `source`."""
        if not isinstance(source, SwiGLUConfig) or source.bias:
            found = "no feed-forward" if source is None else f"'{source.kind}'"
            raise InputError(f"convert to 'moe' starts from SwiGLU without bias, found {found}")
        if source.hidden % self.segments:
            raise ConfigError(f"convert: segments ({self.segments}) must divide the width {source.hidden}")
        if self.shared >= self.segments > 1 or (self.shared and self.segments == 1):
            raise ConfigError(
                f"convert: shared ({self.shared}) must leave some of the {self.segments} segments routed"
            )
        routed = self.segments - self.shared
        config = MoEConfig(
            experts=self.experts * routed,
            top_k=self.top_k or min(2, self.experts) * routed,
            hidden=source.hidden // self.segments,
            shared=self.shared,
            renormalize=True,
            scale=routed,
            balance=Balance(switch=0.01),
        )
        config.check(hidden_size)
        return config


def to_moe(ffn: GLU, config: MoEConfig, init_std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of the mixture: expert e is segment e % (segments - shared) of those that are routed."""
    width, shared = config.hidden, config.shared_width
    gate, up, down = (layer.weight.detach() for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    segments = torch.cat((gate[shared:].unflatten(0, (-1, width)), up[shared:].unflatten(0, (-1, width))), 1)
    outputs = down[:, shared:].unflatten(1, (-1, width)).transpose(0, 1)
    copies = config.experts // len(segments)
    router = gate.new_empty(config.experts, gate.shape[1]).normal_(0.0, init_std, generator=generator)
    weights = {
        "router.weight": router,
        "experts.gate_up": segments.repeat(copies, 1, 1),
        "experts.down": outputs.repeat(copies, 1, 1),
    }
    if shared:
        weights["shared.gate_proj.weight"] = gate[:shared].clone()
        weights["shared.up_proj.weight"] = up[:shared].clone()
        weights["shared.down_proj.weight"] = down[:, :shared].clone()
    return weights
