"""transformers' DeepSeek-V2 layout (model_type "deepseek_v2", 2405.04434)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.checkpoint.families.deepseek import EXPERTS, read_moe, write_moe
from archzoo.checkpoint.families.llama import (
    MLP,
    OUTER,
    expect,
    read_outer,
    read_rope,
    write_outer,
    write_rope,
)
from archzoo.checkpoint.families.moe import first_moe, fused_rules
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

_NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}
MLA = [
    Rule(f"layers.{{i}}.mixer.{ours}.weight", f"model.layers.{{i}}.self_attn.{theirs}.weight")
    for ours, theirs in _NAMES.items()
]
PLAIN = {"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}  # of V2 and V3


def read_mla(hf: dict[str, Any], interleaved: bool = True) -> dict[str, Any]:
    """MLAConfig data of a DeepSeek config.json."""
    heads = hf["num_attention_heads"]
    return {
        "kind": "mla",
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "q_rank": hf.get("q_lora_rank"),
        "kv_rank": hf["kv_lora_rank"],
        "nope_dim": hf["qk_nope_head_dim"],
        "rope_dim": hf["qk_rope_head_dim"],
        "v_dim": hf["v_head_dim"],
        "rope": read_rope(hf, interleaved=interleaved),
    }


def write_mla(mixer: MLAConfig) -> dict[str, Any]:
    """The inverse of read_mla."""
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.v_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **write_rope(mixer.rope),
    }


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, **PLAIN, scoring_func="softmax", norm_topk_prob=False)
    router: dict[str, Any] = {}
    method = hf.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        router = {"groups": hf["n_group"], "top_groups": hf["topk_group"], "group_score": "max"}
    else:
        expect(hf, topk_method="greedy")
    return {**read_outer(hf), "layers": read_moe(hf, read_mla(hf), **router)}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, MLAConfig)
    hf = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **write_outer(config),
        **write_mla(spec.mixer),
        **write_moe(config),
        "topk_method": "group_limited_greedy" if moe.groups > 1 else "greedy",
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="deepseek_v2",
    read=_read,
    write=_write,
    rules=[*OUTER, *MLA, *EXPERTS, *MLP],
    aliases=fused_rules(),
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
)
