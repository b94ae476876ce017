"""transformers' GLM-4.5 layout (model_type "glm4_moe", 2508.06471), prediction modules as DeepSeek-V3's."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.deepseek_v3 import (
    COPIES,
    MTP,
    RULES,
    read_biased_moe,
    read_mtp,
    write_biased_moe,
    write_mtp,
)
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    QK_NORM,
    read_outer,
    read_partial_attention,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import first_moe, fused_rules
from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    norm = "head" if hf.get("use_qk_norm") else None
    mixer = {**read_partial_attention(hf, default=0.5), "o_bias": False, "qk_norm": norm}
    return {**read_outer(hf), "layers": read_biased_moe(hf, mixer), "mtp": read_mtp(hf)}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = first_moe(config)[0].mixer
    assert isinstance(mixer, AttentionConfig)
    hf = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **write_outer(config),
        **write_attention(mixer),
        "partial_rotary_factor": (mixer.rotary_dim or mixer.head_dim) / mixer.head_dim,
        "use_qk_norm": mixer.qk_norm == "head",
        **write_biased_moe(config),
        **write_mtp(config),
    }
    return {"config.json": hf}


FAMILY = Family(
    name="glm4_moe",
    read=_read,
    write=_write,
    rules=[*ATTENTION, *QK_NORM, *RULES, *MTP],
    aliases=fused_rules(),
    beyond="model.layers.{i}.eh_proj.weight",
    copies=COPIES,
)
