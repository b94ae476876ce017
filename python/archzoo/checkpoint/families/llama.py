"""transformers' Llama layout (model_type "llama")."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.ffns.glu import SwiGLUConfig
from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.blocks.rope import RopeConfig
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig
from archzoo.errors import ConfigError
from archzoo.ops.fp8 import BLOCK

OUTER = [
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("layers.{i}.mixer_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Rule("layers.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
]
ATTENTION = [
    Rule(f"layers.{{i}}.mixer.{p}_proj.{w}", f"model.layers.{{i}}.self_attn.{p}_proj.{w}")
    for p in "qkvo"
    for w in ("weight", "bias")
]
QK_NORM = [
    Rule(f"layers.{{i}}.mixer.{p}_norm.weight", f"model.layers.{{i}}.self_attn.{p}_norm.weight") for p in "qk"
]
MLP = [
    Rule(f"layers.{{i}}.ffn.{p}_proj.{w}", f"model.layers.{{i}}.mlp.{p}_proj.{w}")
    for p in ("gate", "up", "down")
    for w in ("weight", "bias")
]
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def expect(hf: dict[str, Any], **values: Any) -> None:
    """Refuse a config.json in which a key is there and says something else than all that is supported."""
    for key, expected in values.items():
        if (found := hf.get(key)) is not None and found != expected:
            raise ConfigError(f"config.json: {key} = {found!r} is not supported, expected {expected!r}")


def read_rope(hf: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """RopeConfig data from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    names = {"original_max_position_embeddings": "original_max_positions"}
    known = set(RopeConfig.model_fields)
    data: dict[str, Any] = {names.get(str(k), str(k)): v for k, v in scaling.items() if v is not None}
    if kind in ("yarn", "llama3"):
        data.setdefault("original_max_positions", hf["max_position_embeddings"])
    if unknown := sorted(set(data) - known):
        raise ConfigError(f"config.json: rope key '{unknown[0]}' is not supported")
    return {"kind": kind, "theta": theta, **data, **extra}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of config.json."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    changed = rope.model_dump(exclude_defaults=True, exclude={"theta", "interleaved", "kind"})
    changed |= {"factor": rope.factor}
    if rope.kind == "llama3":
        changed |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if "original_max_positions" in changed:
        changed["original_max_position_embeddings"] = changed.pop("original_max_positions")
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **changed}}


def read_outer(hf: dict[str, Any]) -> dict[str, Any]:
    """What every Llama-like config.json holds outside its layers."""
    if (act := hf.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"config.json: hidden_act '{act}' is not supported, expected 'silu'")
    quantization = hf.get("quantization_config") or {}  # the weights themselves are found by their scales
    if quantization.get("quant_method") != "mxfp4":
        expect(quantization, quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    ids = {k: tuple(v) if isinstance(v := hf[k], list) else v for k in TOKEN_IDS if hf.get(k) is not None}
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "max_positions": hf["max_position_embeddings"],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "norm_eps": hf["rms_norm_eps"],
        "init_std": hf.get("initializer_range", 0.02),
        **ids,
    }


def write_outer(config: ModelConfig) -> dict[str, Any]:
    """The inverse of read_outer."""
    ids = {k: getattr(config, k) for k in TOKEN_IDS}  # null too: a class may have a default
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "num_hidden_layers": config.layers.count,
        "hidden_act": "silu",
        "use_cache": True,
        **ids,
    }


def read_attention(hf: dict[str, Any]) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    bias = hf.get("attention_bias", False)
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "rope": read_rope(hf),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def read_partial_attention(hf: dict[str, Any], default: float = 1.0) -> dict[str, Any]:
    """The same where RoPE turns only the first channels of a head: a number of them, or a share."""
    rope = dict(hf.get("rope_parameters") or {})
    share = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or default
    mixer = read_attention({**hf, "rope_parameters": rope})
    turned = hf.get("rotary_dim") or int(mixer["head_dim"] * share)
    return {**mixer, "rotary_dim": turned if turned != mixer["head_dim"] else None}


def write_attention(mixer: AttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": mixer.qkv_bias,
        "attention_dropout": 0.0,
        **write_rope(mixer.rope or RopeConfig()),
    }


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    ffn = {"kind": "swiglu", "hidden": hf["intermediate_size"], "bias": hf.get("mlp_bias", False)}
    layers = {"count": hf["num_hidden_layers"], "default": {"mixer": read_attention(hf), "ffn": ffn}}
    return {**read_outer(hf), "layers": layers}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer, ffn = config.layers.default.mixer, config.layers.default.ffn
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(ffn, SwiGLUConfig)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **write_outer(config),
        **write_attention(mixer),
        "intermediate_size": ffn.hidden,
        "mlp_bias": ffn.bias,
    }
    return {"config.json": hf}


FAMILY = Family(
    name="llama",
    claims=lambda files: (
        files["config.json"].get("model_type") == "llama" and "hybrid_config.json" not in files
    ),
    read=_read,
    write=_write,
    rules=[*OUTER, *ATTENTION, *MLP],
    dropped=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
)
