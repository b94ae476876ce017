"""The published Zebra-Llama and X-EcoMLA layout: Llama's config.json plus hybrid_config.json (2505.17272)."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.ffns.glu import SwiGLUConfig
from archzoo.blocks.mixers.mamba2 import Mamba2Config
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.checkpoint.families.llama import MLP, OUTER, read_outer, read_rope, write_outer, write_rope
from archzoo.checkpoint.families.mamba2 import mixer_rules
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf, hybrid = files["config.json"], files["hybrid_config.json"]
    mla_layers, count = hybrid["mla_layers"], hybrid["n_layer"]
    ffn = {"kind": "swiglu", "hidden": hybrid["intermediate_size"]}
    mixer = _mla(hybrid) if len(mla_layers) == count else _mamba2(hybrid)
    layers: dict[str, Any] = {"count": count, "default": {"mixer": mixer, "ffn": ffn}}
    if 0 < len(mla_layers) < count:
        layers["override"] = [{"indices": mla_layers, "mixer": _mla(hybrid)}]
    return {**read_outer(hf), "layers": layers}


def _mla(hybrid: dict[str, Any]) -> dict[str, Any]:
    heads = hybrid["num_attention_heads"]
    return {
        "kind": "mla",
        "heads": heads,
        "kv_heads": heads if hybrid.get("use_full_kv_head") else hybrid["num_key_value_heads"],
        "q_rank": hybrid.get("q_lora_rank"),
        "kv_rank": hybrid["kv_lora_rank"],
        "nope_dim": hybrid["qk_nope_head_dim"],
        "rope_dim": hybrid["qk_rope_head_dim"],
        "v_dim": hybrid["v_head_dim"],
        "latent_norm": hybrid.get("use_lora_layer_norm", False),
        "rope": read_rope(hybrid, interleaved=True),
    }


def _mamba2(hybrid: dict[str, Any]) -> dict[str, Any]:
    heads, ssm = hybrid["num_attention_heads"], hybrid["ssm_cfg"]
    return {
        "kind": "mamba2",
        "heads": heads,
        "head_dim": hybrid["d_inner"] // heads,
        "state_size": ssm["d_state"],
        "groups": ssm["ngroups"],
        "kv_heads": hybrid["num_key_value_heads"],
        "repeat_before_conv": ssm.get("repeat_kv_before_conv", False),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    specs = config.specs
    mla_layers = [i for i, s in enumerate(specs) if isinstance(s.mixer, MLAConfig)]
    mla = next((s.mixer for s in specs if isinstance(s.mixer, MLAConfig)), None)
    mamba = next((s.mixer for s in specs if isinstance(s.mixer, Mamba2Config)), None)
    ffn = specs[0].ffn
    assert isinstance(ffn, SwiGLUConfig)
    assert mla or mamba
    outer = write_outer(config)
    heads = (mla or mamba).heads  # type: ignore[union-attr]
    hybrid: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "d_model": config.hidden_size,
        "intermediate_size": ffn.hidden,
        "hidden_act": "silu",
        "n_layer": len(specs),
        "mla_layers": mla_layers,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    kv_heads = heads
    if mamba is not None:
        kv_heads = mamba.kv_heads or heads
        hybrid |= {
            "d_inner": mamba.inner,
            "d_xb": kv_heads * mamba.head_dim,
            "ssm_cfg": {
                "expand": 1,
                "ngroups": mamba.groups,
                "d_state": mamba.state_size,
                "repeat_kv_before_conv": mamba.repeat_before_conv,
            },
        }
    if mla is not None:
        full = mamba is not None and mla.kv_heads == heads != kv_heads
        kv_heads = kv_heads if full else mla.kv_heads
        hybrid |= {
            "kv_lora_rank": mla.kv_rank,
            "q_lora_rank": mla.q_rank,
            "use_lora_layer_norm": mla.latent_norm,
            "use_full_kv_head": full,
            "qk_rope_head_dim": mla.rope_dim,
            "qk_nope_head_dim": mla.nope_dim,
            "v_head_dim": mla.v_dim,
            "rope_type": mla.rope.kind,
            **write_rope(mla.rope),
        }
    hybrid["num_key_value_heads"] = kv_heads
    head_dim = mla.v_dim if mla is not None else mamba.head_dim  # type: ignore[union-attr]
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **outer,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn.hidden,
        **(write_rope(mla.rope) if mla is not None else {}),
    }
    return {"config.json": hf, "hybrid_config.json": hybrid}


_MLA = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "out_proj",
}

FAMILY = Family(
    name="zebra",
    files=("config.json", "hybrid_config.json"),
    claims=lambda files: "mla_layers" in files.get("hybrid_config.json", {}),
    read=_read,
    write=_write,
    rules=[
        *OUTER,
        *MLP,
        *(
            Rule(f"layers.{{i}}.mixer.{a}.weight", f"model.layers.{{i}}.mla.{b}.weight")
            for a, b in _MLA.items()
        ),
        *mixer_rules("model.layers.{i}.mamba"),
    ],
    dropped=[r"model\.layers\.\d+\.mla\.w[kv]_b", r"model\.layers\.\d+\..*rotary_emb.*"],
)
