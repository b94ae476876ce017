"""Model configurations: typed, frozen, read from TOML; a model is a list of layer specs."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from archzoo.blocks.depth.every import EveryTokenConfig
from archzoo.blocks.registry import DepthConfig, FfnConfig, MixerConfig, kinds
from archzoo.blocks.residual import ResidualConfig
from archzoo.errors import ConfigError

if TYPE_CHECKING:
    AnyMixer = MixerConfig
    AnyFfn = FfnConfig
    AnyDepth = DepthConfig
else:

    def _union(base):
        found = tuple(kinds(base).values())
        return found[0] if len(found) == 1 else Annotated[Union[found], Field(discriminator="kind")]  # noqa: UP007

    AnyMixer, AnyFfn, AnyDepth = _union(MixerConfig), _union(FfnConfig), _union(DepthConfig)

_KINDS = {kind for base in (MixerConfig, FfnConfig, DepthConfig) for kind in kinds(base)}


class LayerSpec(BaseModel):
    """One layer: norm scheme x token mixer x feed-forward x depth policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    mixer: AnyMixer
    ffn: AnyFfn | None = None
    residual: ResidualConfig = ResidualConfig()
    depth: AnyDepth = EveryTokenConfig()

    def params(self, hidden_size: int) -> int:
        """Parameters of the layer, its norms included."""
        ffn = 0 if self.ffn is None else self.ffn.params(hidden_size) + hidden_size
        return self.mixer.params(hidden_size) + hidden_size + ffn + self.depth.params(hidden_size)

    def active_params(self, hidden_size: int) -> int:
        """Parameters that one token uses (a layer that the depth policy may skip counts whole)."""
        idle = 0 if self.ffn is None else self.ffn.params(hidden_size) - self.ffn.active_params(hidden_size)
        return self.params(hidden_size) - idle


class LayerOverride(BaseModel):
    """Layers that differ from the default; a table with `kind` replaces a block, one without changes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    indices: tuple[int, ...]
    mixer: dict[str, Any] | None = None
    ffn: dict[str, Any] | None = None
    residual: dict[str, Any] | None = None
    depth: dict[str, Any] | None = None


class LayerPattern(BaseModel):
    """`count` layers like `default`, except where an override says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: PositiveInt
    default: LayerSpec
    override: tuple[LayerOverride, ...] = ()

    @cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """One spec per layer."""
        out = [self.default] * self.count
        for number, item in enumerate(self.override):
            changed = self._merged(number, item)
            for index in item.indices:
                if not 0 <= index < self.count:
                    raise ConfigError(
                        f"layers.override: index {index} is out of range for {self.count} layers"
                    )
                out[index] = changed
        return tuple(out)

    def _merged(self, number: int, item: LayerOverride) -> LayerSpec:
        spec = self.default.model_dump()
        for slot in ("mixer", "ffn", "residual", "depth"):
            table = getattr(item, slot)
            if table is None:
                continue
            old = spec[slot]
            spec[slot] = table if "kind" in table or old is None else _merge(old, table)
        try:
            return LayerSpec.model_validate(spec)
        except ValidationError as error:
            raise ConfigError(_explain(error, f"layers.override.{number}")) from None


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for key, value in new.items():
        deeper = isinstance(value, dict) and isinstance(old.get(key), dict)
        out[key] = _merge(old[key], value) if deeper else value
    return out


class MTPConfig(BaseModel):
    """`depth` modules that predict further tokens (2412.19437); training adds weight * their mean CE."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    depth: PositiveInt = 1
    weight: NonNegativeFloat = 0.3


class ModelConfig(BaseModel):
    """A causal language model. `family` names the Hugging Face layout that `save` writes.

    Granite multiplies the embeddings by `embed_scale` and divides the logits by `logits_divisor`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "unnamed"
    family: str = "archzoo"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    max_positions: PositiveInt
    tie_embeddings: bool = False
    norm_eps: PositiveFloat = 1e-5
    embed_scale: PositiveFloat = 1.0
    logits_divisor: PositiveFloat = 1.0
    init_std: PositiveFloat = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    layers: LayerPattern
    mtp: MTPConfig | None = None
    source: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, spec in enumerate(self.layers.specs):
            for block in (spec.mixer, spec.ffn, spec.depth):
                if block is None:
                    continue
                try:
                    block.check(self.hidden_size)
                except ConfigError as error:
                    raise ConfigError(f"layer {index}: {error}") from None
            if spec.depth.kind == "mod" and spec.mixer.state_bytes(self.hidden_size, 2):
                raise ConfigError(
                    f"layer {index}: Mixture-of-Depths needs a mixer without a recurrent state, "
                    f"found '{spec.mixer.kind}'"
                )
        return self

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec per layer."""
        return self.layers.specs

    @property
    def mtp_params(self) -> int:
        """Parameters of the MTP modules: each a layer like the last, three norms and a projection."""
        d = self.hidden_size
        return 0 if self.mtp is None else self.mtp.depth * (self.specs[-1].params(d) + 3 * d + 2 * d * d)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config") -> ModelConfig:
        """Validate `data`; a ConfigError names `where`, the key and what was allowed."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> ModelConfig:
        """Read one TOML file; its stem is the model's name."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        return cls.from_dict({"name": path.stem, **data}, str(path))

    def override(self, *assignments: str) -> ModelConfig:
        """A new config with `dotted.key=value` changes; values are TOML ("layers.count=8").

        Indices address list items ("layers.override.0.indices=[0, 4]"); a layer table that the default
        inherits may be changed key by key ("layers.default.mixer.heads=4"), an optional table that is not
        there is made ("mtp.depth=1").
        """
        data = self.model_dump()
        for text in assignments:
            key, eq, raw = text.partition("=")
            if not eq:
                raise ConfigError(f"override '{text}': expected key=value")
            try:
                value = tomllib.loads(f"v = {raw}")["v"]
            except tomllib.TOMLDecodeError:
                value = raw
            _assign(data, key.strip(), value)
        return self.from_dict(data, "override")

    def tiny(self) -> ModelConfig:
        """The same structure with small dimensions: hidden size 64, vocabulary 256, at most 4 layers.

        Layers are picked so that every distinct one stays. For tests and dry runs.
        """
        specs = self.specs
        distinct = sorted({specs.index(spec) for spec in specs})
        picked = distinct[:4] if len(distinct) > 1 else [0, 0]
        tiny = [_tiny_layer(specs[i]).model_dump() for i in picked]
        data = self.model_dump(exclude={"layers"}) | {"vocab_size": 256, "hidden_size": 64}
        data |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        data["layers"] = {
            "count": len(tiny),
            "default": tiny[0],
            "override": [{"indices": (i,), **layer} for i, layer in enumerate(tiny) if layer != tiny[0]],
        }
        data["max_positions"] = min(self.max_positions, 512)
        return self.from_dict(data, f"{self.name} (tiny)")


def _tiny_layer(spec: LayerSpec) -> LayerSpec:
    ffn = None if spec.ffn is None else spec.ffn.tiny()
    return spec.model_copy(update={"mixer": spec.mixer.tiny(), "ffn": ffn, "depth": spec.depth.tiny()})


def _assign(data: Any, key: str, value: Any) -> None:
    parts = key.split(".")
    node = data
    for i, part in enumerate(parts):
        here = ".".join(parts[: i + 1])
        index: Any = int(part) if isinstance(node, list | tuple) and part.isdigit() else part
        last = i == len(parts) - 1
        try:
            child = node[index]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"override: unknown key '{here}'") from None
        if last:
            node[index] = value
        elif child is None:
            node[index] = child = defaultdict(lambda: None)  # a table whose keys only validation knows
        elif isinstance(child, tuple):  # model_dump keeps tuples; lists can be assigned to
            node[index] = child = list(child)
        node = child


def _explain(error: ValidationError, where: str) -> str:
    """One line per fault: file, key, what is wrong, what was allowed."""
    lines = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        tags = ("mixer", "ffn", "depth")  # pydantic puts the kind of a block after its slot
        key = ".".join(p for i, p in enumerate(loc) if not (i and loc[i - 1] in tags and p in _KINDS))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif "input" in item and not isinstance(item["input"], dict | list | tuple):
            message += f", found {item['input']!r}"
        lines.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
    return "; ".join(lines)
