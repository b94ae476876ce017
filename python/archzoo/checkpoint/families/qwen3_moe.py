"""transformers' Qwen3-MoE layout (model_type "qwen3_moe", 2505.09388)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    MLP,
    OUTER,
    QK_NORM,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import expert_rules, first_moe, fused_rules
from archzoo.checkpoint.families.qwen2_moe import read_moe, write_moe
from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    mixer = {**read_attention(hf), "qk_norm": "head"}
    return {**read_outer(hf), "layers": read_moe(hf, mixer)}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = first_moe(config)[0].mixer
    assert isinstance(mixer, AttentionConfig)
    hf = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **write_outer(config),
        **write_attention(mixer),
        **write_moe(config),
    }
    return {"config.json": hf}


FAMILY = Family(
    name="qwen3_moe",
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *QK_NORM, *expert_rules(), *MLP],
    aliases=fused_rules(),
)
