"""transformers' DeepSeek-V3 layout, also of Kimi-K2 (2412.19437). Prediction modules behind are left out."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.checkpoint.families.deepseek import EXPERTS, read_moe, write_moe
from archzoo.checkpoint.families.deepseek_v2 import MLA, PLAIN, read_mla, write_mla
from archzoo.checkpoint.families.llama import MLP, OUTER, expect, read_outer, write_outer
from archzoo.checkpoint.families.moe import first_moe, fused_rules
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
RULES = [
    *OUTER,
    *EXPERTS,
    Rule("layers.{i}.ffn.selection_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *MLP,
]


def read_biased_moe(hf: dict[str, Any], mixer: dict[str, Any]) -> dict[str, Any]:
    """Layers whose experts are chosen by sigmoid and a bias, in groups."""
    expect(hf, **ROUTER)
    return read_moe(
        hf,
        mixer,
        score="sigmoid",
        selection_bias=True,
        groups=hf["n_group"],
        top_groups=hf["topk_group"],
        renormalize=hf["norm_topk_prob"],
    )


def write_biased_moe(config: ModelConfig) -> dict[str, Any]:
    """The inverse of read_biased_moe."""
    _, moe = first_moe(config)
    return {**write_moe(config), **ROUTER, "n_group": moe.groups, "topk_group": moe.top_groups}


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, **PLAIN)
    mixer = read_mla(hf, hf.get("rope_interleave", True))
    return {**read_outer(hf), "layers": read_biased_moe(hf, mixer)}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = first_moe(config)[0].mixer
    assert isinstance(mixer, MLAConfig)
    hf = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **write_outer(config),
        **write_mla(mixer),
        **write_biased_moe(config),
        "rope_interleave": mixer.rope.interleaved,
        "num_nextn_predict_layers": 0,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="deepseek_v3",
    claims=lambda files: files["config.json"].get("model_type") in ("deepseek_v3", "kimi_k2"),
    read=_read,
    write=_write,
    rules=[*MLA, *RULES],
    aliases=fused_rules(),
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
    beyond="model.layers.{i}.eh_proj.weight",
)
