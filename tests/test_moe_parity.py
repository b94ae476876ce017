"""Mixture-of-experts models against transformers: logits, cached decode, folders both ways, routers, 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archzoo

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
    "llama4": ("Llama4", "llama4", LLAMA4),
    "llama4-interleaved": (
        "Llama4",
        "llama4",
        {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "attn_temperature_tuning": False},
    ),
    "llama4-nope-first": ("Llama4", "llama4", {**LLAMA4, "no_rope_layers": [0, 1, 0, 1]}),
    "minimax": ("MiniMaxM2", "minimax_m2", {**MINIMAX, "rotary_dim": 8}),
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


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_folder_and_logits_both_ways(name: str, tmp_path: Path, tokens: Any) -> None:
    hf, ids = build(name), tokens(2, 21, vocab=96)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf.save_pretrained(theirs, max_shard_size="60KB")
    model = archzoo.load(theirs)
    assert model.config.family == CASES[name][1]
    with torch.inference_mode():
        expected = hf(ids).logits
        assert expected.std() > 0.05
        assert_close(model(ids).logits, expected)
        cache, past = model.new_cache(2), None
        for part in ids.split([13, 1, 1, 1, 1, 1, 1, 1, 1], 1):
            out = hf(part, use_cache=True, past_key_values=past)
            past = out.past_key_values
            assert_close(model(part, cache=cache).logits, out.logits)
    archzoo.save(model, ours)
    assert json.loads((ours / "config.json").read_text())["model_type"] == hf.config.model_type
    assert_same_tensors(theirs, ours)
    again, info = type(hf).from_pretrained(ours, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        assert_close(again.eval()(ids).logits, expected, 1e-5)
    assert archzoo.load(ours).config.specs == model.config.specs
