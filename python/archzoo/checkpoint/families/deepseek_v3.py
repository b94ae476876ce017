"""transformers' DeepSeek-V3 layout, also of Kimi-K2 (2412.19437), with its prediction modules behind."""

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
COPIES = ["model.layers.{i}.embed_tokens.weight", "model.layers.{i}.shared_head.head.weight"]
MTP = [
    Rule(f"layers.{{i}}.{ours}.weight", f"model.layers.{{i}}.{theirs}.weight")
    for ours, theirs in (
        ("enorm", "enorm"),
        ("hnorm", "hnorm"),
        ("eh_proj", "eh_proj"),
        ("norm", "shared_head.norm"),
    )
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


def read_mtp(hf: dict[str, Any]) -> dict[str, Any] | None:
    """MTPConfig data; the weight of its loss is not in the published files."""
    if not (depth := hf.get("num_nextn_predict_layers")):
        return None
    weight = hf.get("mtp_loss_weight")
    return {"depth": depth} if weight is None else {"depth": depth, "weight": weight}


def write_mtp(config: ModelConfig) -> dict[str, Any]:
    """The inverse of read_mtp."""
    if config.mtp is None:
        return {"num_nextn_predict_layers": 0}
    changed = config.mtp.model_dump(exclude_defaults=True)
    weight = {"mtp_loss_weight": changed["weight"]} if "weight" in changed else {}
    return {"num_nextn_predict_layers": config.mtp.depth, **weight}


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, **PLAIN)
    mixer = read_mla(hf, hf.get("rope_interleave", True))
    return {**read_outer(hf), "layers": read_biased_moe(hf, mixer), "mtp": read_mtp(hf)}


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
        **write_mtp(config),
    }
    return {"config.json": hf}


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    read=_read,
    write=_write,
    rules=[*MLA, *RULES, *MTP],
    aliases=fused_rules(),
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
    beyond="model.layers.{i}.eh_proj.weight",
    copies=COPIES,
)
