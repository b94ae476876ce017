"""What a conversion makes of each attention layer; every default follows from the source."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.blocks.mixers.mamba2 import Mamba2Config
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.blocks.rope import RopeConfig
from archzoo.errors import ConfigError, UnknownNameError

Target = Literal["mla", "mamba2", "zebra-llama"]  # of the mixers; "moe" changes the feed-forwards


class Conversion(BaseModel):
    """Settings of one conversion. A rank not given follows `energy`, else the ratios of Zebra-Llama 3B.

    layers: the MLA layers of "zebra-llama"; the others become Mamba-2. kv_rank, q_rank: latent widths (an
    eighth of one of K and V, half of Q). energy: a rank per layer, see `energy_rank`. nope_dim, rope_dim:
    rows of each head without and with RoPE (half of the head each).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: Target
    layers: tuple[int, ...] | None = None
    kv_rank: PositiveInt | None = None
    q_rank: PositiveInt | None = None
    nope_dim: PositiveInt | None = None
    rope_dim: PositiveInt | None = None
    energy: float | None = Field(default=None, gt=0, le=1)

    @classmethod
    def of(cls, target: str, **given: Any) -> Self:
        """Validated settings; errors name the setting and what was found."""
        if target not in get_args(Target):
            raise UnknownNameError("conversion target", target, (*get_args(Target), "moe"))
        try:
            return cls.model_validate({"target": target, **given})
        except ValidationError as error:
            raise ConfigError(fault(error)) from None

    def mla_layers(self, count: int) -> tuple[int, ...]:
        """Which of `count` layers become MLA, ascending."""
        if self.target != "zebra-llama":
            if self.layers is not None:
                raise ConfigError(f"convert: '{self.target}' changes every layer and takes no `layers`")
            return tuple(range(count)) if self.target == "mla" else ()
        if self.layers is None:
            raise ConfigError(
                "convert: 'zebra-llama' needs `layers`, the indices of its MLA layers; "
                "archzoo.conversion.smart picks them from scores"
            )
        return layer_indices(self.layers, count)

    def mla(self, source: AttentionConfig, hidden_size: int, q_rank: int = 0, kv_rank: int = 0) -> MLAConfig:
        """The MLA that replaces `source`; q_rank and kv_rank are those that `energy` found."""
        heads, kv_heads, head_dim = source.heads, source.kv_heads, source.head_dim
        if source.rope is None:
            raise ConfigError("convert: MLA needs a source with RoPE, found attention without it")
        rope_dim = self.rope_dim or (head_dim - self.nope_dim if self.nope_dim else head_dim // 4 * 2)
        nope_dim = self.nope_dim or head_dim - rope_dim
        if min(nope_dim, rope_dim) < 1 or nope_dim + rope_dim > head_dim:
            raise ConfigError(
                f"convert: nope_dim ({nope_dim}) and rope_dim ({rope_dim}) must share {head_dim} rows a head"
            )
        q_limit = min(hidden_size, heads * (nope_dim + rope_dim))
        kv_limit = min(hidden_size, kv_heads * (nope_dim + head_dim))
        for name, rank, limit in (("q_rank", self.q_rank, q_limit), ("kv_rank", self.kv_rank, kv_limit)):
            if rank is not None and rank > limit:
                raise ConfigError(f"convert: {name} must be at most {limit} for this model, found {rank}")
        config = MLAConfig(
            heads=heads,
            kv_heads=kv_heads,
            q_rank=self.q_rank or min(q_rank or round_up(heads * head_dim // 2), q_limit),
            kv_rank=self.kv_rank or min(kv_rank or round_up(kv_heads * head_dim // 8), kv_limit),
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=head_dim,
            latent_norm=False,
            rope=_rope(source.rope),
        )
        config.check(hidden_size)
        return config

    def mamba2(self, source: AttentionConfig) -> Mamba2Config:
        """The Mamba-2 that replaces `source`: one group and one state of head_dim² per query head."""
        return Mamba2Config(
            heads=source.heads,
            head_dim=source.head_dim,
            state_size=source.head_dim,
            groups=source.heads,
            kv_heads=source.kv_heads,
        )


def fault(error: ValidationError) -> str:
    """The first thing that is wrong with the settings."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"convert: {where}: {first['msg']}, found {first['input']!r}"


def layer_indices(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`layers` ascending; ConfigError unless they are distinct layers of `count`."""
    if len(set(layers)) < len(layers) or not all(0 <= i < count for i in layers):
        raise ConfigError(f"layers must be distinct indices from 0 to {count - 1}, found {list(layers)}")
    return tuple(sorted(layers))


def round_up(rank: int) -> int:
    """The next multiple of 8."""
    return -(-rank // 8) * 8


def _rope(source: RopeConfig) -> RopeConfig:
    """The source's RoPE in DeepSeek's pairing; Llama 3's scaling becomes YaRN's (2505.17272)."""
    if source.kind != "llama3":
        return source.model_copy(update={"interleaved": True})
    return RopeConfig(
        kind="yarn",
        theta=source.theta,
        interleaved=True,
        factor=source.factor,
        original_max_positions=source.original_max_positions,
    )
