"""Every registered model: published sizes, and the same laws of causality, caching and packing for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import archzoo
from archzoo import CausalLM, ModelConfig
from archzoo.blocks.mixers.attention import AttentionConfig
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.cache import Cache
from archzoo.errors import CacheError
from archzoo.ops.backend import backend

Tiny = Callable[..., CausalLM]
Tokens = Callable[..., Tensor]

# Published or counted from the published configs, to the unit.
PARAMS = {
    "deepseek-moe-2b": 1_974_039_040,  # published 2.0B
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-moe-145b": 144_620_638_208,  # published 144.6B
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352 + 58 * 256,  # selection biases
    "dots-llm1": 142_774_381_696,
    "glm-4.5": 352_797_829_024,
    "glm-4.5-air": 106_852_251_264,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "granite-3.0-1b-a400m": 1_334_628_352,
    "granite-3.0-3b-a800m": 3_298_793_472,
    "kimi-k2": 1_026_408_232_448,
    "llama-4-scout": 107_769_861_120,
    "minimax-m2": 228_689_764_864,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-130m": 134_105_856,
    "llama-130m-lns": 134_105_856,
    "llama-130m-mod": 134_105_856 + 6 * 768,  # six routers
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mamba2-130m": 128_989_632,
    "mamba2-2.7b": 2_702_599_680,
    "smollm2-135m": 134_515_008,
    "step-3": 316_294_538_240,
    "zebra-llama-1b-4mla-12m2": 1_285_700_736,
    "zebra-llama-1b-6mla-10m2": 1_276_425_152,
    "zebra-llama-1b-8mla-8m2": 1_267_149_568,
    "zebra-llama-3b-6mla-22m2": 3_389_592_112,
    "zebra-llama-3b-8mla-20m2": 3_359_502_752,
    "zebra-llama-3b-14mla-14m2": 3_269_234_672,
    "zebra-llama-8b-8mla-24m2": 8_379_095_296,
    "zebra-llama-8b-16mla-16m2": 8_185_746_944,
}
ACTIVE = {
    "deepseek-moe-2b": 317_370_880,  # published 0.3B
    "deepseek-moe-16b": 2_828_650_496,
    "deepseek-moe-145b": 22_195_195_904,  # published 22.2B
    "deepseek-v2": 21_375_800_320,
    "deepseek-v2-lite": 2_661_150_208,
    "deepseek-v3": 37_552_297_472,
    "dots-llm1": 14_016_588_928,
    "glm-4.5": 33_632_266_144,
    "glm-4.5-air": 13_424_129_664,
    "gpt-oss-20b": 3_608_307_264 + 201_088 * 2_880,
    "gpt-oss-120b": 5_132_849_472 + 201_088 * 2_880,
    "granite-3.0-1b-a400m": 428_658_688,
    "granite-3.0-3b-a800m": 882_874_368,
    "kimi-k2": 32_861_500_928,
    "llama-4-scout": 17_172_894_720,
    "minimax-m2": 11_030_553_088,
    "mixtral-8x7b": 12_879_925_248,
    "olmoe-1b-7b": 1_282_017_280,
    "qwen1.5-moe-a2.7b": 2_689_173_504,
    "qwen3-30b-a3b": 3_353_032_704,
}

# Layers that are MLA, and the per cent of the base Llama's KV cache that they keep (2505.17272).
ZEBRA = {
    "zebra-llama-1b-4mla-12m2": ([0, 5, 10, 14], 3.90625),
    "zebra-llama-1b-6mla-10m2": ([0, 2, 5, 8, 11, 14], 5.859375),
    "zebra-llama-1b-8mla-8m2": ([*range(0, 16, 2)], 7.8125),
    "zebra-llama-3b-6mla-22m2": ([0, 5, 10, 16, 21, 26], 112.5 / 56),
    "zebra-llama-3b-8mla-20m2": ([0, 3, 7, 10, 14, 18, 22, 26], 75 / 28),
    "zebra-llama-3b-14mla-14m2": ([*range(0, 28, 2)], 4.6875),
    "zebra-llama-8b-8mla-24m2": ([0, 4, 8, 12, 16, 20, 25, 30], 2.734375),
    "zebra-llama-8b-16mla-16m2": ([*range(0, 32, 2)], 5.46875),
}
BASE = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "8b": "llama-3.1-8b"}

# Bytes that one more token of one sequence adds in bf16.
PER_TOKEN = {
    "llama-3.2-1b": 32_768,
    "llama-3.2-3b": 114_688,
    "llama-3.1-8b": 131_072,
    "zebra-llama-1b-4mla-12m2": 1_280,
    "zebra-llama-3b-6mla-22m2": 2_304,
    "zebra-llama-8b-8mla-24m2": 3_584,
    "deepseek-moe-16b": 229_376,
    "deepseek-v2": 69_120,
    "deepseek-v2-lite": 31_104,
    "deepseek-v3": 70_272,
    "kimi-k2": 70_272,
    "gpt-oss-20b": 24_576,  # half of its layers are past their window
    "step-3": 2 * 31_232,  # the paper counts one byte a number
    "mamba2-2.7b": 0,
}


def counted(model: torch.nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def is_routed(model: CausalLM | ModelConfig) -> bool:
    config = model if isinstance(model, ModelConfig) else model.config
    return any(spec.depth.kind == "mod" for spec in config.specs)


def is_windowed(config: ModelConfig) -> bool:
    return any(getattr(spec.mixer, "reach", None) for spec in config.specs)


def is_recurrent(config: ModelConfig) -> bool:
    return any(spec.mixer.state_bytes(config.hidden_size, 2) for spec in config.specs)


def decode(model: CausalLM, ids: Tensor, cache: Cache, chunks: list[int]) -> Tensor:
    """Logits [B, T, V] of `ids` fed in pieces of the given lengths."""
    assert sum(chunks) == ids.shape[1]
    with torch.inference_mode():
        return torch.cat([model(part, cache=cache).logits for part in ids.split(chunks, 1)], 1)


def forward(model: CausalLM, ids: Tensor, **kwargs: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- sizes ----------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """The least processor time of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_parameters_and_build_time(model_name: str) -> None:
    config = archzoo.config(model_name)
    model = archzoo.build(config, device="meta")
    total, weights = counted(model), len(list(model.parameters()))
    assert all(t.device.type == "meta" for t in model.parameters())
    assert archzoo.cost(config).params == total
    assert total == PARAMS.get(model_name, total)
    # Against as many plain modules, which any model needs: below 2.3 for all.
    plain = seconds(lambda: [torch.nn.Linear(8, 8, bias=False, device="meta") for _ in range(weights)])
    assert seconds(lambda: archzoo.build(config, device="meta")) < 5 * plain


def test_published_sizes_are_of_registered_models() -> None:
    known = set(archzoo.list_models(with_aliases=False))
    assert {*PARAMS, *ACTIVE, *ZEBRA, *PER_TOKEN} <= known


@pytest.mark.parametrize(("name", "active"), ACTIVE.items())
def test_active_parameters(name: str, active: int) -> None:
    assert archzoo.cost(name).active_params == active


@pytest.mark.parametrize(("name", "gflops"), [("deepseek-v2", 155.3), ("deepseek-v3", 250.5)])
def test_training_flops_of_a_token(name: str, gflops: float) -> None:
    """At 4096 tokens, without the input embedding, causal (2505.09343)."""
    assert archzoo.cost(name, 4096).training_flops / 1e9 == pytest.approx(gflops, abs=0.1)


def test_step3_active_parameters() -> None:
    """The published count leaves out one embedding and every norm."""
    config = archzoo.config("step-3")
    model = archzoo.build(config, device="meta")
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    embedding = config.vocab_size * config.hidden_size
    assert archzoo.cost(config).active_params - embedding - norms == 37_916_976_128
    assert [i for i, s in enumerate(config.specs) if s.ffn.kind != "moe"] == [0, 1, 2, 3, 60]


def test_dense_models_are_all_active() -> None:
    cost = archzoo.cost("llama-3.2-1b")
    assert cost.active_params == cost.params


@pytest.mark.parametrize("name", ZEBRA)
def test_zebra_layers_and_kv_share(name: str) -> None:
    layers, share = ZEBRA[name]
    config = archzoo.config(name)
    assert [i for i, spec in enumerate(config.specs) if spec.mixer.kind == "mla"] == layers
    base = archzoo.cost(BASE[name.split("-")[2]]).cache_bytes_per_token
    assert 100 * archzoo.cost(name).cache_bytes_per_token / base == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("kv_rank", "share"), [(128, 15.625), (64, 9.375), (48, 7.8125)], ids=["r128", "r64", "r48"]
)
def test_x_ecomla_kv_share(kv_rank: int, share: float) -> None:
    config = archzoo.config("x-ecomla-1b").override(f"layers.default.mixer.kv_rank={kv_rank}")
    base = archzoo.cost("llama-3.2-1b").cache_bytes_per_token
    assert 100 * archzoo.cost(config).cache_bytes_per_token / base == share


@pytest.mark.parametrize(("name", "size"), PER_TOKEN.items())
def test_cache_bytes_per_token(name: str, size: int) -> None:
    cost, longer = archzoo.cost(name, seq_len=1000), archzoo.cost(name, seq_len=1001)
    assert cost.cache_bytes_per_token == size
    assert longer.cache_bytes - cost.cache_bytes == size
    assert archzoo.cost(name, 1000, batch_size=3).cache_bytes == 3 * cost.cache_bytes


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("zebra-llama-1b-4mla-12m2", {"mla": 10_125_312, "mamba2": 14_763_104}),
        ("zebra-llama-3b-6mla-22m2", {"mla": 19_660_800, "mamba2": 34_705_480}),
        ("zebra-llama-8b-8mla-24m2", {"mla": 34_717_696, "mamba2": 58_886_240}),
        ("deepseek-v2-lite", {"mla": 13_763_072}),
        ("step-3", {"mfa": 169_347_072}),
    ],
)
def test_parameters_per_mixer(name: str, mixer: dict[str, int]) -> None:
    config = archzoo.config(name)
    assert {s.mixer.kind: s.mixer.params(config.hidden_size) for s in config.specs} == mixer


def test_cache_of_published_dense_models() -> None:
    """The other rows of the table (2505.09343)."""
    gqa = AttentionConfig(heads=64, kv_heads=8, head_dim=128)
    assert 80 * gqa.cache_bytes(8192, 1, itemsize=2) == 327_680  # Qwen2.5-72B
    assert 126 * gqa.cache_bytes(16384, 1, itemsize=2) == 516_096  # Llama-3.1-405B


def test_deepseek_v3_attention_parameters() -> None:
    mla = MLAConfig(heads=128, kv_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    assert mla.params(7168) == 187_107_328
    assert 61 * mla.cache_bytes(7168, 1, itemsize=2) == 70_272


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("zebra-llama-1b-4mla-12m2", 286_720),
        ("zebra-llama-3b-6mla-22m2", 827_392),
        ("zebra-llama-8b-8mla-24m2", 1_097_728),
    ],
)
def test_mamba_state_bytes(name: str, state: int) -> None:
    """Published for a bf16 state; archzoo keeps the scan state in fp32."""
    config = archzoo.config(name)
    mamba = next(s.mixer for s in config.specs if s.mixer.kind == "mamba2")
    scan = mamba.heads * mamba.head_dim * mamba.state_size
    layers = sum(s.mixer.kind == "mamba2" for s in config.specs)
    assert archzoo.cost(name).state_bytes == layers * (state + 2 * scan)


def test_step3_cache_at_8192_in_8_bit() -> None:
    assert archzoo.cost("step-3", seq_len=8192).cache_bytes / 2 == pytest.approx(255.9e6, rel=1e-3)


# --- the tiny model of each structure -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cost_matches_the_built_model(structure: str, dtype: torch.dtype, tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(structure, dtype)
    name = str(dtype).removeprefix("torch.")
    cost = archzoo.cost(model.config, seq_len=24, batch_size=2, dtype=name)
    assert cost.params == counted(model)
    cache = model.new_cache(2, 24)
    assert cache.nbytes == cost.cache_bytes
    decode(model, tokens(2, 24), cache, [20, 1, 3])
    if not is_routed(model):  # the router decides how many tokens are kept
        assert cache.nbytes == cost.cache_bytes
    assert cache.length == 24


@pytest.mark.parametrize("chunks", [[1] * 24, [3] + [1] * 21, [20, 1, 1, 1, 1], [7, 2, 9, 1, 5]])
def test_prefill_and_decode_equal_one_pass(
    structure: str, chunks: list[int], tiny: Tiny, tokens: Tokens
) -> None:
    model, ids = tiny(structure), tokens(2, 24)
    full = forward(model, ids)
    for room in (0, 24):  # a cache that grows, and one that has the room
        assert_close(decode(model, ids, model.new_cache(2, room), chunks), full)


def test_causality(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(structure), tokens(2, 24)
    before = forward(model, ids)
    for t in (1, 11, 23):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 256
        after = forward(model, changed)
        assert torch.equal(after[:, :t], before[:, :t]) or (
            assert_close(after[:, :t], before[:, :t], 1e-12) is None
        )
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-6)


def test_packed_equals_separate(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(structure)
    lengths = [5, 1, 0, 13, 2, 3]
    parts = [tokens(1, n, seed) for seed, n in enumerate(lengths)]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = forward(model, torch.cat(parts, 1), cu_seqlens=cu_seqlens)
    alone = torch.cat([forward(model, part) for part in parts if part.shape[1]], 1)
    assert_close(packed, alone)


def test_packed_loss_is_that_of_the_parts(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(structure)
    parts = [tokens(1, n, seed) for seed, n in enumerate([5, 9, 4])]
    ids = torch.cat(parts, 1)
    with torch.inference_mode():
        packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 14, 18])).loss
        sums = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    assert_close(packed, sum(sums) / 15, 1e-6)


def test_left_padded_rows_equal_unpadded_rows(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(structure)
    lengths, steps = (9, 12, 1), 4
    width = max(lengths)
    rows = [tokens(1, n + steps, seed) for seed, n in enumerate(lengths)]
    expected = [forward(model, row) for row in rows]
    ids = torch.full((len(rows), width), 7)
    positions = torch.full((len(rows), width), -1)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, width - n :] = row[0, :n]
        positions[i, width - n :] = torch.arange(n)
    cache = model.new_cache(len(rows), width + steps)
    with torch.inference_mode():
        prefill = model(ids, positions=positions, cache=cache).logits
        cacheless = model(ids, positions=positions).logits
    for i, n in enumerate(lengths):
        assert_close(prefill[i, width - n :], expected[i][0, :n])
        assert_close(cacheless[i, width - n :], expected[i][0, :n])
    assert prefill.isfinite().all()
    for step in range(steps):
        column = torch.cat([row[:, n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)])
        out = forward(model, column, cache=cache)
        for i, n in enumerate(lengths):
            assert_close(out[i, 0], expected[i][0, n + step])


def test_beam_reorder(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(structure), tokens(3, 12)
    rows = torch.tensor([2, 0, 0, 1])
    cache = model.new_cache(3, 14)
    decode(model, ids, cache, [11, 1])
    cache.reorder(rows)
    assert cache.batch_size == 4
    after = tokens(4, 3, seed=5)
    expected = forward(model, torch.cat((ids[rows], after), 1))[:, 12:]
    assert_close(decode(model, after, cache, [1, 2]), expected)


def test_clone_is_independent(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids, other = tiny(structure), tokens(2, 15), tokens(2, 15, seed=9)
    other[:, :12] = ids[:, :12]
    cache = model.new_cache(2, 15)
    decode(model, ids[:, :12], cache, [10, 1, 1])
    copy = cache.clone()
    steps = {0: [], 1: []}
    for t in range(12, 15):  # in turns, so that one would see what the other wrote
        for i, (row, its) in enumerate(((ids, cache), (other, copy))):
            steps[i].append(decode(model, row[:, t : t + 1], its, [1]))
    for i, row in enumerate((ids, other)):
        assert_close(torch.cat(steps[i], 1), forward(model, row)[:, 12:])


def test_truncate(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids, other = tiny(structure), tokens(2, 15), tokens(2, 4, seed=9)
    cache = model.new_cache(2, 12)
    decode(model, ids[:, :8], cache, [8])
    decode(model, other, cache, [4])
    before = cache.nbytes
    if is_recurrent(model.config) or is_routed(model) or is_windowed(model.config):
        with pytest.raises(CacheError, match="cannot be truncated"):
            cache.truncate(8)
        assert cache.length == 12
        return
    cache.truncate(8)
    assert (cache.length, cache.nbytes) == (8, before)
    assert_close(decode(model, ids[:, 8:], cache, [1, 2, 4]), forward(model, ids)[:, 8:])
    with pytest.raises(CacheError, match="cannot truncate a cache of 15 tokens to 16"):
        cache.truncate(16)


def test_gradients(structure: str, tokens: Tokens) -> None:
    model = archzoo.build(archzoo.config(structure).tiny(), dtype=torch.float32).train()
    ids = tokens(2, 24)
    loss = model(ids, labels=ids).loss
    assert math.log(256) - 1 < loss.item() < math.log(256) + 2
    loss.backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name
        assert param.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing(structure: str, tokens: Tokens) -> None:
    model = archzoo.build(archzoo.config(structure).tiny(), dtype=torch.float64).train()
    ids = tokens(2, 12)
    grads = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        torch.manual_seed(0)  # some routers drop at random
        out = model(ids, labels=ids)
        out.loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": out.loss.detach()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_reference_backend_is_the_same_model(
    structure: str, dtype: torch.dtype, tolerance: float, tiny: Tiny, tokens: Tokens
) -> None:
    model, ids = tiny(structure, dtype), tokens(2, 16)
    fast = forward(model, ids)
    fast_decode = decode(model, ids, model.new_cache(2, 16), [13, 1, 1, 1])
    with backend("reference"):
        assert_close(forward(model, ids), fast, tolerance)
        assert_close(decode(model, ids, model.new_cache(2, 16), [13, 1, 1, 1]), fast_decode, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision_stays_near_float64(
    structure: str, dtype: torch.dtype, tiny: Tiny, tokens: Tokens
) -> None:
    """Softmax, norms and scans are wide inside, so decode is no less exact than one pass."""
    if is_routed(tiny(structure)) or any(s.ffn and s.ffn.kind == "moe" for s in tiny(structure).config.specs):
        pytest.skip("a rounded score can choose another expert")
    ids = tokens(2, 16)
    model = tiny(structure, dtype)
    exact = archzoo.build(model.config, dtype=torch.float64).eval()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    expected = forward(exact, ids)
    scale = expected.std()
    with backend("reference"):  # rounded to the same dtype between the same ops
        rounding = (forward(model, ids).double() - expected).abs().max() / scale
    assert rounding < (1e-4 if dtype == torch.float32 else 0.15)
    for out in (forward(model, ids), decode(model, ids, model.new_cache(2, 16), [10] + [1] * 6)):
        assert (out.double() - expected).abs().max() / scale < 1.5 * rounding + 1e-5


def test_autocast(structure: str, tokens: Tokens) -> None:
    """fp32 weights, bf16 products: a training step, then a padded prefill and decode."""
    model = archzoo.build(archzoo.config(structure).tiny()).train()
    ids, positions = tokens(2, 12), torch.arange(12).repeat(2, 1)
    positions[1] = (positions[1] - 3).clamp(min=-1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cache = model.new_cache(2, 16)
        model(ids, positions=positions, cache=cache)
        for step in range(3):
            assert model(ids[:, step : step + 1], cache=cache).logits.isfinite().all()


def test_tensors_without_memory_take_the_dispatched_path(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    """Kernels that work on addresses must not see fake tensors, nor hide products from what counts them."""
    model, ids = tiny(structure, torch.float32), tokens(1, 1)
    if is_routed(model):
        pytest.skip("how many tokens are chosen depends on the data")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model(mode.from_tensor(ids)).logits.shape == (1, 1, 256)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() > archzoo.cost(model.config, 1).prefill_flops * 0.5


def test_same_seed_same_weights(structure: str) -> None:
    config = archzoo.config(structure).tiny()
    first, second, other = (archzoo.build(config, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_window_variant_obeys_the_same_laws(tokens: Tokens) -> None:
    """A sliding window in every layer."""
    config = archzoo.config("llama-3.2-1b").tiny().override("layers.default.mixer.window=5", "init_std=0.15")
    assert isinstance(config.specs[0].mixer, AttentionConfig)
    model = archzoo.build(config, dtype=torch.float64).eval()
    ids = tokens(2, 24)
    full = forward(model, ids)
    for chunks in ([1] * 24, [3] + [1] * 21, [20, 1, 1, 1, 1], [7, 2, 9, 1, 5]):
        cache = model.new_cache(2, 24)
        assert_close(decode(model, ids, cache, chunks), full)
        assert cache.nbytes == archzoo.cost(config, 24, 2, "float64").cache_bytes
    with pytest.raises(CacheError):
        cache.truncate(20)


def test_builds_the_same_weights_whatever_the_mode_and_the_threads() -> None:
    config = archzoo.config("zebra-llama-1b").tiny()
    model = archzoo.build(config, seed=5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            other = archzoo.build(config, seed=5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.equal(model.embed.weight, archzoo.build(config, seed=6).embed.weight)
