"""transformers' Granite-MoE layout (model_type "granitemoe"): experts stacked, four multipliers."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import first_moe, fused_rules, layers
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

_BLOCK = "model.layers.{i}.block_sparse_moe"


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    mixer = {**read_attention(hf), "scale": hf.get("attention_multiplier", 1.0)}
    moe = {
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "score": "softmax_topk",
    }
    pattern = layers(hf["num_hidden_layers"], mixer, moe)
    pattern["default"]["residual"] = {"scale": hf.get("residual_multiplier", 1.0)}
    return {
        **read_outer(hf),
        "embed_scale": hf.get("embedding_multiplier", 1.0),
        "logits_divisor": hf.get("logits_scaling", 1.0),
        "layers": pattern,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    hf = {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **write_outer(config),
        **write_attention(spec.mixer),
        "attention_multiplier": spec.mixer.scale or spec.mixer.head_dim**-0.5,
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": spec.residual.scale,
        "logits_scaling": config.logits_divisor,
        "intermediate_size": moe.hidden,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="granitemoe",
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *ATTENTION,
        Rule("layers.{i}.ffn.router.weight", f"{_BLOCK}.router.layer.weight"),
        Rule("layers.{i}.ffn.experts.gate_up", f"{_BLOCK}.input_linear.weight"),
        Rule("layers.{i}.ffn.experts.down", f"{_BLOCK}.output_linear.weight"),
    ],
    aliases=[
        *fused_rules("block_sparse_moe"),
        Rule("layers.{i}.ffn.router.weight", f"{_BLOCK}.router.weight"),
    ],
)
