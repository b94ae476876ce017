"""transformers' Llama 4 text layout: RoPE layers in chunks, NoPE in between.

The published folders hold it inside a vision-language model; that is read too, without the vision part.
"""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.attention import AttentionConfig, Temperature
from archzoo.blocks.rope import RopeConfig
from archzoo.checkpoint.families.llama import (
    ATTENTION,
    OUTER,
    read_attention,
    read_outer,
    write_attention,
    write_outer,
    write_rope,
)
from archzoo.checkpoint.families.moe import dense_layers, first_moe, layers, shared_rules
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig

_BLOCK = "model.layers.{i}.feed_forward"


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    hf = hf["text_config"] if hf["model_type"] == "llama4" else hf
    count = hf["num_hidden_layers"]
    turned = hf.get("no_rope_layers") or [
        int((i + 1) % hf.get("no_rope_layer_interval", 4) != 0) for i in range(count)
    ]
    types = hf.get("layer_types") or ["chunked_attention" if r else "full_attention" for r in turned]
    step = hf.get("interleave_moe_layer_step", 1)
    sparse = hf.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    mixer = read_attention(hf)
    rope, mixer["rope"] = {**mixer["rope"], "interleaved": True}, None
    moe = {
        "experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "hidden": hf["intermediate_size"],
        "shared": 1,
        "score": "sigmoid",
        "scale_input": True,
    }
    dense = {"kind": "swiglu", "hidden": hf["intermediate_size_mlp"]}
    pattern = layers(count, mixer, moe)
    pattern["override"] = [
        {
            "indices": [i],
            "mixer": _own(hf, rope if turned[i] else None, types[i] == "chunked_attention"),
            **({} if i in sparse else {"ffn": dense}),
        }
        for i in range(count)
    ]
    return {**read_outer(hf), "layers": pattern}


def _own(hf: dict[str, Any], rope: dict[str, Any] | None, chunked: bool) -> dict[str, Any]:
    """What a layer's attention does not share with every other."""
    own: dict[str, Any] = {"rope": rope, "chunk": hf.get("attention_chunk_size", 8192) if chunked else None}
    if rope is not None:
        own["qk_norm"] = "l2" if hf.get("use_qk_norm", True) else None
    elif hf.get("attn_temperature_tuning", True):
        own["temperature"] = {"scale": hf.get("attn_scale", 0.1), "floor": hf.get("floor_scale", 8192)}
    return own


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [s.mixer for s in config.specs if isinstance(s.mixer, AttentionConfig)]
    _, moe = first_moe(config)
    dense, hidden = dense_layers(config, 2 * moe.hidden)
    tuned = next((m.temperature for m in mixers if m.temperature), None)
    rope = next((m.rope for m in mixers if m.rope), RopeConfig())
    hf = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **write_outer(config),
        **write_attention(mixers[0]),
        **write_rope(rope),
        "no_rope_layers": [int(m.rope is not None) for m in mixers],
        "layer_types": ["chunked_attention" if m.chunk else "full_attention" for m in mixers],
        "attention_chunk_size": next((m.chunk for m in mixers if m.chunk), None),
        "use_qk_norm": any(m.qk_norm for m in mixers),
        "attn_temperature_tuning": tuned is not None,
        "attn_scale": (tuned or Temperature()).scale,
        "floor_scale": (tuned or Temperature()).floor,
        "intermediate_size": moe.hidden,
        "intermediate_size_mlp": hidden,
        "moe_layers": [i for i in range(len(mixers)) if i not in dense],
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }
    return {"config.json": hf}


RULES = [
    *OUTER,
    Rule("lm_head.weight", "lm_head.weight"),
    *ATTENTION,
    Rule("layers.{i}.ffn.router.weight", f"{_BLOCK}.router.weight"),
    Rule("layers.{i}.ffn.experts.gate_up", f"{_BLOCK}.experts.gate_up_proj", transpose=True),
    Rule("layers.{i}.ffn.experts.down", f"{_BLOCK}.experts.down_proj", transpose=True),
    *shared_rules("feed_forward.shared_expert"),
    *(Rule(f"layers.{{i}}.ffn.{p}_proj.weight", f"{_BLOCK}.{p}_proj.weight") for p in ("gate", "up", "down")),
]

FAMILY = Family(
    name="llama4",
    model_types=("llama4_text", "llama4"),
    read=_read,
    write=_write,
    rules=RULES,
    aliases=[
        Rule(rule.native, *(f"language_model.{p}" for p in rule.parts), transpose=rule.transpose)
        for rule in RULES
    ],
    dropped=[r"vision_model\..*", r"multi_modal_projector\..*"],
)
