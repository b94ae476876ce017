"""What the mixture-of-experts layouts share: rules of the experts, and which layers are dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archzoo.blocks.ffns.glu import SwiGLUConfig
from archzoo.blocks.ffns.moe import MoEConfig
from archzoo.checkpoint.keymap import Rule
from archzoo.configuration import LayerSpec, ModelConfig


def expert_rules(
    block: str = "mlp", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Rule]:
    """Router and experts, one tensor per expert and projection; `names` of gate, up and down."""
    prefix = f"model.layers.{{i}}.{block}"
    gate, up, down = (f"{prefix}.experts.{{e}}.{name}.weight" for name in names)
    return [
        Rule("layers.{i}.ffn.router.weight", f"{prefix}.gate.weight"),
        Rule("layers.{i}.ffn.experts.gate_up", gate, up),
        Rule("layers.{i}.ffn.experts.down", down),
    ]


def fused_rules(block: str = "mlp") -> list[Rule]:
    """Experts as the modules of transformers 5 hold them, which it writes when asked to."""
    return [
        Rule("layers.{i}.ffn.experts.gate_up", f"model.layers.{{i}}.{block}.experts.gate_up_proj"),
        Rule("layers.{i}.ffn.experts.down", f"model.layers.{{i}}.{block}.experts.down_proj"),
    ]


def shared_rules(name: str) -> list[Rule]:
    """The always-on expert."""
    return [
        Rule(f"layers.{{i}}.ffn.shared.{p}_proj.weight", f"model.layers.{{i}}.{name}.{p}_proj.weight")
        for p in ("gate", "up", "down")
    ]


def layers(
    count: int, mixer: dict[str, Any], moe: dict[str, Any], dense: Sequence[int] = (), hidden: int = 0
) -> dict[str, Any]:
    """LayerPattern data: `moe` in every layer but the `dense` ones, which have a SwiGLU of width `hidden`."""
    data: dict[str, Any] = {"count": count, "default": {"mixer": mixer, "ffn": {"kind": "moe", **moe}}}
    if dense:
        data["override"] = [{"indices": list(dense), "ffn": {"kind": "swiglu", "hidden": hidden}}]
    return data


def first_moe(config: ModelConfig) -> tuple[LayerSpec, MoEConfig]:
    """The first mixture-of-experts layer."""
    return next((s, s.ffn) for s in config.specs if isinstance(s.ffn, MoEConfig))


def dense_layers(config: ModelConfig, default: int = 0) -> tuple[list[int], int]:
    """Indices of the layers that are not mixtures, and their width (`default` when there are none)."""
    dense = {i: s.ffn.hidden for i, s in enumerate(config.specs) if isinstance(s.ffn, SwiGLUConfig)}
    return list(dense), next(iter(dense.values()), default)
