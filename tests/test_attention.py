"""Softmax attention: grouped heads, windows, masks, NoPE, QK-norm, MFA, and its counted costs."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import archzoo
from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.mixers.attention import AttentionConfig, visible_pairs
from archzoo.blocks.mixers.mfa import MFA, MFAConfig
from archzoo.blocks.registry import Site
from archzoo.cache import Timeline
from archzoo.errors import ConfigError
from archzoo.ops.attention import attention
from archzoo.ops.backend import backend
from archzoo.ops.rope import apply_rope

SITE = Site(index=0, count=2, hidden_size=64, norm_eps=1e-5)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def build(config: AttentionConfig | MFAConfig) -> torch.nn.Module:
    mixer = config.build(SITE).double()
    gen = torch.Generator().manual_seed(0)
    for name, param in mixer.named_parameters():
        torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.2, generator=gen)
    return mixer.requires_grad_(False)


def run(mixer: torch.nn.Module, x: Tensor) -> Tensor:
    return mixer(x, Context(x.shape[:2], x.device))


def problem(heads: int, kv: int, t: int, s: int, dk: int, dv: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, heads, t, dk), (2, kv, s, dk), (2, kv, s, dv))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv"), [(6, 6), (6, 2), (6, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(("dk", "dv"), [(8, 8), (12, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_op_equals_its_definition(
    heads: int, kv: int, dk: int, dv: int, dtype: torch.dtype, tolerance: float
) -> None:
    full = torch.rand(2, 1, 7, 9) < 0.6
    cases = [
        (7, 7, {"causal": True}),
        (7, 9, {"mask": torch.ones(7, 9, dtype=torch.bool).tril(2)}),
        (7, 9, {"mask": full}),
        (1, 9, {}),
        (1, 9, {"mask": full[:, :, :1]}),
    ]
    for t, s, options in cases:
        q, k, v = problem(heads, kv, t, s, dk, dv, dtype)
        out = attention(q, k, v, 0.3, **options)
        with backend("reference"):
            expected = attention(q, k, v, 0.3, **options)
        assert out.dtype == dtype
        assert_close(out, expected, tolerance)


def test_op_definition_head_by_head() -> None:
    """Query head i reads key head i // (H / G)."""
    q, k, v = problem(6, 2, 5, 5, 8, 8, torch.float64)
    with backend("reference"):
        out = attention(q, k, v, 0.3, causal=True)
    for i in range(6):
        scores = (q[:, i] @ k[:, i // 3].transpose(1, 2)) * 0.3
        for t in range(5):
            expected = scores[:, t, : t + 1].softmax(-1)[:, None] @ v[:, i // 3, : t + 1]
            assert_close(out[:, i, t], expected[:, 0])


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("t", [4, 1])
def test_query_that_sees_nothing_gives_zero(name: str, t: int) -> None:
    mask = torch.ones(2, 1, t, 6, dtype=torch.bool)
    mask[1, 0, t - 1] = False
    q, k, v = (a.requires_grad_() for a in problem(4, 2, t, 6, 8, 8, torch.float32))
    with backend(name):
        out = attention(q, k, v, 0.3, mask)
        assert not out[1, :, t - 1].any()
        assert out[0].all()
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sinks_take_their_share_of_the_denominator(kv: int, dtype: torch.dtype, tolerance: float) -> None:
    """Spelled out, for every shape of call, with the gradients of all four inputs."""
    full = torch.rand(2, 1, 6, 9) < 0.6
    full[1, 0, 2] = False  # a query that sees only the sink
    cases = [
        (6, 6, {"causal": True}),
        (6, 9, {"mask": torch.ones(6, 9, dtype=torch.bool).tril(3)}),
        (6, 9, {"mask": full}),
        (1, 9, {}),
        (1, 9, {"mask": full[:, :, 2:3]}),
    ]
    for t, s, options in cases:
        args = [*problem(4, kv, t, s, 8, 5, dtype), torch.randn(4).to(dtype)]
        q, k, v, sinks = (a.requires_grad_() for a in args)
        mask = options.get("mask", torch.ones(t, s, dtype=torch.bool).tril(s - t))
        scores = (q @ k.repeat_interleave(4 // kv, 1).transpose(2, 3) * 0.3).exp() * mask
        expected = scores / (scores.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        expected = expected @ v.repeat_interleave(4 // kv, 1)
        wanted = torch.autograd.grad(expected.square().sum(), (q, k, v, sinks))
        for name in ("auto", "reference"):
            with backend(name):
                out = attention(q, k, v, 0.3, **options, sinks=sinks)
            assert out.dtype == dtype
            assert_close(out, expected, tolerance)
            grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
            for found, grad in zip(grads, wanted, strict=True):
                assert_close(found, grad, tolerance * 10)


@pytest.mark.parametrize("t", [1, 50])
def test_sinks_in_bf16_are_near_fp32(t: int) -> None:
    q, k, v = problem(8, 2, t, 50, 64, 64, torch.bfloat16)
    sinks = torch.randn(8).bfloat16()
    out = attention(q, k, v, 0.125, causal=t > 1, sinks=sinks)
    exact = attention(q.float(), k.float(), v.float(), 0.125, causal=t > 1, sinks=sinks.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.02


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("t", [1, 6])
def test_op_gradients(kv: int, t: int) -> None:
    args = [a.requires_grad_() for a in problem(4, kv, t, 6, 8, 5, torch.float64)]
    mask = torch.ones(t, 6, dtype=torch.bool).tril(6 - t)
    for options in ({"mask": mask}, {}) if t == 1 else ({"mask": mask}, {"causal": True}):
        grads = []
        for name in ("auto", "reference"):
            with backend(name):
                grads.append(torch.autograd.grad(attention(*args, 0.3, **options).square().sum(), args))
        for fast, slow in zip(*grads, strict=True):
            assert_close(fast, slow, 1e-10)


@pytest.mark.parametrize("t", [1, 200])
def test_scores_and_softmax_are_wide_in_bf16(t: int) -> None:
    """Large scores, rounded to bf16, would move every probability by per cents."""
    q, k, v = problem(4, 2, t, 200, 64, 16, torch.bfloat16)
    q, k = q * 3, k * 3
    out = attention(q, k, v, 0.125, causal=t > 1)
    with backend("reference"):
        exact = attention(q.double(), k.double(), v.double(), 0.125, causal=t > 1)
    assert (out.double() - exact).abs().max() < 2**-6


@pytest.mark.parametrize(
    ("k_shape", "v_shape"),
    [
        ((2, 2, 9, 7), (2, 2, 9, 5)),  # another head_dim
        ((3, 2, 9, 8), (3, 2, 9, 5)),  # another batch
        ((2, 2, 9, 8), (2, 2, 8, 5)),  # fewer values than keys
        ((2, 2, 9, 8), (2, 3, 9, 5)),  # other heads
        ((2, 3, 9, 8), (2, 3, 9, 5)),  # heads that do not divide
    ],
)
@pytest.mark.parametrize("t", [1, 3])
def test_wrong_shapes_are_refused(k_shape: tuple[int, ...], v_shape: tuple[int, ...], t: int) -> None:
    """Also by kernels that read memory by address."""
    with pytest.raises(RuntimeError), torch.inference_mode():
        attention(torch.zeros(2, 4, t, 8), torch.zeros(k_shape), torch.zeros(v_shape), 1.0)


def test_wrong_input_of_a_linear_layer_is_refused() -> None:
    layer = Linear(16, 4, bias=True)
    with torch.inference_mode():
        for x in (torch.zeros(1, 8), torch.zeros(1, 32), torch.zeros(1, 16, dtype=torch.bfloat16)):
            with pytest.raises(RuntimeError):
                layer(x)
        wide = Linear(16, 4, bias=True, dtype=torch.bfloat16)
        wide.bias.data = wide.bias.data.float()
        with pytest.raises(RuntimeError):
            wide(torch.zeros(1, 16, dtype=torch.bfloat16))


def test_bias_alone_can_be_trained_on_few_rows() -> None:
    layer = Linear(16, 4, bias=True)
    layer.weight.requires_grad_(False)
    layer(torch.ones(2, 16)).sum().backward()
    assert layer.bias.grad.tolist() == [2.0] * 4


def test_hooks_of_projections_run() -> None:
    """Also where several projections of one input are computed together."""
    mixer = AttentionConfig(heads=2, kv_heads=1, head_dim=8).build(SITE).requires_grad_(False)
    x, ctx, seen = torch.randn(1, 2, 64), Context((1, 2), torch.device("cpu")), []
    before = mixer(x, ctx)
    mixer.q_proj.register_forward_hook(lambda *a: seen.append("after"))
    mixer.k_proj.register_forward_pre_hook(lambda *a: seen.append("before"))
    plain = mixer.v_proj.forward
    mixer.v_proj.forward = lambda x: seen.append("instead") or plain(x)  # as accelerate's hooks do
    assert_close(mixer(x, ctx), before, 1e-6)
    assert sorted(seen) == ["after", "before", "instead"]


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_window_sees_exactly_the_last_tokens(window: int) -> None:
    """With zero queries every visible key has the same weight: values tell which keys were seen."""
    config = AttentionConfig(heads=1, kv_heads=1, head_dim=64, window=window)
    mixer = build(config)
    mixer.q_proj.weight.zero_()
    for proj in (mixer.v_proj, mixer.o_proj):
        proj.weight.copy_(torch.eye(64))
    x = F.one_hot(torch.arange(12), 64).double()[None]
    expected = torch.zeros(12, 64, dtype=torch.float64)
    for i in range(12):
        first = max(0, i - window + 1)
        expected[i, first : i + 1] = 1 / min(i + 1, window)
    assert_close(run(mixer, x)[0], expected)
    for chunks in ([1] * 12, [5, 4, 1, 2], [11, 1]):
        timeline, state = Timeline(1, x.device), mixer.new_state(1, 12, x.device, x.dtype)
        parts = [
            mixer(part, Context(part.shape[:2], x.device, timeline=timeline), state)
            for part in x.split(chunks, 1)
        ]
        assert_close(torch.cat(parts, 1)[0], expected)
        assert state.nbytes == config.cache_bytes(64, 12, itemsize=8) == 2 * 64 * min(12, window) * 8


@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 20])
def test_visible_pairs_is_the_size_of_the_mask(new: int, total: int, window: int | None) -> None:
    timeline = Timeline(1, torch.device("cpu"))
    timeline.append(total - new)
    mask = Context((1, new), torch.device("cpu"), timeline=timeline).mask(window)
    seen = total if mask is None else int(mask.sum())
    assert visible_pairs(new, total, window) == seen
    query, key = torch.meshgrid(torch.arange(total - new, total), torch.arange(total), indexing="ij")
    assert seen == ((key <= query) & (query - key < (window or total))).sum()


@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9), (5, 12)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 20])
def test_visible_pairs_of_chunks(new: int, total: int, chunk: int) -> None:
    timeline = Timeline(1, torch.device("cpu"))
    timeline.append(total - new)
    mask = Context((1, new), torch.device("cpu"), timeline=timeline).mask(chunk=chunk)
    seen = total if mask is None else int(mask.sum())
    query, key = torch.meshgrid(torch.arange(total - new, total), torch.arange(total), indexing="ij")
    assert seen == ((key <= query) & (key // chunk == query // chunk)).sum()
    assert visible_pairs(new, total, chunk=chunk) == seen


@pytest.mark.parametrize("chunk", [1, 4, 5, 30])
def test_chunk_is_attention_within_each_block(chunk: int) -> None:
    """A packed batch of the blocks at their own positions; decoded through a cache of one block."""
    config = AttentionConfig(heads=2, kv_heads=1, head_dim=16, chunk=chunk)
    mixer, x = build(config), torch.randn(1, 13, 64, dtype=torch.float64)
    plain = build(config.model_copy(update={"chunk": None}))
    blocks = zip(x.split(chunk, 1), torch.arange(13)[None].split(chunk, 1), strict=True)
    expected = torch.cat([plain(b, Context(b.shape[:2], x.device, at)) for b, at in blocks], 1)
    assert_close(run(mixer, x), expected)
    for chunks in ([1] * 13, [5, 4, 1, 3], [12, 1]):
        timeline, state = Timeline(1, x.device), mixer.new_state(1, 13, x.device, x.dtype)
        parts = [
            mixer(part, Context(part.shape[:2], x.device, timeline=timeline), state)
            for part in x.split(chunks, 1)
        ]
        assert_close(torch.cat(parts, 1), expected)
        assert state.nbytes == config.cache_bytes(64, 13, itemsize=8)


def test_temperature_of_queries() -> None:
    settings = {"heads": 2, "kv_heads": 2, "head_dim": 16, "rope": None}
    mixer, x = build(AttentionConfig(**settings)), torch.randn(1, 9, 64, dtype=torch.float64)
    warm = build(AttentionConfig(**settings, temperature={"scale": 0.3, "floor": 2}))
    for t in range(9):
        factor = 1 + 0.3 * math.log1p((t + 1) // 2)
        mixer.scale = 0.25 * factor
        assert_close(run(warm, x)[:, t], run(mixer, x)[:, t], 1e-12)
    shifted = warm(x, Context((1, 9), x.device, torch.arange(9)[None] - 3))  # left padding
    assert_close(shifted[:, 3:], run(warm, x[:, 3:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 32}, r"rotary_dim \(32\) exceeds head_dim \(16\)"),
        ({"rotary_dim": 5}, "RoPE needs an even rotary_dim, found 5"),
        ({"window": 3, "chunk": 3}, "window and chunk exclude each other"),
        ({"heads": 3, "kv_heads": 2}, r"heads \(3\) must be a multiple of kv_heads \(2\)"),
    ],
)
def test_settings_that_contradict_are_refused(change: dict[str, int], message: str) -> None:
    config = AttentionConfig(**({"heads": 2, "kv_heads": 2, "head_dim": 16} | change))
    with pytest.raises(ConfigError, match=message):
        config.check(64)


# --- the block ------------------------------------------------------------------------------------


def test_block_head_by_head() -> None:
    """Projections, biases, QK-norm before RoPE, scale and grouping, spelled out."""
    config = AttentionConfig(heads=4, kv_heads=2, head_dim=16, qkv_bias=True, o_bias=True, qk_norm="head")
    mixer, x = build(config), torch.randn(2, 7, 64, dtype=torch.float64)
    cos, sin = config.rope.table(torch.arange(7), 16, x.dtype)

    def split(proj: torch.nn.Module) -> Tensor:
        return (x @ proj.weight.T + proj.bias).view(2, 7, -1, 16)

    def normed(t: Tensor, weight: Tensor) -> Tensor:
        return apply_rope(t * (t.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight, cos, sin)

    q, k, v = split(mixer.q_proj), split(mixer.k_proj), split(mixer.v_proj)
    q, k = normed(q, mixer.q_norm.weight), normed(k, mixer.k_norm.weight)
    heads = [
        F.scaled_dot_product_attention(q[:, :, i], k[:, :, i // 2], v[:, :, i // 2], is_causal=True)
        for i in range(4)
    ]
    expected = torch.cat(heads, -1) @ mixer.o_proj.weight.T + mixer.o_proj.bias
    assert_close(run(mixer, x), expected)
    assert sum(p.numel() for p in mixer.parameters()) == config.params(64)


def test_nope_ignores_order_and_rope_does_not() -> None:
    x = torch.randn(1, 8, 64, dtype=torch.float64)
    shuffled = torch.cat((x[:, torch.tensor([3, 0, 6, 2, 5, 1, 4])], x[:, 7:]), 1)
    for rope, same in ((None, True), ({}, False)):
        mixer = build(AttentionConfig(heads=2, kv_heads=2, head_dim=16, rope=rope))
        assert torch.allclose(run(mixer, x)[:, 7], run(mixer, shuffled)[:, 7], atol=1e-12) == same


@pytest.mark.parametrize("kind", ["attention", "mfa"])
def test_rope_depends_on_distance_only(kind: str) -> None:
    config = AttentionConfig(heads=4, kv_heads=2, head_dim=16) if kind == "attention" else MFA_CONFIG
    mixer, x = build(config), torch.randn(1, 8, 64, dtype=torch.float64)
    positions = torch.arange(8)[None]
    shifted, spread = (mixer(x, Context((1, 8), x.device, p)) for p in (positions + 1000, positions * 2))
    assert_close(shifted, run(mixer, x), 1e-9)
    assert not torch.allclose(spread, run(mixer, x), atol=1e-4)


# --- MFA ------------------------------------------------------------------------------------------

MFA_CONFIG = MFAConfig(heads=4, head_dim=16, q_rank=24)


def test_mfa_is_mqa_over_factored_queries() -> None:
    mixer, x = build(MFA_CONFIG), torch.randn(2, 9, 64, dtype=torch.float64)
    assert isinstance(mixer, MFA)
    latent = x @ mixer.q_a_proj.weight.T
    latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.q_a_norm.weight
    cos, sin = MFA_CONFIG.rope.table(torch.arange(9), 16, x.dtype)
    q = apply_rope((latent @ mixer.q_b_proj.weight.T).view(2, 9, 4, 16), cos, sin).transpose(1, 2)
    k = apply_rope((x @ mixer.k_proj.weight.T)[:, :, None], cos, sin).transpose(1, 2)
    v = (x @ mixer.v_proj.weight.T)[:, None]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert_close(run(mixer, x), o.transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T)
    assert sum(p.numel() for p in mixer.parameters()) == MFA_CONFIG.params(64)


def test_mfa_joint_query_map_has_the_rank_of_the_latent() -> None:
    mixer = build(MFA_CONFIG)
    joint = mixer.q_b_proj.weight @ mixer.q_a_proj.weight
    assert joint.shape == (64, 64)
    assert torch.linalg.matrix_rank(joint) == MFA_CONFIG.q_rank


def test_mfa_cache_is_two_vectors_per_token() -> None:
    step3 = archzoo.config("step-3").specs[0].mixer
    assert step3.cache_bytes(7168, 1, itemsize=1) == 512
    assert 61 * 512 == 31_232


# --- FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("llama-3.2-1b", "smollm2-1.7b", "step-3", "x-ecomla-1b", "deepseek-v2-lite", "deepseek-moe-16b"),
        *("deepseek-v3", "gpt-oss-20b", "llama-4-scout", "minimax-m2", "olmoe-1b-7b", "qwen1.5-moe-a2.7b"),
    ],
)
@pytest.mark.parametrize("past", [1, 2, 40])
def test_decode_flops_are_those_of_the_products(name: str, past: int) -> None:
    """The reference path runs every product as a matrix multiplication, which torch counts."""
    config = archzoo.config(name).tiny()
    model = archzoo.build(config, dtype=torch.float64).eval()
    cache = model.new_cache(2, past)
    ids = torch.zeros(2, past + 1, dtype=torch.long)
    with torch.inference_mode(), backend("reference"), FlopCounterMode(display=False) as counter:
        model.backbone(ids[:, :past], cache)
        before = counter.get_total_flops()
        model(ids[:, past:], cache=cache)
    measured = counter.get_total_flops() - before
    for mixer in (s.mixer for s in config.specs):
        if reach := getattr(mixer, "reach", None):  # the oldest keys are multiplied, then masked
            unseen = min(past, reach) + 1 - visible_pairs(1, past + 1, mixer.window, mixer.chunk)
            measured -= 2 * 4 * mixer.heads * mixer.head_dim * unseen
    assert archzoo.cost(config, seq_len=past, batch_size=2).decode_flops == measured


@pytest.mark.parametrize(("name", "t"), [*product(["llama-3.2-1b", "step-3", "x-ecomla-1b"], [1, 32])])
def test_prefill_flops(name: str, t: int) -> None:
    """The counted path multiplies the masked half of the scores too; the formula leaves it out."""
    config = archzoo.config(name).tiny()
    model = archzoo.build(config, dtype=torch.float64).eval()
    with torch.inference_mode(), backend("reference"), FlopCounterMode(display=False) as counter:
        hidden = model.backbone(torch.zeros(1, t, dtype=torch.long))
        model.head(hidden[:, -1])
    mixer = config.specs[0].mixer
    width = mixer.qk_dim + mixer.v_dim if name.startswith("x-") else 2 * mixer.head_dim
    if name.startswith("x-") and mixer.absorbs(t, t):
        width = 2 * mixer.kv_rank + mixer.rope_dim
    hidden_half = len(config.specs) * 2 * mixer.heads * width * (t * t - visible_pairs(t, t))
    assert archzoo.cost(config, seq_len=t).prefill_flops == counter.get_total_flops() - hidden_half
