"""transformers' Qwen2-MoE layout (model_type "qwen2_moe")."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    MLP,
    OUTER,
    expect,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import (
    dense_layers,
    expert_rules,
    first_moe,
    fused_rules,
    layers,
    shared_rules,
)
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig


def read_moe(hf: dict[str, Any], mixer: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Layers of a Qwen-MoE config.json; `extra` are more MoEConfig fields."""
    expect(hf, use_sliding_window=False)
    moe = {
        "experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["moe_intermediate_size"],
        "renormalize": hf.get("norm_topk_prob", False),
        **extra,
    }
    count, step, only = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers")
    dense = [i for i in range(count) if i in (only or ()) or (i + 1) % step]
    return layers(count, mixer, moe, dense, hf["intermediate_size"])


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The inverse of read_moe."""
    _, moe = first_moe(config)
    dense, hidden = dense_layers(config, moe.hidden * moe.top_k)
    return {
        "intermediate_size": hidden,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": False,
    }


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    mixer = {**read_attention(hf), "qkv_bias": hf.get("qkv_bias", True), "o_bias": False}
    width = hf["shared_expert_intermediate_size"]
    return {**read_outer(hf), "layers": read_moe(hf, mixer, shared=1, shared_hidden=width, shared_gate=True)}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    hf = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **write_outer(config),
        **write_attention(spec.mixer),
        **write_moe(config),
        "qkv_bias": spec.mixer.qkv_bias,
        "shared_expert_intermediate_size": moe.shared_width,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="qwen2_moe",
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *ATTENTION,
        *expert_rules(),
        *shared_rules("mlp.shared_expert"),
        Rule("layers.{i}.ffn.shared_gate.weight", "model.layers.{i}.mlp.shared_expert_gate.weight"),
        *MLP,
    ],
    aliases=fused_rules(),
)
