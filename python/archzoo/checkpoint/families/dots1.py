"""transformers' dots.llm1 layout (model_type "dots1", 2506.05767)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.deepseek_v3 import RULES, read_biased_moe, write_biased_moe
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    QK_NORM,
    expect,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import first_moe, fused_rules
from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    count = hf["num_hidden_layers"]
    expect(hf, layer_types=["full_attention"] * count)
    mixer = {**read_attention(hf), "qk_norm": "head"}
    return {**read_outer(hf), "layers": read_biased_moe(hf, mixer)}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = first_moe(config)[0].mixer
    assert isinstance(mixer, AttentionConfig)
    hf = {
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        **write_outer(config),
        **write_attention(mixer),
        **write_biased_moe(config),
        "sliding_window": None,
        "layer_types": ["full_attention"] * config.layers.count,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="dots1",
    read=_read,
    write=_write,
    rules=[*ATTENTION, *QK_NORM, *RULES],
    aliases=fused_rules(),
)
