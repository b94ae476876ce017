"""Configs: messages that name file, key and choice; impossible models; overrides; tiny variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import archzoo
from archzoo import ArchzooError, ConfigError, InputError, ModelConfig, UnknownNameError

LLAMA = """
vocab_size = 64
hidden_size = 32
max_positions = 128

[layers]
count = 4

[layers.default.mixer]
kind = "attention"
heads = 4
kv_heads = 2
head_dim = 8

[layers.default.ffn]
kind = "swiglu"
hidden = 48
"""
HYBRID = """
vocab_size = 64
hidden_size = 32
max_positions = 128

[layers]
count = 4

[layers.default.mixer]
kind = "mamba2"
heads = 4
head_dim = 8
state_size = 8

[[layers.override]]
indices = [0, 3]

[layers.override.mixer]
kind = "mla"
heads = 4
kv_heads = 2
kv_rank = 16
nope_dim = 8
rope_dim = 8
v_dim = 8
"""
KINDS = "'attention', 'mamba2', 'mfa', 'mla'"
FAULTS = {
    "broken TOML": (LLAMA, "count = 4", "count = [4", "not valid TOML"),
    "unknown key": (LLAMA, "vocab_size", "vocabulary", "vocabulary: unknown key"),
    "missing key": (LLAMA, "vocab_size = 64", "", "vocab_size: Field required"),
    "unknown block key": (LLAMA, "kv_heads", "kvheads", "layers.default.mixer.kvheads: unknown key"),
    "unknown kind": (LLAMA, '"attention"', '"atention"', f"layers.default.mixer: .*'atention'.*{KINDS}"),
    "no kind": (LLAMA, 'kind = "attention"', "", "layers.default.mixer: .*'kind'"),
    "wrong type": (LLAMA, "heads = 4", 'heads = "four"', "layers.default.mixer.heads: .*found 'four'"),
    "negative": (
        LLAMA,
        "hidden = 48",
        "hidden = -48",
        "layers.default.ffn.hidden: .*greater than 0, found -48",
    ),
    "no layers": (LLAMA, "count = 4", "count = 0", "layers.count: .*greater than 0, found 0"),
    "grouping": (LLAMA, "kv_heads = 2", "kv_heads = 3", r"layer 0: attention: heads \(4\) .* kv_heads \(3\)"),
    "odd head": (
        LLAMA,
        "head_dim = 8",
        "head_dim = 7",
        "layer 0: attention: RoPE needs an even head_dim, found 7",
    ),
    "rope kind": (
        LLAMA,
        "head_dim = 8",
        'head_dim = 8\nrope = { kind = "jarn" }',
        "rope.kind: .*'yarn'.*'jarn'",
    ),
    "rope length": (
        LLAMA,
        "head_dim = 8",
        'head_dim = 8\nrope = { kind = "yarn", factor = 4.0 }',
        "layers.default.mixer.rope: kind 'yarn' needs original_max_positions",
    ),
    "residual": (
        LLAMA,
        "[layers.default.ffn]",
        '[layers.default.residual]\nkind = "lsn"\n[layers.default.ffn]',
        "layers.default.residual.kind: .*'pre' or 'lns', found 'lsn'",
    ),
    "capacity": (
        LLAMA,
        "[layers.default.ffn]",
        '[layers.default.depth]\nkind = "mod"\ncapacity = 1.5\n[layers.default.ffn]',
        "layers.default.depth.capacity: .*less than or equal to 1, found 1.5",
    ),
    "top_k": (
        LLAMA,
        'kind = "swiglu"',
        'kind = "moe"\nexperts = 4\ntop_k = 5',
        r"layer 0: moe: top_k \(5\) exceeds experts \(4\)",
    ),
    "index": (HYBRID, "[0, 3]", "[0, 4]", "layers.override: index 4 is out of range for 4 layers"),
    "negative index": (HYBRID, "[0, 3]", "[-1]", "layers.override: index -1 is out of range for 4 layers"),
    "override key": (HYBRID, "kv_rank", "kv_rnk", "layers.override.0: mixer.kv_rnk: unknown key"),
    "override kind": (HYBRID, '"mla"', '"mlb"', f"layers.override.0: mixer: .*'mlb'.*{KINDS}"),
    "override slot": (HYBRID, "override.mixer]", "override.mixr]", "layers.override.0.mixr: unknown key"),
    "latent rank": (
        HYBRID,
        "kv_rank = 16",
        "kv_rank = 33",
        r"layer 0: mla: kv_rank \(33\) exceeds the 32 channels",
    ),
    "query rank": (
        HYBRID,
        "kv_rank = 16",
        "kv_rank = 16\nq_rank = 65",
        r"layer 0: mla: q_rank \(65\) exceeds the 64 query channels",
    ),
    "odd rope_dim": (
        HYBRID,
        "rope_dim = 8",
        "rope_dim = 7",
        "layer 0: mla: RoPE needs an even rope_dim, found 7",
    ),
    "mla heads": (HYBRID, "kv_heads = 2", "kv_heads = 3", r"layer 0: mla: heads \(4\) .* kv_heads \(3\)"),
    "groups": (
        HYBRID,
        "state_size = 8",
        "state_size = 8\ngroups = 3",
        r"layer 1: mamba2: heads \(4\) .* groups \(3\)",
    ),
    "mamba kv_heads": (
        HYBRID,
        "state_size = 8",
        "state_size = 8\nkv_heads = 3",
        r"layer 1: mamba2: heads \(4\) .* kv_heads \(3\)",
    ),
    "MoD over Mamba": (
        HYBRID,
        "[[layers.override]]",
        '[layers.default.depth]\nkind = "mod"\n[[layers.override]]',
        "layer 1: Mixture-of-Depths needs a mixer without a recurrent state, found 'mamba2'",
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "my-model.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line_with_file_and_key(fault: str, tmp_path: Path) -> None:
    text, old, new, message = FAULTS[fault]
    assert old in text
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        archzoo.config(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA.replace("heads = 4", "heads = -4").replace("hidden = 48", "hiden = 48"))
    with pytest.raises(ConfigError, match=r"mixer.heads.*ffn.hidden: Field required.*ffn.hiden: unknown key"):
        archzoo.config(str(path))


def test_toml_file_is_a_model(tmp_path: Path) -> None:
    config = archzoo.config(str(write(tmp_path, HYBRID)))
    assert config.name == "my-model"
    assert [s.mixer.kind for s in config.specs] == ["mla", "mamba2", "mamba2", "mla"]
    model = archzoo.build(config)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        archzoo.config(str(tmp_path / "missing.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        archzoo.config(str(binary))


# --- names -----------------------------------------------------------------------------------------


def test_unknown_model_suggests_near_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'zebra-lama-1b'; did you mean zebra-llama-1b"):
        archzoo.config("zebra-lama-1b")
    with pytest.raises(UnknownNameError, match="unknown model 'qqqq'; known: deepseek-moe-145b"):
        archzoo.build("qqqq")
    with pytest.raises(KeyError):
        archzoo.cost("zebra-lama-1b")
    assert issubclass(UnknownNameError, ArchzooError)


def test_list_models() -> None:
    names = archzoo.list_models("zebra-llama-?b*", with_aliases=False)
    assert len(names) == 8
    assert names.index("zebra-llama-3b-8mla-20m2") < names.index("zebra-llama-3b-14mla-14m2")
    assert archzoo.list_models("zebra-llama-?b") == ["zebra-llama-1b", "zebra-llama-3b", "zebra-llama-8b"]
    assert archzoo.list_models("zebra-llama-?b", with_aliases=False) == []
    assert archzoo.config("zebra-llama-8b").name == "zebra-llama-8b-8mla-24m2"
    assert archzoo.list_models("nothing*") == []


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="dtype 'int4': expected one of float64, float32, bfloat16, float16"
    ):
        archzoo.cost("llama-130m", dtype="int4")
    for arguments in ({"seq_len": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            archzoo.cost("llama-130m", **arguments)
    with pytest.raises(InputError, match=r"dtype must be a floating-point type, found torch\.int8"):
        archzoo.build("llama-130m", dtype=torch.int8)


# --- overrides -------------------------------------------------------------------------------------


def test_override_gives_a_new_config() -> None:
    config = archzoo.config("zebra-llama-1b")
    changed = config.override(
        "layers.count=6",
        "layers.override.0.indices=[0, 4]",
        "layers.override.0.mixer.kv_rank=64",
        "layers.default.mixer.state_size = 32",
        "norm_eps=1e-6",
        "eos_token_id=[1, 2]",
        "source=my own",
    )
    assert [s.mixer.kind for s in changed.specs] == ["mla"] + ["mamba2"] * 3 + ["mla", "mamba2"]
    assert changed.specs[4].mixer.kv_rank == 64
    assert changed.specs[1].mixer.state_size == 32
    assert (changed.norm_eps, changed.eos_token_id, changed.source) == (1e-6, (1, 2), "my own")
    assert len(config.specs) == 16
    assert config is archzoo.config("zebra-llama-1b")
    assert config.specs[0].mixer.kv_rank == 128
    whole = config.override("layers.default.mixer={kind='attention', heads=4, kv_heads=2, head_dim=8}")
    assert whole.specs[1].mixer.kind == "attention"
    assert config.mtp is None
    assert config.override("mtp.weight=0.1", "mtp.depth=2").mtp.model_dump() == {"depth": 2, "weight": 0.1}


def test_later_overrides_win_and_tables_without_kind_change_the_default() -> None:
    config = archzoo.config("llama-130m")
    data = config.model_dump()
    data["layers"]["override"] = [
        {"indices": [1, 2], "mixer": {"window": 8, "rope": {"theta": 7.0}}},
        {"indices": [2], "ffn": {"kind": "geglu", "hidden": 5}},
    ]
    specs = ModelConfig.from_dict(data).specs
    assert specs[1].mixer == config.specs[1].mixer.model_copy(
        update={"window": 8, "rope": config.specs[1].mixer.rope.model_copy(update={"theta": 7.0})}
    )
    assert specs[1].ffn == config.specs[1].ffn
    assert specs[2].mixer == config.specs[2].mixer
    assert (specs[2].ffn.kind, specs[2].ffn.hidden) == ("geglu", 5)
    assert specs[0] == specs[3] == config.specs[0]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("layers.count", "override 'layers.count': expected key=value"),
        ("layers.cuont=3", "override: unknown key 'layers.cuont'"),
        ("layers.override.1.indices=[1]", r"override: unknown key 'layers\.override\.1'"),
        ("layers.default.mixer.heads.x=1", r"override: unknown key 'layers\.default\.mixer\.heads\.x'"),
        ("mtp.dpth=1", r"override: mtp\.dpth: unknown key"),
        ("pad_token_id.x=1", "override: pad_token_id: .*valid integer"),
        ("hidden_size=wide", "override: hidden_size: .*found 'wide'"),
        ("layers.count=9", "override: layers.override: index 10 is out of range for 9 layers"),
    ],
)
def test_wrong_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        archzoo.config("zebra-llama-1b").override(assignment)


def test_config_is_frozen_and_survives_its_own_data(model_name: str) -> None:
    config = archzoo.config(model_name)
    with pytest.raises(ValueError, match="frozen"):
        config.vocab_size = 3  # type: ignore[misc]
    assert ModelConfig.from_dict(config.model_dump()) == config
    tiny = config.tiny()
    assert (tiny.vocab_size, tiny.hidden_size) == (256, 64)
    assert tiny.layers.count <= 4
    kinds = [
        {(s.mixer.kind, s.ffn and s.ffn.kind, s.depth.kind, s.residual.kind) for s in c.specs}
        for c in (config, tiny)
    ]
    assert kinds[0] == kinds[1]
    assert archzoo.cost(tiny).params < 500_000
