"""transformers' Mixtral layout (model_type "mixtral", 2401.04088)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    expect,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import expert_rules, first_moe, fused_rules, layers
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

ALIASES = [
    *fused_rules(),
    Rule("layers.{i}.ffn.router.weight", "model.layers.{i}.mlp.gate.weight"),
]
EXPERTS = expert_rules("block_sparse_moe", ("w1", "w3", "w2"))


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, attention_bias=False)
    mixer = {**read_attention(hf), "window": hf.get("sliding_window")}
    moe = {
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "renormalize": True,
    }
    return {**read_outer(hf), "layers": layers(hf["num_hidden_layers"], mixer, moe)}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    hf = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **write_outer(config),
        **write_attention(spec.mixer),
        "sliding_window": spec.mixer.window,
        "intermediate_size": moe.hidden,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="mixtral",
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *EXPERTS],
    aliases=ALIASES,
)
