"""Step-3's layout (2507.19427): its text model, alone (step3_text) or inside the vision-language folder."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.mfa import MFAConfig
from archzoo.checkpoint.families.llama import (
    MLP,
    OUTER,
    expect,
    read_outer,
    read_rope,
    write_outer,
    write_rope,
)
from archzoo.checkpoint.families.moe import dense_layers, first_moe, layers, shared_rules
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

_LAYER = "model.layers.{i}"
_NAMES = {
    "q_a_proj": "q_proj",
    "q_a_norm": "inter_norm",
    "q_b_proj": "wq",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
}


def _text(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    return dict(hf["text_config"] if hf["model_type"] == "step3_vl" else hf)


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = _text(files)
    expect(hf, num_attention_groups=1)
    count, sparse = hf["num_hidden_layers"], hf["moe_layers_enum"]
    if isinstance(sparse, str):
        sparse = [int(i) for i in sparse.split(",")]
    mixer = {
        "kind": "mfa",
        "heads": hf["num_attention_heads"],
        "head_dim": hf["head_dim"],
        "q_rank": hf["share_q_dim"],
        "rope": read_rope(hf),
    }
    moe = {
        "experts": hf["moe_num_experts"],
        "top_k": hf["moe_top_k"],
        "hidden": hf["moe_intermediate_size"],
        "shared": 1,
        "shared_hidden": hf["share_expert_dim"]
        if hf["share_expert_dim"] != hf["moe_intermediate_size"]
        else None,
        "renormalize": hf.get("norm_expert_weight", False),
    }
    dense = [i for i in range(count) if i not in sparse]
    outer = read_outer({"max_position_embeddings": hf["max_position_embedding"], **hf})
    return {**outer, "layers": layers(count, mixer, moe, dense, hf["intermediate_size"])}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    mixer = spec.mixer
    assert isinstance(mixer, MFAConfig)
    dense, hidden = dense_layers(config, moe.hidden * moe.top_k)
    sparse = [str(i) for i in range(config.layers.count) if i not in dense]
    hf = {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        **write_outer(config),
        "max_position_embedding": config.max_positions,
        "num_attention_heads": mixer.heads,
        "num_attention_groups": 1,
        "head_dim": mixer.head_dim,
        "share_q_dim": mixer.q_rank,
        **write_rope(mixer.rope),
        "intermediate_size": hidden,
        "moe_layers_enum": ",".join(sparse),
        "moe_num_experts": moe.experts,
        "moe_top_k": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "share_expert_dim": moe.shared_width,
        "norm_expert_weight": moe.renormalize,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="step3",
    model_types=("step3_text", "step3_vl"),
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *(
            Rule(f"layers.{{i}}.mixer.{ours}.weight", f"{_LAYER}.self_attn.{theirs}.weight")
            for ours, theirs in _NAMES.items()
        ),
        Rule("layers.{i}.ffn.router.weight", f"{_LAYER}.moe.gate.weight"),
        Rule(
            "layers.{i}.ffn.experts.gate_up",
            f"{_LAYER}.moe.gate_proj.weight",
            f"{_LAYER}.moe.up_proj.weight",
            stacked=True,
        ),
        Rule("layers.{i}.ffn.experts.down", f"{_LAYER}.moe.down_proj.weight"),
        *shared_rules("share_expert"),
        *MLP,
    ],
    dropped=[r"vision_model\..*", r"vit_downsampler2?\..*", r"vit_large_projector\..*"],
)
