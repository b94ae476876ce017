"""transformers' gpt-oss layout (model_type "gpt_oss"): experts stacked, transposed, gate and up in turns."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    expect,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
)
from archzoo.checkpoint.families.moe import first_moe, layers
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig
from archzoo.ops.experts import ALPHA, LIMIT

_BLOCK = "model.layers.{i}.mlp"


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    expect(hf, swiglu_alpha=ALPHA, swiglu_limit=LIMIT)
    count = hf["num_hidden_layers"]
    mixer = read_attention({"attention_bias": True, **hf}) | {"sinks": True}
    moe = {
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "activation": "clamped_swiglu",
        "bias": True,
        "router_bias": True,
        "score": "softmax_topk",
    }
    pattern = layers(count, mixer, moe)
    types = hf.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(count)]
    local = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    pattern["override"] = [{"indices": local, "mixer": {"window": hf["sliding_window"]}}]
    return {**read_outer(hf), "layers": pattern}


def _write(config: ModelConfig) -> dict[str, Any]:
    spec, moe = first_moe(config)
    assert isinstance(spec.mixer, AttentionConfig)
    windows = [getattr(s.mixer, "window", None) for s in config.specs]
    outer = write_attention(spec.mixer)
    if outer["rope_scaling"] is None:  # the class would take YaRN
        outer["rope_scaling"] = {"rope_type": "default"}
    hf = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **write_outer(config),
        **outer,
        "sliding_window": next((w for w in windows if w), None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "intermediate_size": moe.hidden,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="gpt_oss",
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *ATTENTION,
        Rule("layers.{i}.mixer.sinks", "model.layers.{i}.self_attn.sinks"),
        Rule("layers.{i}.ffn.router.weight", f"{_BLOCK}.router.weight"),
        Rule("layers.{i}.ffn.router.bias", f"{_BLOCK}.router.bias"),
        Rule(
            "layers.{i}.ffn.experts.gate_up",
            f"{_BLOCK}.experts.gate_up_proj",
            transpose=True,
            interleave=True,
        ),
        Rule("layers.{i}.ffn.experts.gate_up_bias", f"{_BLOCK}.experts.gate_up_proj_bias", interleave=True),
        Rule("layers.{i}.ffn.experts.down", f"{_BLOCK}.experts.down_proj", transpose=True),
        Rule("layers.{i}.ffn.experts.down_bias", f"{_BLOCK}.experts.down_proj_bias"),
    ],
)
