"""Mixtures of experts against transformers: logits, cached decode, folders both ways, routers, 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import hf_step
from torch import Tensor, nn

import archzoo
from archzoo import CheckpointError, ConfigError
from archzoo.checkpoint.families import families
from archzoo.ops.fp8 import dequantize_blocks, quantize_blocks

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
V3 = {**DEEPSEEK, "n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
BIASED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "head_dim": 16,
}
QWEN = {"num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
QWEN2 = {**QWEN, "shared_expert_intermediate_size": 40}
GPT = {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 12, "sliding_window": 6}
LLAMA4 = {
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "attention_chunk_size": 6,
    "floor_scale": 3,
    "rope_parameters": LLAMA3,
}
MINIMAX = {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 6.0,
}
# name -> (class, model_type or family, settings)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "v2-lite": ("DeepseekV2", "deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "v2-groups": (
        "DeepseekV2",
        "deepseek_v2",
        {**V3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "n_shared_experts": 1},
    ),
    "v2-yarn": ("DeepseekV2", "deepseek_v2", {**DEEPSEEK, "rope_parameters": {**YARN, **MSCALE}}),
    "v3": ("DeepseekV3", "deepseek_v3", V3),
    "v3-yarn": (
        "DeepseekV3",
        "deepseek_v3",
        {**V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "v3-uneven-mscale": (
        "DeepseekV3",
        "deepseek_v3",
        {**V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, "rms_norm_eps": 1e-5},
    ),
    "v3-halves": ("DeepseekV3", "deepseek_v3", {**V3, "rope_interleave": False, "norm_topk_prob": False}),
    "kimi": (
        "DeepseekV3",
        "deepseek_v3",
        {**V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5},
    ),
    "mixtral": ("Mixtral", "mixtral", {"num_local_experts": 8}),
    "mixtral-window": ("Mixtral", "mixtral", {"num_local_experts": 4, "sliding_window": 6, "head_dim": 24}),
    "qwen2": ("Qwen2Moe", "qwen2_moe", QWEN2),
    "qwen2-dense-layers": (
        "Qwen2Moe",
        "qwen2_moe",
        {**QWEN2, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen2-renormalised": ("Qwen2Moe", "qwen2_moe", {**QWEN2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen3": ("Qwen3Moe", "qwen3_moe", {**QWEN, "norm_topk_prob": True, "head_dim": 24}),
    "qwen3-tied": ("Qwen3Moe", "qwen3_moe", {**QWEN, "tie_word_embeddings": True, "mlp_only_layers": [0]}),
    "olmoe": ("Olmoe", "olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-clipped": ("Olmoe", "olmoe", {"num_experts": 8, "clip_qkv": 0.4, "norm_topk_prob": True}),
    "granite": ("GraniteMoe", "granitemoe", GRANITE),
    "granite-biases-tied": (
        "GraniteMoe",
        "granitemoe",
        {**GRANITE, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gpt-oss": (
        "GptOss",
        "gpt_oss",
        {**GPT, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
    "gpt-oss-plain-rope": (
        "GptOss",
        "gpt_oss",
        {
            **GPT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gpt-oss-wide": ("GptOss", "gpt_oss", {**GPT, "intermediate_size": 96, "sliding_window": 100}),
    "llama4": ("Llama4", "llama4", LLAMA4),
    "llama4-interleaved": (
        "Llama4",
        "llama4",
        {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "attn_temperature_tuning": False},
    ),
    "llama4-nope-first": ("Llama4", "llama4", {**LLAMA4, "no_rope_layers": [0, 1, 0, 1]}),
    "minimax": ("MiniMaxM2", "minimax_m2", {**MINIMAX, "rotary_dim": 8}),
    "glm": ("Glm4Moe", "glm4_moe", {**BIASED, "attention_bias": True, "routed_scaling_factor": 2.5}),
    "glm-normed-groups": (
        "Glm4Moe",
        "glm4_moe",
        {**BIASED, "use_qk_norm": True, "partial_rotary_factor": 0.25, "n_group": 2, "topk_group": 1},
    ),
    "dots": (
        "Dots1",
        "dots1",
        {**BIASED, "sliding_window": None, "attention_bias": True, "routed_scaling_factor": 2.5},
    ),
    "minimax-whole": ("MiniMaxM2", "minimax_m2", {**MINIMAX, "rotary_dim": 16}),
}


def randomised(model: nn.Module) -> Any:
    """Weights that leave nothing at a neutral value: norms, biases of the choice too."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=gen)
            if "norm" in name:
                param.add_(noise * 0.2)
            else:
                param.copy_(noise * (0.3 if param.dim() == 1 else 0.15))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=gen) * 0.1)
    return model.eval().requires_grad_(False)


def build(name: str, **changes: Any) -> Any:
    kind, _, settings = CASES[name]
    config = "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config"
    config = getattr(transformers, config)(**{**BASE, **settings, **changes})
    return randomised(getattr(transformers, f"{kind}ForCausalLM")(config))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return archzoo.checkpoint.load(path)


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", CASES)
def test_folder_and_logits_both_ways(name: str, tmp_path: Path, tokens: Any) -> None:
    hf, ids = build(name), tokens(2, 21, vocab=96)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf.save_pretrained(theirs, max_shard_size="60KB")
    model = archzoo.load(theirs)
    hf.save_pretrained(tmp_path / "fused", save_original_format=False)
    for a, b in zip(archzoo.load(tmp_path / "fused").parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert model.config.family == CASES[name][1]
    with torch.inference_mode():
        expected = hf(ids).logits
        assert expected.std() > 0.05
        assert_close(model(ids).logits, expected)
        cache, past = model.new_cache(2), None
        for part in ids.split([13, 1, 1, 1, 1, 1, 1, 1, 1], 1):
            out, past = hf_step(hf, part, past)
            assert_close(model(part, cache=cache).logits, out.logits)
    archzoo.save(model, ours)
    assert json.loads((ours / "config.json").read_text())["model_type"] == hf.config.model_type
    assert_same_tensors(theirs, ours)
    again, info = type(hf).from_pretrained(ours, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        assert_close(again.eval()(ids).logits, expected, 1e-5)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(again.config, key) == getattr(hf.config, key)
    assert archzoo.load(ours).config.specs == model.config.specs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(name) -> (transformers' model, its folder), written once."""
    root, done = tmp_path_factory.mktemp("saved"), {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in done:
            done[name] = build(name)
            done[name].save_pretrained(root / name)
        return done[name], root / name

    return get


# --- routers and experts ---------------------------------------------------------------------------

ROUTERS = {
    "v2-lite": "mlp.gate",
    "v2-groups": "mlp.gate",
    "v3": "mlp.gate",
    "v3-halves": "mlp.gate",
    "kimi": "mlp.gate",
    "mixtral": "mlp.gate",
    "qwen2": "mlp.gate",
    "qwen2-renormalised": "mlp.gate",
    "qwen3": "mlp.gate",
    "olmoe": "mlp.gate",
    "granite": "block_sparse_moe.router",
    "gpt-oss": "mlp.router",
    "minimax": "mlp.gate",
    "glm": "mlp.gate",
    "dots": "mlp.gate",
    "llama4": "feed_forward.router",
}


@pytest.mark.parametrize(("name", "path"), ROUTERS.items())
def test_routers_choose_the_same_experts(name: str, path: str, saved: Any) -> None:
    hf, folder = saved(name)
    layer, ours = hf.model.layers[-1], archzoo.load(folder).layers[-1].ffn
    x = torch.randn(500, 64)
    with torch.inference_mode():
        bias = (layer.mlp.e_score_correction_bias,) if name == "minimax" else ()
        out = layer.get_submodule(path)(x, *bias)
        if name == "llama4":  # scores of all experts, 0 where not chosen
            theirs, their_ids = out[0].topk(1)
        else:
            _, theirs, their_ids = out
        weights, ids = ours.route(x)
    count = ours.config.experts
    assert torch.equal(ids.sort(1).values, their_ids.sort(1).values)
    zero = torch.zeros(500, count)
    assert_close(zero.scatter(1, ids, weights), zero.scatter(1, their_ids, theirs), 1e-6)
    if ours.config.renormalize:
        assert_close(weights.sum(1), torch.full((500,), ours.config.scale), 1e-6)
    assert len(ids.unique()) == count


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["v3", "mixtral", "gpt-oss"])
def test_logits_equal_every_expert_backend(name: str, backend: str, saved: Any, tokens: Any) -> None:
    _, folder = saved(name)
    kind = f"{CASES[name][0]}ForCausalLM"
    hf = getattr(transformers, kind).from_pretrained(
        folder, attn_implementation="eager", experts_implementation=backend
    )
    ids = tokens(2, 12, vocab=96)
    with torch.inference_mode():
        assert_close(archzoo.load(folder)(ids).logits, hf.eval()(ids).logits, 1e-5)


def test_selection_bias_has_no_gradient_and_the_router_has(saved: Any, tokens: Any) -> None:
    model, ids = archzoo.load(saved("v3")[1]).train(), tokens(2, 12, vocab=96)
    model(ids, labels=ids).loss.backward()
    moe = model.layers[1].ffn
    assert not moe.selection_bias.requires_grad
    assert moe.selection_bias.dtype == torch.float32
    assert moe.router.weight.grad.abs().max() > 0


def test_gpt_oss_stores_gate_and_up_in_turns(saved: Any) -> None:
    _, folder = saved("gpt-oss")
    stored, experts = tensors_of(folder), archzoo.load(folder).layers[0].ffn.experts
    prefix = "model.layers.0.mlp.experts."
    gate, up = experts.gate_up.chunk(2, 1)
    assert torch.equal(stored[prefix + "gate_up_proj"][..., ::2], gate.transpose(1, 2))
    assert torch.equal(stored[prefix + "gate_up_proj"][..., 1::2], up.transpose(1, 2))
    gate, up = experts.gate_up_bias.chunk(2, 1)
    assert torch.equal(stored[prefix + "gate_up_proj_bias"][..., ::2], gate)
    assert torch.equal(stored[prefix + "gate_up_proj_bias"][..., 1::2], up)
    assert torch.equal(stored[prefix + "down_proj"], experts.down.transpose(1, 2))


# --- folders that are not as transformers writes them ----------------------------------------------


def copy(source: Path, target: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """A folder with other tensors, and other keys in config.json (... removes one)."""
    archzoo.checkpoint.save(tensors, target)
    data = {**json.loads((source / "config.json").read_text()), **settings}
    (target / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    return target


def test_prediction_modules_are_left_out(saved: Any, tmp_path: Path, tokens: Any) -> None:
    _, source = saved("v3")
    tensors, ids = tensors_of(source), tokens(1, 9, vocab=96)
    extra = {k.replace("layers.1.", "layers.2."): v for k, v in tensors.items() if "layers.1." in k}
    names = ("enorm.weight", "hnorm.weight", "embed_tokens.weight", "shared_head.head.weight")
    extra |= {f"model.layers.2.{name}": torch.zeros(3) for name in names}
    head = {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)}
    path = copy(source, tmp_path / "mtp", {**tensors, **extra, **head}, num_nextn_predict_layers=1)
    with torch.inference_mode():
        assert torch.equal(archzoo.load(path)(ids).logits, archzoo.load(source)(ids).logits)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\..* has no place in the model"):
        archzoo.load(copy(source, tmp_path / "layers", {**tensors, **extra}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\..* has no place in the model"):
        archzoo.load(copy(source, tmp_path / "fewer", {**tensors, **extra, **head}, num_hidden_layers=1))


def with_prediction_modules(source: Path, target: Path, depth: int = 1, **settings: Any) -> Path:
    """The folder and `depth` modules as the published ones have them, with weights of their own."""
    tensors, gen = tensors_of(source), torch.Generator().manual_seed(7)
    layer = {k: v for k, v in tensors.items() if k.startswith("model.layers.1.")}
    for k in range(depth):
        prefix = f"model.layers.{2 + k}."
        for name, old in layer.items():
            noise = torch.randn(old.shape, generator=gen) * 0.1
            tensors[name.replace("model.layers.1.", prefix)] = noise + (old if "norm" in name else 0)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}{name}.weight"] = 1 + torch.randn(64, generator=gen) * 0.1
        tensors[f"{prefix}eh_proj.weight"] = torch.randn(64, 128, generator=gen) * 0.1
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return copy(source, target, tensors, num_nextn_predict_layers=depth, **settings)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["v3", "glm"])
def test_prediction_modules_both_ways(name: str, depth: int, saved: Any, tmp_path: Path, tokens: Any) -> None:
    _, source = saved(name)
    path = with_prediction_modules(source, tmp_path / "mtp", depth)
    model, plain = archzoo.load(path, mtp=True), archzoo.load(path)
    assert (model.config.mtp.depth, model.config.family) == (depth, plain.config.family)
    assert plain.config.mtp is None
    stored, module = tensors_of(path), model.mtp[depth - 1]
    prefix = f"model.layers.{1 + depth}."
    assert torch.equal(module.eh_proj.weight, stored[f"{prefix}eh_proj.weight"])
    assert torch.equal(module.norm.weight, stored[f"{prefix}shared_head.norm.weight"])
    down = stored[f"{prefix}mlp.experts.3.down_proj.weight"]
    assert torch.equal(module.layer.ffn.experts.down[3], down)
    ids = tokens(1, 9, vocab=96)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    archzoo.save(model, tmp_path / "ours")
    file = "model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (path / file).read_bytes()
    assert json.loads((tmp_path / "ours/config.json").read_text())["num_nextn_predict_layers"] == depth
    archzoo.save(plain, tmp_path / "plain")
    assert_same_tensors(tmp_path / "plain", source)
    expected = archzoo.generate(plain, ids, 20, stop_tokens=[])
    assert torch.equal(archzoo.generate(model, ids, 20, stop_tokens=[], use_mtp=True), expected)


@pytest.mark.parametrize("name", ["v3", "glm"])
def test_transformers_reads_our_prediction_modules(
    name: str, saved: Any, tmp_path: Path, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the modules of each published model by the numbers of their layers."""
    layers = pytest.importorskip("transformers.modeling_layers")
    _, source = saved(name)
    model = archzoo.load(with_prediction_modules(source, tmp_path / "mtp"), mtp=True)
    archzoo.save(model, tmp_path / "ours")
    kind = getattr(transformers, f"{CASES[name][0]}ForCausalLM")
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\."])
    hf = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    theirs, ids = layers.MtpModel.from_pretrained(hf), tokens(1, 9, vocab=96)
    at = torch.arange(1, 9)[None]
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        hidden = hf.model(ids).last_hidden_state[:, :-1]
        rotary = theirs.rotary_emb(hidden, at)
        embedded = hf.model.embed_tokens(ids[:, 1:])
        expected = theirs.layers[0](embedded, hidden, rotary, mask, at, None)
        got = model.mtp[0](model.embed(ids[:, 1:]), model.backbone(ids)[:, :-1], model.context(ids[:, :-1]))
    assert expected.std() > 0.05
    assert_close(got, expected)


def test_prediction_modules_that_do_not_fit(saved: Any, tmp_path: Path) -> None:
    _, source = saved("v3")
    path = with_prediction_modules(source, tmp_path / "mtp")
    tensors, layer = tensors_of(path), "model.layers.2."
    copies = {n for n in tensors if n.endswith(("2.embed_tokens.weight", "shared_head.head.weight"))}
    assert len(copies) == 2

    def folder(name: str, tensors: dict[str, Tensor], depth: int = 1) -> Path:
        return copy(path, tmp_path / name, tensors, num_nextn_predict_layers=depth)

    bare = folder("bare", {n: t for n, t in tensors.items() if n not in copies})
    archzoo.save(archzoo.load(bare, mtp=True), tmp_path / "whole")
    assert_same_tensors(tmp_path / "whole", path)
    with pytest.raises(CheckpointError, match=r"names no prediction modules to load with mtp=True"):
        archzoo.load(folder("none", tensors, 0), mtp=True)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.3\..* is missing"):
        archzoo.load(folder("two", tensors, 2), mtp=True)
    for name in sorted(copies):
        with pytest.raises(CheckpointError, match=rf"'{name}' differs from that of the model"):
            archzoo.load(folder("other", {**tensors, name: tensors[name] + 1}), mtp=True)
        with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[3\]"):
            archzoo.load(folder("shape", {**tensors, name: torch.zeros(3)}), mtp=True)
    extra = {f"{layer}self_attn.gate.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.self_attn\.gate.* has no place"):
        archzoo.load(folder("extra", {**tensors, **extra}), mtp=True)
    assert archzoo.load(folder("spare", {**tensors, **extra})).config.mtp is None


def test_weight_of_the_prediction_loss_survives_the_folder(tmp_path: Path) -> None:
    tiny = archzoo.config("deepseek-v3").tiny().override("mtp.depth=1", "mtp.weight=0.1")
    archzoo.save(archzoo.build(tiny, dtype=torch.bfloat16), tmp_path / "m")
    again = archzoo.load(tmp_path / "m", mtp=True)
    assert (again.config.family, again.config.mtp) == ("deepseek_v3", tiny.mtp)
    assert {p.dtype for p in again.mtp.parameters()} == {torch.bfloat16}


def test_parameters_of_deepseek_v3s_prediction_module() -> None:
    """The published 11.5B unique and 2.4B activated (embedding and head included) leave out `eh_proj`."""
    config = archzoo.config("deepseek-v3")
    further, d = config.override("mtp.depth=1"), config.hidden_size
    unique = archzoo.cost(further).params - archzoo.cost(config).params
    assert unique == further.mtp_params == 11_610_068_224
    projection, shared = 2 * d * d, 2 * config.vocab_size * d
    assert round((unique - projection) / 1e9, 1) == 11.5
    active = config.specs[-1].active_params(d) + 3 * d
    assert round((active + shared) / 1e9, 1) == 2.4
    assert archzoo.cost(config).params == 671_026_404_352 + 14_848


def test_kimi_model_type(saved: Any, tmp_path: Path, tokens: Any) -> None:
    _, source = saved("kimi")
    path, ids = (
        copy(source, tmp_path / "k2", tensors_of(source), model_type="kimi_k2"),
        tokens(1, 9, vocab=96),
    )
    with torch.inference_mode():
        assert torch.equal(archzoo.load(path)(ids).logits, archzoo.load(source)(ids).logits)


def test_llama4_text_model_inside_its_vision_language_folder(saved: Any, tmp_path: Path, tokens: Any) -> None:
    _, source = saved("llama4-interleaved")
    text = json.loads((source / "config.json").read_text())
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(source).items()}
    tensors |= {"vision_model.class_embedding": torch.zeros(3)}
    tensors |= {"multi_modal_projector.linear_1.weight": torch.zeros(3)}
    path, ids = tmp_path / "vl", tokens(1, 9, vocab=96)
    archzoo.checkpoint.save(tensors, path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    with torch.inference_mode():
        assert torch.equal(archzoo.load(path)(ids).logits, archzoo.load(source)(ids).logits)
    archzoo.save(archzoo.load(path), tmp_path / "text")
    assert_same_tensors(tmp_path / "text", source)


def test_step3_text_model_inside_its_vision_language_folder(tmp_path: Path, tokens: Any) -> None:
    """No transformers class has it: names and shapes as its serving code reads them."""
    model = archzoo.build(archzoo.config("step-3").tiny(), seed=2).eval()
    source = tmp_path / "text"
    archzoo.save(model, source)
    tensors, data = tensors_of(source), json.loads((source / "config.json").read_text())
    assert data["model_type"] == "step3_text"
    layer = {n.removeprefix("model.layers.1."): t.shape for n, t in tensors.items() if ".layers.1." in n}
    assert layer["moe.gate_proj.weight"] == layer["moe.up_proj.weight"] == (8, 32, 64)
    assert layer["moe.down_proj.weight"] == (8, 64, 32)
    assert layer["self_attn.wq.weight"] == (64, 32)
    assert {"moe.gate.weight", "share_expert.up_proj.weight", "self_attn.inter_norm.weight"} <= set(layer)
    assert torch.equal(
        tensors["model.layers.1.moe.up_proj.weight"], model.layers[1].ffn.experts.gate_up[:, 32:]
    )
    vision = {"vision_model.embeddings.weight": torch.zeros(3), "vit_large_projector.weight": torch.zeros(3)}
    text = {**data, "moe_layers_enum": [1]}
    archzoo.checkpoint.save({**tensors, **vision}, tmp_path / "vl")
    (tmp_path / "vl" / "config.json").write_text(json.dumps({"model_type": "step3_vl", "text_config": text}))
    ids = tokens(1, 9)
    with torch.inference_mode():
        assert torch.equal(archzoo.load(tmp_path / "vl")(ids).logits, model(ids).logits)


HUB: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "minimax-m2": {
        "model_type": "minimax_m2",
        "bos_token_id": 200034,
        "eos_token_id": 200020,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "max_position_embeddings": 196608,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200064,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_published_config_is_the_registered_model(name: str) -> None:
    expected = archzoo.config(name)
    family = families()[expected.family]
    assert family.reads({"config.json": HUB[name]})
    found = archzoo.ModelConfig.from_dict(family.read({"config.json": HUB[name]}))
    assert found.specs == expected.specs
    depth = HUB[name].get("num_nextn_predict_layers", 0)
    assert (found.mtp.depth if found.mtp else 0) == depth  # of the files, not of the registered model
    other = {"name", "family", "layers", "source", "mtp"}
    assert found.model_dump(exclude=other) == expected.model_dump(exclude=other)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_bias = True": ("v2-lite", {"attention_bias": True}),
    "norm_topk_prob = True": ("v2-lite", {"norm_topk_prob": True}),
    "topk_method = 'noaux_tc'": ("v2-lite", {"topk_method": "noaux_tc"}),
    "moe_layer_freq = 2": ("v3", {"moe_layer_freq": 2}),
    "scoring_func = 'softmax'": ("v3", {"scoring_func": "softmax"}),
    "quant_method = 'gptq'": ("gpt-oss", {"quantization_config": {"quant_method": "gptq"}}),
    r"weight_block_size = \[64, 64\]": (
        "v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
    ),
    "swiglu_limit = 9.0": ("gpt-oss", {"swiglu_limit": 9.0}),
    "use_sliding_window = True": ("qwen3", {"use_sliding_window": True}),
    "head_dim = 24": ("olmoe", {"head_dim": 24}),
    "use_routing_bias = False": ("minimax", {"use_routing_bias": False}),
    "hidden_act 'gelu'": ("mixtral", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_no_block_has_are_refused(message: str, saved: Any, tmp_path: Path) -> None:
    name, settings = REFUSED[message]
    _, source = saved(name)
    path = copy(source, tmp_path / "other", tensors_of(source), **settings)
    with pytest.raises(
        (CheckpointError, ConfigError), match=rf"config\.json: {message}.* not supported, exp"
    ):
        archzoo.load(path)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("deepseek-v2", "layers.default.ffn.renormalize=true", "norm_topk_prob"),
        ("deepseek-v3", "layers.default.ffn.selection_bias=false", "layer 3: ffn.selection_bias"),
        ("deepseek-v3", "layers.default.mixer.latent_norm_eps=1e-5", "layer 0: mixer.latent_norm_eps"),
        ("mixtral-8x7b", "layers.default.ffn.renormalize=false", "layer 0: ffn.renormalize"),
        ("mixtral-8x7b", "layers.default.mixer.sinks=true", "layer 0: mixer.sinks"),
        ("qwen3-30b-a3b", "layers.default.mixer.qk_norm=full", "layer 0: mixer.qk_norm"),
        ("olmoe-1b-7b", "layers.default.mixer.head_dim=64", "head_dim"),
        ("gpt-oss-20b", "layers.default.ffn.activation=swiglu", "layer 0: ffn.activation"),
        ("gpt-oss-20b", "embed_scale=2.0", "embed_scale = 2.0"),
        (
            "granite-3.0-1b-a400m",
            "layers.override=[{indices=[1], residual={scale=1.0}}]",
            "layer 1: residual",
        ),
        ("llama-4-scout", "layers.default.mixer.chunk=64", None),
        ("minimax-m2", "layers.default.mixer.rotary_dim=32", None),
    ],
)
def test_a_layout_says_what_it_cannot_hold(name: str, change: str, field: str | None) -> None:
    from archzoo.checkpoint.folder import _misfit

    config = archzoo.config(name).override(change)
    found = _misfit(families()[config.family], config)
    assert found is None if field is None else field in found


# --- fewer bits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A DeepSeek-V3 folder in 8 bits, sizes that are no multiple of 128, and what its tensors stand for."""
    config = archzoo.config("deepseek-v3").tiny().override("hidden_size=160", "init_std=0.1")
    root = tmp_path_factory.mktemp("eight")
    archzoo.save(archzoo.build(config, seed=4), root / "plain")
    small, meant = {}, {}
    for name, tensor in tensors_of(root / "plain").items():
        linear = tensor.dim() == 2 and not any(n in name for n in ("embed", "lm_head", "mlp.gate."))
        if linear:
            small[name], small[name + "_scale_inv"] = quantize_blocks(tensor)
            meant[name] = dequantize_blocks(small[name], small[name + "_scale_inv"])
        else:
            small[name] = meant[name] = tensor if "e_score" in name else tensor.bfloat16()
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return copy(root / "plain", root / "small", small, quantization_config=quantization), meant


def test_eight_bit_folder_stands_for_weight_times_scale(
    eight: tuple[Path, dict[str, Tensor]], tmp_path: Path, tokens: Any
) -> None:
    folder, meant = eight
    shapes = {tuple(t.shape) for n, t in tensors_of(folder).items() if n.endswith("_scale_inv")}
    assert {(1, 2), (2, 1)} <= shapes
    wide = archzoo.load(folder, dtype=torch.float32)
    archzoo.save(wide, tmp_path / "wide")
    found = tensors_of(tmp_path / "wide")
    assert sorted(found) == sorted(meant)
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor.float()), name
    narrow, ids = archzoo.load(folder), tokens(1, 9)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert narrow.layers[1].ffn.selection_bias.dtype == torch.float32
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    with torch.inference_mode():
        assert wide(ids).logits.isfinite().all()
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())


def test_scales_of_another_block_size_are_refused(
    eight: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = eight
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name + "_scale_inv"] = torch.ones(3, 2)
    message = rf"'{name}_scale_inv' has shape \[3, 2\], a weight \[160, 96\] asks for \[2, 1\]"
    with pytest.raises(CheckpointError, match=message):
        archzoo.load(copy(folder, tmp_path / "scales", tensors))
    del tensors[name + "_scale_inv"]
    with pytest.raises(CheckpointError, match=rf"'{name}' has dtype torch.float8_e4m3fn, expected one of"):
        archzoo.load(copy(folder, tmp_path / "none", tensors))


def test_four_bit_experts_of_gpt_oss(saved: Any, tmp_path: Path, tokens: Any) -> None:
    """The published folders: two values a byte, a power of two for 32 of them (transformers as oracle)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    _, source = saved("gpt-oss-wide")
    tensors = {n: t if "router" in n else t.bfloat16() for n, t in tensors_of(source).items()}
    plain = dict(tensors)
    for name, tensor in tensors_of(source).items():
        if tensor.dim() == 3:
            experts, inner, outer = tensor.shape
            blocks = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 126, (experts, outer, inner // 32), dtype=torch.uint8)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
            assert plain[name].shape == tensor.shape
    four = copy(source, tmp_path / "four", tensors, quantization_config={"quant_method": "mxfp4"})
    bf16 = copy(source, tmp_path / "bf16", plain)
    left, right = archzoo.load(four), archzoo.load(bf16)
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert left.layers[0].ffn.experts.gate_up.dtype == torch.bfloat16
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :, :0]
    with pytest.raises(
        CheckpointError, match=rf"'{name}' has shape .* a weight \[8, 96, 64\] asks for \[8, 64, 3\]"
    ):
        archzoo.load(copy(source, tmp_path / "short", tensors))
