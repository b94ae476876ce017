"""DeepSeekMoE's layout (model_type "deepseek", 2401.06066)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    MLP,
    OUTER,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import dense_layers, expert_rules, first_moe, layers, shared_rules
from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig

EXPERTS = [*expert_rules(), *shared_rules("mlp.shared_experts")]


def read_moe(hf: dict[str, Any], mixer: dict[str, Any], **router: Any) -> dict[str, Any]:
    """Layers of any DeepSeek config.json; `router` are the MoEConfig fields that its version fixes."""
    moe = {
        "experts": hf["n_routed_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["moe_intermediate_size"],
        "shared": hf.get("n_shared_experts") or 0,
        "scale": hf.get("routed_scaling_factor", 1.0),
        **router,
    }
    count, first, every = hf["num_hidden_layers"], hf["first_k_dense_replace"], hf.get("moe_layer_freq", 1)
    dense = [i for i in range(count) if i < first or i % every]
    return layers(count, mixer, moe, dense, hf["intermediate_size"])


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The inverse of read_moe."""
    _, moe = first_moe(config)
    dense, hidden = dense_layers(config, 4 * moe.hidden)
    return {
        "intermediate_size": hidden,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": moe.shared,
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
        "scoring_func": moe.score,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": moe.scale,
    }


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    score, renormalize = hf.get("scoring_func", "softmax"), hf.get("norm_topk_prob", False)
    pattern = read_moe(hf, read_attention(hf), score=score, renormalize=renormalize)
    return {**read_outer(hf), "layers": pattern}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = first_moe(config)[0].mixer
    assert isinstance(mixer, AttentionConfig)
    hf = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        **write_outer(config),
        **write_attention(mixer),
        **write_moe(config),
    }
    return {"config.json": hf}


FAMILY = Family(
    name="deepseek",
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *EXPERTS, *MLP],
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
)
