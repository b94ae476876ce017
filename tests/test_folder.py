"""Model folders: identity of save and load, one-line errors that name the thing, nothing half-done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import ArchzooError, CausalLM, CheckpointError, ConfigError
from archzoo.checkpoint import load as load_tensors
from archzoo.checkpoint import save as save_tensors
from archzoo.checkpoint.folder import _family_for

Change = Callable[[Path], object]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def state(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# --- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_and_load_is_the_identity(model_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config(model_name).tiny(), dtype=dtype, seed=3)
    first, second = tmp_path / "first", tmp_path / "second"
    archzoo.save(model, first, max_shard_size="60KB")
    again = archzoo.load(first)
    assert again.config.specs == model.config.specs
    same = {"name", "layers", "source"}
    assert again.config.model_dump(exclude=same) == model.config.model_dump(exclude=same)
    assert not again.training
    old, new = state(model), state(again)
    assert list(old) == list(new)
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype, name
        assert torch.equal(bits(new[name]), bits(tensor)), name
    archzoo.save(again, second, max_shard_size="60KB")
    assert files(first) == files(second)
    assert len(files(first)) > 3
    for name, content in files(first).items():
        if name.endswith(".json"):
            json.loads(content, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_layout_of_each_registered_model_holds_it(model_name: str) -> None:
    """Without a warning, at full size, for the family that its TOML names."""
    config = archzoo.config(model_name)
    assert _family_for(config).name == config.family


def test_config_that_the_layout_cannot_hold_is_written_natively(tmp_path: Path) -> None:
    config = archzoo.config("smollm2-135m").tiny().override("layers.default.mixer.window=4")
    model = archzoo.build(config)
    message = r"the 'llama' layout cannot hold this config \(layer 0: mixer.window = 4\)"
    with pytest.warns(UserWarning, match=message):
        archzoo.save(model, tmp_path / "out")
    assert archzoo.load(tmp_path / "out").config.specs == config.specs
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "archzoo"


@pytest.mark.parametrize(
    "change",
    [
        "layers.override=[{indices=[1], residual={kind='lns'}}]",
        "layers.override=[{indices=[1], ffn={kind='geglu', hidden=96}}]",
        "layers.override=[{indices=[1], mixer={rope={theta=7.0}}}]",
        "layers.default.mixer.qkv_bias=true",
        "layers.default.mixer.qk_norm=head",
    ],
)
def test_no_layout_drops_a_setting(change: str) -> None:
    config = archzoo.config("smollm2-135m").tiny().override(change)
    with pytest.warns(UserWarning, match="cannot hold"):
        assert _family_for(config).name == "archzoo"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("zebra-llama-1b", ["layers.default.mixer.repeat_before_conv=true"]),
        ("zebra-llama-1b", ["layers.override.0.mixer.latent_norm=true"]),
        ("zebra-llama-1b", ["layers.override.0.mixer.kv_heads=32"]),
        ("x-ecomla-1b", ["layers.default.mixer.rope={interleaved=true, theta=9.0}"]),
        ("llama-3.1-8b", ["layers.default.mixer.qkv_bias=true", "layers.default.mixer.o_bias=true"]),
        ("llama-3.1-8b", ["layers.default.ffn.bias=true", "eos_token_id=[3, 4]", "pad_token_id=5"]),
        ("mamba2-130m", ["layers.default.mixer.groups=3", "layers.default.mixer.dt_limit=[0.01, 0.2]"]),
        ("deepseek-moe-16b", ["layers.default.ffn.renormalize=true", "layers.default.ffn.scale=2.5"]),
        ("deepseek-moe-16b", ["layers.default.ffn.score=sigmoid", "layers.default.ffn.shared=0"]),
    ],
)
def test_layout_holds_its_own_settings(name: str, changes: list[str]) -> None:
    config = archzoo.config(name).override(*changes)
    assert config != archzoo.config(name)
    assert _family_for(config).name == config.family  # compares what it would read back


def test_dtype_can_be_chosen_at_load(tmp_path: Path) -> None:
    cfg = archzoo.config("deepseek-moe-16b").tiny()
    cfg = cfg.override("layers.override.0.ffn.selection_bias=true", "family=archzoo")
    model = archzoo.build(cfg)
    model.layers[1].ffn.selection_bias.fill_(0.3)
    archzoo.save(model, tmp_path / "out")
    loaded = archzoo.load(tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in state(loaded).items():
        original = state(model)[name]
        if name.endswith("selection_bias"):
            assert torch.equal(tensor, original)  # stays fp32
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, original.bfloat16())


def test_expert_tensors_have_the_published_names_and_order(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("deepseek-moe-16b").tiny())
    archzoo.save(model, tmp_path / "out")
    stored = load_tensors(tmp_path / "out")
    experts = model.layers[1].ffn.experts
    for e in range(8):
        prefix = f"model.layers.1.mlp.experts.{e}"
        gate, up = experts.gate_up[e].chunk(2)
        assert torch.equal(stored[f"{prefix}.gate_proj.weight"], gate)
        assert torch.equal(stored[f"{prefix}.up_proj.weight"], up)
        assert torch.equal(stored[f"{prefix}.down_proj.weight"], experts.down[e])
    assert torch.equal(stored["model.layers.1.mlp.gate.weight"], model.layers[1].ffn.router.weight)
    assert "model.layers.0.mlp.gate_proj.weight" in stored
    assert "lm_head.weight" in stored


def test_zebra_has_the_published_names(tmp_path: Path) -> None:
    archzoo.save(archzoo.build(archzoo.config("zebra-llama-1b").tiny()), tmp_path / "out")
    names = {n.removeprefix("model.layers.") for n in load_tensors(tmp_path / "out")}
    mla = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "out_proj"}
    assert {f"0.mla.{n}.weight" for n in mla} <= names
    mamba = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"}
    assert {f"1.mamba.{n}" for n in mamba} <= names
    assert {"0.input_layernorm.weight", "1.post_attention_layernorm.weight", "1.mlp.up_proj.weight"} <= names
    assert "lm_head.weight" not in names  # tied
    hybrid = json.loads((tmp_path / "out" / "hybrid_config.json").read_text())
    assert hybrid["mla_layers"] == [0]
    assert (hybrid["d_inner"], hybrid["d_xb"], hybrid["ssm_cfg"]["ngroups"]) == (64, 32, 4)


# --- faults ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, written once; copied by the tests that damage it."""
    root = tmp_path_factory.mktemp("saved")

    def get(name: str) -> Path:
        path = root / name
        if not path.exists():
            archzoo.save(archzoo.build(archzoo.config(name).tiny()), path, max_shard_size="60KB")
        return path

    return get


def settings(file: str = "config.json", **changes: Any) -> Change:
    """Change keys of a config file; ... removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return change


def hybrid(**changes: Any) -> Change:
    return settings("hybrid_config.json", **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Rewrite the weights as one file after `change`."""

    def rewrite(folder: Path) -> None:
        stored = load_tensors(folder)
        change(stored)
        for path in folder.glob("model*"):
            path.unlink()
        save_tensors(stored, folder / "new")
        for path in (folder / "new").iterdir():
            path.rename(folder / path.name)
        (folder / "new").rmdir()

    return rewrite


def shard(change: Callable[[Path], object]) -> Change:
    return lambda folder: change(sorted(folder.glob("*.safetensors"))[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LLAMA, MAMBA, ZEBRA = "smollm2-135m", "mamba2-130m", "zebra-llama-1b"
MOE, NATIVE = "deepseek-moe-16b", "llama-130m-lns"
NORM = "model.norm.weight"
FAULTS: dict[str, tuple[str, Change, str]] = {
    "truncated shard": (LLAMA, shard(cut), r"model-00001-of-\d+\.safetensors: .*data"),
    "empty shard": (
        LLAMA,
        shard(lambda p: p.write_bytes(b"")),
        r"model-00001-of-\d+\.safetensors: .*0 bytes",
    ),
    "missing shard": (
        LLAMA,
        shard(Path.unlink),
        r'model-00001-of-\d+\.safetensors: tensor "\S+": expected here .*, found no such file',
    ),
    "garbage shard": (
        LLAMA,
        shard(lambda p: p.write_bytes(b"\x05" * 99)),
        r"model-00001-of-\d+\.safetensors",
    ),
    "broken index": (
        LLAMA,
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        r"index\.json: EOF",
    ),
    "no index": (
        LLAMA,
        lambda f: (f / "model.safetensors.index.json").unlink(),
        r"expected model\.safetensors or model\.safetensors\.index\.json",
    ),
    "missing tensor": (LLAMA, tensors(lambda t: t.pop(NORM)), f"'{NORM}' of family 'llama' is missing"),
    "missing expert": (
        MOE,
        tensors(lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight")),
        r"'model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight' of family 'deepseek' is missing",
    ),
    "extra tensor": (
        LLAMA,
        tensors(lambda t: t.update(extra=torch.zeros(2))),
        r"model\.safetensors: tensor 'extra' has no place in the model",
    ),
    "shape": (
        LLAMA,
        tensors(lambda t: t.update({NORM: torch.zeros(63)})),
        rf"model\.safetensors: tensor '{NORM}' has shape \[63\], the config asks for \[64\]",
    ),
    "transposed": (
        MAMBA,
        tensors(lambda t: t.update({"backbone.embeddings.weight": torch.zeros(64, 256)})),
        r"'backbone\.embeddings\.weight' has shape \[64, 256\], the config asks for \[256, 64\]",
    ),
    "integer weight": (
        LLAMA,
        tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
        rf"'{NORM}' has dtype torch\.int32, expected one of float32, bfloat16",
    ),
    "fp8 without scales": (
        LLAMA,
        tensors(lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)})),
        rf"'{NORM}' has dtype torch\.float8_e4m3fn, expected one of float32, bfloat16",
    ),
    "vocab size": (
        LLAMA,
        settings(vocab_size=300),
        r"'model\.embed_tokens\.weight' has shape \[256, 64\], the config asks for \[300, 64\]",
    ),
    "more layers": (
        LLAMA,
        settings(num_hidden_layers=3),
        r"'model\.layers\.2\..*' and 8 more of .* is missing",
    ),
    "fewer layers": (LLAMA, settings(num_hidden_layers=1), r"'model\.layers\.1\..*' and 8 more has no place"),
    "model_type": (
        LLAMA,
        settings(model_type="gpt2"),
        "model_type 'gpt2' is not supported; known families: archzoo, deepseek, deepseek_v2, ",
    ),
    "no model_type": (LLAMA, settings(model_type=...), "model_type 'None' is not supported"),
    "missing key": (
        LLAMA,
        settings(num_attention_heads=...),
        "lack the key 'num_attention_heads' of family 'llama'",
    ),
    "missing MoE key": (MOE, settings(n_routed_experts=...), "lack the key 'n_routed_experts'"),
    "missing MLA key": (ZEBRA, hybrid(kv_lora_rank=...), "lack the key 'kv_lora_rank' of family 'zebra'"),
    "missing state": (MAMBA, settings(state_size=...), "lack the key 'state_size' of family 'mamba2'"),
    "native without config": (NATIVE, settings(archzoo=...), "lack the key 'archzoo'"),
    "null": (
        LLAMA,
        settings(intermediate_size=None),
        r"config\.json: layers\.default\.ffn\.hidden: .*found None",
    ),
    "word for a number": (LLAMA, settings(vocab_size="x"), r"config\.json: vocab_size: .*found 'x'"),
    "word for a count": (MOE, settings(num_hidden_layers="x"), "do not make sense for family 'deepseek'"),
    "no heads": (
        LLAMA,
        settings(num_attention_heads=0, head_dim=None),
        "do not make sense for family 'llama'",
    ),
    "null limit": (MAMBA, settings(time_step_limit=None), "do not make sense for family 'mamba2'"),
    "grouping": (
        LLAMA,
        settings(num_key_value_heads=3),
        r"layer 0: attention: heads \(4\) .* kv_heads \(3\)",
    ),
    "activation": (LLAMA, settings(hidden_act="gelu"), "hidden_act 'gelu' is not supported, expected 'silu'"),
    "biases": (MAMBA, settings(use_bias=True), "use_bias = True is not supported, expected False"),
    "rope word": (LLAMA, settings(rope_scaling="linear"), "do not make sense for family 'llama'"),
    "rope type": (
        LLAMA,
        settings(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        r"rope\.kind: .*'yarn' or 'llama3', found 'dynamic'",
    ),
    "rope key": (
        LLAMA,
        settings(rope_scaling={"rope_type": "linear", "factor": 2.0, "alpha": 3}),
        "rope key 'alpha' is not supported",
    ),
    "broken JSON": (
        LLAMA,
        lambda f: (f / "config.json").write_text('{"a":'),
        r"config\.json: not valid JSON",
    ),
    "binary JSON": (
        LLAMA,
        lambda f: (f / "config.json").write_bytes(b"\xff"),
        r"config\.json: not valid JSON",
    ),
    "JSON list": (
        LLAMA,
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json: expected a JSON object",
    ),
    "no config": (LLAMA, lambda f: (f / "config.json").unlink(), "no config.json"),
    "no hybrid config": (
        ZEBRA,
        lambda f: (f / "hybrid_config.json").unlink(),
        "of family 'llama' is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line_and_loads_nothing(
    fault: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    name, change, message = FAULTS[fault]
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in saved(name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        archzoo.load(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such folder"):
        archzoo.load(tmp_path / "nothing")
    assert issubclass(CheckpointError, ArchzooError)


def test_head_beside_tied_embeddings_is_ignored(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers writes none, older exports do."""
    folder = tmp_path / "tied"
    folder.mkdir()
    for path in saved(LLAMA).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    model = archzoo.load(folder)
    assert model.lm_head is None
    assert model.head_weight is model.embed.weight


# --- saving ----------------------------------------------------------------------------------------


def test_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archzoo.checkpoint import shards as module

    target = tmp_path / "model"
    archzoo.save(archzoo.build(archzoo.config(LLAMA).tiny(), seed=1), target)
    before = files(target)

    def fail(*args: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(module, "write_shards", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        archzoo.save(archzoo.build(archzoo.config(LLAMA).tiny(), seed=2), target)
    assert files(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RuntimeError, match="disk full"):
        archzoo.save(archzoo.build(archzoo.config(LLAMA).tiny(), seed=2), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_save_over_another_model(tmp_path: Path) -> None:
    target = tmp_path / "model"
    archzoo.save(archzoo.build(archzoo.config(ZEBRA).tiny()), target, max_shard_size="60KB")
    (target / "README.md").write_text("kept")
    model = archzoo.build(archzoo.config(LLAMA).tiny())  # its layout has no hybrid_config.json
    archzoo.save(model, target, extra_files={"tokenizer.json": b"{}"})
    weights = ["model.manifest.json", "model.safetensors"]
    assert sorted(files(target)) == ["README.md", "config.json", *weights, "tokenizer.json"]
    assert archzoo.load(target).config.specs == model.config.specs


@pytest.mark.parametrize("size", ["4 apples", "", "-1GB", "GB"])
def test_wrong_shard_size(size: str, tmp_path: Path) -> None:
    with pytest.raises(ArchzooError, match=re.escape(f"max_shard_size '{size}'")):
        archzoo.save(archzoo.build(archzoo.config(LLAMA).tiny()), tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()
