"""transformers' MiniMax-M2 layout (model_type "minimax_m2")."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    QK_NORM,
    expect,
    read_outer,
    read_partial_attention,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.mixtral import ALIASES, EXPERTS
from archzoo.checkpoint.families.moe import first_moe, layers
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, attention_bias=False, use_qk_norm=True, qk_norm_type="per_layer", scoring_func="sigmoid")
    expect(hf, use_routing_bias=True, shared_intermediate_size=0)
    mixer = {**read_partial_attention(hf), "qk_norm": "full"}
    moe = {
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "score": "sigmoid",
        "selection_bias": True,
        "renormalize": True,
    }
    return {**read_outer(hf), "layers": layers(hf["num_hidden_layers"], mixer, moe)}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    hf = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        **write_outer(config),
        **write_attention(spec.mixer),
        "rotary_dim": spec.mixer.rotary_dim or spec.mixer.head_dim,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "intermediate_size": moe.hidden,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="minimax_m2",
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *ATTENTION,
        *QK_NORM,
        *EXPERTS,
        Rule("layers.{i}.ffn.selection_bias", "model.layers.{i}.block_sparse_moe.e_score_correction_bias"),
    ],
    aliases=[
        *ALIASES,
        Rule("layers.{i}.ffn.selection_bias", "model.layers.{i}.mlp.e_score_correction_bias"),
    ],
)
