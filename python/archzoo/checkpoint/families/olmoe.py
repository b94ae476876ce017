"""transformers' OLMoE layout (model_type "olmoe", 2409.02060)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    QK_NORM,
    expect,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import expert_rules, first_moe, fused_rules, layers
from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, head_dim=hf["hidden_size"] // hf["num_attention_heads"])
    mixer = {**read_attention(hf), "qk_norm": "full", "clip": hf.get("clip_qkv")}
    moe = {
        "experts": hf["num_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "renormalize": hf.get("norm_topk_prob", False),
    }
    return {**read_outer(hf), "layers": layers(hf["num_hidden_layers"], mixer, moe)}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    hf = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **write_outer(config),
        **write_attention(spec.mixer),
        "clip_qkv": spec.mixer.clip,
        "intermediate_size": moe.hidden,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalize,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="olmoe",
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *QK_NORM, *expert_rules()],
    aliases=fused_rules(),
)
