"""transformers' Mamba-2 layout (model_type "mamba2")."""

from __future__ import annotations

from typing import Any

from archzoo.blocks.mixers.mamba2 import A_RANGE, DT_FLOOR, DT_RANGE, Mamba2Config
from archzoo.checkpoint.families.llama import TOKEN_IDS
from archzoo.checkpoint.keymap import Family, Rule
from archzoo.configuration import ModelConfig
from archzoo.errors import ConfigError

FIXED = {"use_bias": False, "use_conv_bias": True, "rms_norm": True, "hidden_act": "silu"}


def _read(files: dict[str, Any]) -> dict[str, Any]:
    hf = files["config.json"]
    for key, expected in FIXED.items():
        if (found := hf.get(key, expected)) != expected:
            raise ConfigError(f"config.json: {key} = {found} is not supported, expected {expected}")
    mixer = {
        "kind": "mamba2",
        "heads": hf["num_heads"],
        "head_dim": hf["head_dim"],
        "state_size": hf["state_size"],
        "groups": hf["n_groups"],
        "conv_kernel": hf["conv_kernel"],
        "norm_eps": hf["layer_norm_epsilon"],
        "dt_limit": tuple(hf["time_step_limit"]),
    }
    ids = {k: hf[k] for k in TOKEN_IDS if hf.get(k) is not None}
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "max_positions": hf.get("max_position_embeddings", 1 << 20),
        "tie_embeddings": hf["tie_word_embeddings"],
        "norm_eps": hf["layer_norm_epsilon"],
        "init_std": hf["initializer_range"],
        "layers": {"count": hf["num_hidden_layers"], "default": {"mixer": mixer}},
        **ids,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = config.layers.default.mixer
    assert isinstance(mixer, Mamba2Config)
    hf = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **FIXED,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers.count,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "num_heads": mixer.heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_size,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_kernel,
        "expand": mixer.inner / config.hidden_size
        if mixer.inner % config.hidden_size
        else mixer.inner // config.hidden_size,
        "chunk_size": 256,
        "time_step_limit": list(mixer.dt_limit),
        "time_step_min": DT_RANGE[0],
        "time_step_max": DT_RANGE[1],
        "time_step_floor": DT_FLOOR,
        "A_initializer_range": list(A_RANGE),
        "max_position_embeddings": config.max_positions,
        "residual_in_fp32": True,
        "use_cache": True,
        **{k: v for k in TOKEN_IDS if (v := getattr(config, k)) is not None},
    }
    return {"config.json": hf}


def mixer_rules(prefix: str) -> list[Rule]:
    """The Mamba-2 parameters keep the names of the original code."""
    names = (
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    )
    return [Rule(f"layers.{{i}}.mixer.{n}", f"{prefix}.{n}") for n in names]


FAMILY = Family(
    name="mamba2",
    read=_read,
    write=_write,
    rules=[
        Rule("embed.weight", "backbone.embeddings.weight"),
        Rule("norm.weight", "backbone.norm_f.weight"),
        Rule("layers.{i}.mixer_norm.weight", "backbone.layers.{i}.norm.weight"),
        *mixer_rules("backbone.layers.{i}.mixer"),
    ],
)
