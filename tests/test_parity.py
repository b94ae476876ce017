"""Against transformers: logits, cached decode, folders both ways, and single layers by copied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import hf_step
from torch import Tensor, nn

import archzoo
from archzoo.blocks.context import Context
from archzoo.blocks.ffns.moe import MoEConfig
from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.blocks.registry import Site
from archzoo.blocks.rope import RopeConfig
from archzoo.cache import Timeline

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 24},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn-defaults": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        "max_position_embeddings": 64,
    },
}
MAMBAS: dict[str, dict[str, Any]] = {
    "one-group": {"n_groups": 1},
    "groups-tied": {"n_groups": 4, "tie_word_embeddings": True},
    "dt-limit": {"n_groups": 1, "time_step_limit": (0.01, 0.05)},
}


def randomised(model: nn.Module) -> Any:
    """Weights that leave nothing at a neutral value: norms, biases, decays."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=gen)
            if param.dim() == 1 and "bias" not in name:
                param.add_(noise * 0.2)
            else:
                param.copy_(noise * (0.3 if param.dim() == 1 else 0.1))
    return model.eval().requires_grad_(False)


def hf_llama(**changes: Any) -> Any:
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 5,
        "attn_implementation": "eager",
    }
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes))))


def hf_mamba2(**changes: Any) -> Any:
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "num_hidden_layers": 2,
        "chunk_size": 8,
        "layer_norm_epsilon": 1e-5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 5,
    }
    return randomised(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(settings | changes))))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def folder_of(hf: Any, path: Path, shard: str = "4GB") -> Path:
    hf.save_pretrained(path, max_shard_size=shard)
    return path


def tensors_of(path: Path) -> dict[str, tuple[torch.dtype, Tensor]]:
    """Every stored tensor of a folder as bytes, by name."""
    safetensors = pytest.importorskip("safetensors.torch")
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in safetensors.load_file(file).items():
            out[name] = (tensor.dtype, tensor.contiguous().flatten().view(torch.uint8))
    return out


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert sorted(left) == sorted(right)
    for name, (dtype, data) in left.items():
        assert dtype == right[name][0], name
        assert torch.equal(data, right[name][1]), name


MODELS = [(hf_llama, c) for c in LLAMAS.values()] + [(hf_mamba2, c) for c in MAMBAS.values()]
IDS = [f"llama-{n}" for n in LLAMAS] + [f"mamba2-{n}" for n in MAMBAS]


@pytest.mark.parametrize(("make", "changes"), MODELS, ids=IDS)
def test_folder_and_logits_both_ways(make: Any, changes: dict[str, Any], tmp_path: Path, tokens: Any) -> None:
    hf, ids = make(**changes), tokens(2, 21, vocab=96)
    theirs = folder_of(hf, tmp_path / "theirs", shard="60KB")
    model = archzoo.load(theirs)
    with torch.inference_mode():
        expected = hf(ids).logits
        assert_close(model(ids).logits, expected)
        # cached decode beside transformers' own cache
        cache, past = model.new_cache(2), None
        for part in ids.split([13, 1, 1, 1, 1, 1, 1, 1, 1], 1):
            out, past = hf_step(hf, part, past)
            if make is hf_mamba2 and "time_step_limit" in changes and part.shape[1] == 1:
                continue  # transformers' single step forgets the limit
            assert_close(model(part, cache=cache).logits, out.logits)
    ours = tmp_path / "ours"
    archzoo.save(model, ours)
    assert_same_tensors(theirs, ours)
    again = type(hf).from_pretrained(ours, attn_implementation="eager").eval()
    with torch.inference_mode():
        assert_close(again(ids).logits, expected, 1e-5)
    assert archzoo.load(ours).config.specs == model.config.specs


def test_random_init_of_ours_loads_there(tmp_path: Path, tokens: Any) -> None:
    for name, cls in (("smollm2-135m", "LlamaForCausalLM"), ("mamba2-130m", "Mamba2ForCausalLM")):
        for dtype in (torch.float32, torch.bfloat16):
            config = archzoo.config(name).tiny().override("init_std=0.1")
            model = archzoo.build(config, dtype=dtype).eval()
            path = tmp_path / f"{name}-{dtype}"
            archzoo.save(model, path)
            hf, info = getattr(transformers, cls).from_pretrained(
                path, output_loading_info=True, dtype="auto"
            )
            assert not any(info.values()), info
            assert hf.dtype == dtype
            assert_same_tensors(path, folder_of(hf, tmp_path / f"back-{name}-{dtype}"))
            ids = tokens(1, 9)
            with torch.inference_mode():
                if dtype == torch.float32:
                    assert_close(hf.eval()(ids).logits, model(ids).logits)


def test_loading_beside_transformers_keys_of_older_versions(tmp_path: Path, tokens: Any) -> None:
    """rope_theta and rope_scaling at the top level, `type`, defaults left out, a list of eos."""
    yarn = {k: v for k, v in YARN.items() if not k.startswith("original")}
    hf, ids = hf_llama(rope_parameters=yarn, max_position_embeddings=32), tokens(1, 9, vocab=96)
    path = folder_of(hf, tmp_path / "old")
    file = path / "config.json"
    data = json.loads(file.read_text())
    rope = data.pop("rope_parameters")
    assert rope.pop("original_max_position_embeddings") == 32
    data["rope_theta"] = rope.pop("rope_theta")
    data["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    data |= {"eos_token_id": [5, 6]}
    del data["head_dim"], data["attention_bias"], data["mlp_bias"], data["tie_word_embeddings"]
    file.write_text(json.dumps(data))
    model = archzoo.load(path)
    assert model.config.eos_token_id == (5, 6)
    with torch.inference_mode():
        assert_close(model(ids).logits, hf(ids).logits)


# --- single layers ---------------------------------------------------------------------------------


def deepseek(version: int, **changes: Any) -> Any:
    settings = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "max_position_embeddings": 256,
        "attn_implementation": "eager",
    }
    if version == 3:
        settings |= {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
    cls = getattr(transformers, f"DeepseekV{version}Config")
    return cls(**(settings | changes))


SCALED = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 1e4,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "kv_a_layernorm": "kv_a_norm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("rope", [None, SCALED], ids=["plain", "yarn40"])
@pytest.mark.parametrize("interleave", [True, False])
def test_mla_equals_deepseek(version: int, q_rank: int | None, rope: Any, interleave: bool) -> None:
    """Whole pass, and decode token by token through the absorbed form."""
    if version == 2 and not interleave:
        pytest.skip("V2 always pairs neighbours")
    settings = {"rope_parameters": rope} if rope else {}
    if version == 3:
        settings["rope_interleave"] = interleave
    config = deepseek(version, q_lora_rank=q_rank, **settings)
    module = __import__(
        f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}", fromlist=["x"]
    )
    theirs = randomised(getattr(module, f"DeepseekV{version}Attention")(config, layer_idx=0)).double()
    ours = MLAConfig(
        heads=4,
        kv_heads=4,
        q_rank=q_rank,
        kv_rank=16,
        nope_dim=12,
        rope_dim=8,
        v_dim=10,
        rope=RopeConfig(
            interleaved=interleave,
            **(
                {"kind": "yarn", "factor": 40.0, "original_max_positions": 8, "mscale": 0.707}
                | {"mscale_all_dim": 0.707}
                if rope
                else {}
            ),
        ),
    )
    mixer = ours.build(Site(0, 1, 64, 1e-6)).double().requires_grad_(False)
    mixer.load_state_dict(
        {k.replace(k.split(".")[0], NAMES[k.split(".")[0]]): v for k, v in theirs.state_dict().items()}
    )
    x = torch.randn(2, 40, 64, dtype=torch.float64)
    rotary = getattr(module, f"DeepseekV{version}RotaryEmbedding")(config)
    mask = torch.full((40, 40), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    with torch.inference_mode():
        tables = rotary(x, torch.arange(40)[None])
        expected = theirs(x, attention_mask=mask, position_embeddings=tables)[0]
        assert mixer.scale == pytest.approx(theirs.scaling, rel=1e-12)
        assert_close(mixer(x, Context((2, 40), x.device)), expected, 1e-5)  # their tables are fp32
        timeline, state = Timeline(2, x.device), mixer.new_state(2, 40, x.device, x.dtype)
        steps = [
            mixer(part, Context(part.shape[:2], x.device, timeline=timeline), state)
            for part in x.split([30] + [1] * 10, 1)
        ]
    assert ours.absorbs(1, 31)
    assert_close(torch.cat(steps, 1), expected, 1e-5)


def test_moe_equals_deepseek_v2() -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = deepseek(2, topk_method="greedy", routed_scaling_factor=1.5)
    theirs = randomised(DeepseekV2Moe(config))
    ours = MoEConfig(experts=8, top_k=3, hidden=24, shared=2, scale=1.5)
    compare_moe(theirs, ours)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_experts_equal_every_backend_of_transformers(backend: str) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = deepseek(2, topk_method="greedy")
    config._experts_implementation = backend
    compare_moe(randomised(DeepseekV2Moe(config)), MoEConfig(experts=8, top_k=3, hidden=24, shared=2))


def compare_moe(theirs: Any, config: MoEConfig) -> None:
    layer = config.build(Site(0, 1, 64, 1e-6)).requires_grad_(False)
    layer.router.weight.copy_(theirs.gate.weight)
    layer.experts.gate_up.copy_(theirs.experts.gate_up_proj)
    layer.experts.down.copy_(theirs.experts.down_proj)
    layer.shared.load_state_dict(theirs.shared_experts.state_dict())
    x = torch.randn(2, 11, 64)
    assert_close(layer(x), theirs(x), 1e-5)


def test_router_equals_deepseek_v3() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    from archzoo.ops.moe import gate

    config = deepseek(
        3, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=2.5, norm_topk_prob=True
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    bias = torch.randn(16) * 0.05
    router.e_score_correction_bias.copy_(bias)
    x = torch.randn(500, 64)
    with torch.inference_mode():
        _, theirs, their_ids = router(x)
        weights, ids = gate(
            torch.nn.functional.linear(x, router.weight),
            top_k=4,
            score="sigmoid",
            bias=bias,
            groups=4,
            top_groups=2,
            renormalize=True,
            scale=2.5,
        )
    zero = torch.zeros(500, 16)
    assert torch.equal(ids.sort(1).values, their_ids.sort(1).values)
    assert_close(zero.scatter(1, ids, weights), zero.scatter(1, their_ids, theirs), 1e-6)
    assert_close(weights.sum(1), torch.full((500,), 2.5), 1e-6)


def test_qk_norm_equals_qwen3() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    theirs = randomised(Qwen3Attention(config, layer_idx=0))
    ours = AttentionConfig(heads=4, kv_heads=2, head_dim=16, qk_norm="head")
    mixer = ours.build(Site(0, 1, 64, 1e-6)).requires_grad_(False)
    mixer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 64)
    tables = Qwen3RotaryEmbedding(config)(x, torch.arange(20)[None])
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=tables)[0]
    assert_close(mixer(x, Context((2, 20), x.device)), expected, 1e-5)
