"""DeepSeekMoE's layout (model_type "deepseek", 2401.06066)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.ffns.glu import SwiGLUConfig
from archzoo.blocks.ffns.moe import MoEConfig
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
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

EXPERTS = [
    Rule("layers.{i}.ffn.router.weight", "model.layers.{i}.mlp.gate.weight"),
    Rule(
        "layers.{i}.ffn.experts.gate_up",
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    ),
    Rule("layers.{i}.ffn.experts.down", "model.layers.{i}.mlp.experts.{e}.down_proj.weight"),
    *(
        Rule(
            f"layers.{{i}}.ffn.shared.{p}_proj.weight",
            f"model.layers.{{i}}.mlp.shared_experts.{p}_proj.weight",
        )
        for p in ("gate", "up", "down")
    ),
]


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    moe = {
        "kind": "moe",
        "experts": hf["n_routed_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["moe_intermediate_size"],
        "shared": hf.get("n_shared_experts") or 0,
        "score": hf.get("scoring_func", "softmax"),
        "renormalize": hf.get("norm_topk_prob", False),
        "scale": hf.get("routed_scaling_factor", 1.0),
    }
    count, first, every = hf["num_hidden_layers"], hf["first_k_dense_replace"], hf.get("moe_layer_freq", 1)
    dense = [i for i in range(count) if i < first or i % every]
    layers: dict[str, Any] = {"count": count, "default": {"mixer": read_attention(hf), "ffn": moe}}
    if dense:
        ffn = {"kind": "swiglu", "hidden": hf["intermediate_size"]}
        layers["override"] = [{"indices": dense, "ffn": ffn}]
    return {**read_outer(hf), "layers": layers}


def _write(config: ModelConfig) -> dict[str, Any]:
    specs = config.specs
    first = next(i for i, s in enumerate(specs) if isinstance(s.ffn, MoEConfig))
    mixer, moe = specs[first].mixer, specs[first].ffn
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(moe, MoEConfig)
    dense = specs[0].ffn
    hf = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        **write_outer(config),
        **write_attention(mixer),
        "intermediate_size": dense.hidden if isinstance(dense, SwiGLUConfig) else 4 * moe.hidden,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": moe.shared,
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        "scoring_func": moe.score,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": moe.scale,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="deepseek",
    claims=lambda files: files["config.json"].get("model_type") == "deepseek",
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *EXPERTS, *MLP],
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
)
