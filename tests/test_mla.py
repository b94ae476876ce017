"""Multi-head latent attention: absorbed against expanded, against the plain formula, cache and costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo.blocks.context import Context
from archzoo.blocks.mixers.mla import MLA, MLAConfig
from archzoo.blocks.registry import Site
from archzoo.blocks.rope import RopeConfig
from archzoo.cache import Timeline
from archzoo.ops.rope import apply_rope

YARN = RopeConfig(
    kind="yarn",
    interleaved=True,
    factor=40.0,
    original_max_positions=8,
    mscale=0.707,
    mscale_all_dim=0.707,
)
SIZES = {"heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 6, "v_dim": 10, "rope": YARN}
FORMS = {
    "deepseek": MLAConfig(kv_heads=4, **SIZES),
    "deepseek-q_rank": MLAConfig(kv_heads=4, q_rank=24, **SIZES),
    "zebra": MLAConfig(kv_heads=2, q_rank=24, latent_norm=False, **SIZES),
    "one-kv-head": MLAConfig(kv_heads=1, latent_norm=False, **SIZES),
}


def build(config: MLAConfig, dtype: torch.dtype = torch.float64) -> MLA:
    mixer = config.build(Site(index=0, count=2, hidden_size=64, norm_eps=1e-5)).double()
    gen = torch.Generator().manual_seed(0)
    for name, param in mixer.named_parameters():
        torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.3, generator=gen)
    return mixer.to(dtype).requires_grad_(False)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def formula(mixer: MLA, x: Tensor) -> Tensor:
    """MLA head by head over whole sequences, as written in 2405.04434 and 2505.17272."""
    c, t = mixer.config, x.shape[1]

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ getattr(mixer, name).weight.T

    def normed(name: str, value: Tensor) -> Tensor:
        norm = getattr(mixer, name)
        if norm is None:
            return value
        return value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight

    q = (
        linear("q_proj", x)
        if c.q_rank is None
        else (linear("q_b_proj", normed("q_a_norm", linear("q_a_proj", x))))
    )
    kv = linear("kv_a_proj", x)
    latent, k_rope = normed("kv_a_norm", kv[..., : c.kv_rank]), kv[..., c.kv_rank :]
    cos, sin = c.rope.table(torch.arange(t), c.rope_dim, x.dtype)
    k_rope = apply_rope(k_rope[:, :, None], cos, sin, interleaved=True)[:, :, 0]
    up = linear("kv_b_proj", latent).view(1, t, c.kv_heads, c.nope_dim + c.v_dim)
    m = 0.1 * 0.707 * math.log(40) + 1
    scale = (c.nope_dim + c.rope_dim) ** -0.5 * m * m
    out = []
    for head, qh in enumerate(q.view(1, t, c.heads, -1).unbind(2)):
        shared = up[:, :, head // (c.heads // c.kv_heads)]
        q_rope = apply_rope(qh[:, :, None, c.nope_dim :], cos, sin, interleaved=True)[:, :, 0]
        scores = qh[..., : c.nope_dim] @ shared[..., : c.nope_dim].mT + q_rope @ k_rope.mT
        scores = (scores * scale).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf"))
        out.append(scores.softmax(-1) @ shared[..., c.nope_dim :])
    return linear("o_proj", torch.cat(out, -1))


@pytest.mark.parametrize("form", FORMS)
def test_module_equals_the_formula(form: str) -> None:
    mixer, x = build(FORMS[form]), torch.randn(1, 20, 64, dtype=torch.float64)
    expected = formula(mixer, x)
    assert_close(mixer(x, Context((1, 20), x.device)), expected)
    assert sum(p.numel() for p in mixer.parameters()) == FORMS[form].params(64)
    for chunks in ([1] * 20, [13, 1, 1, 5], [19, 1]):
        timeline, state = Timeline(1, x.device), mixer.new_state(1, 0, x.device, x.dtype)
        parts = [
            mixer(part, Context(part.shape[:2], x.device, timeline=timeline), state)
            for part in x.split(chunks, 1)
        ]
        assert_close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("new", "past"), [(1, 0), (7, 0), (1, 12), (3, 9)])
def test_absorbed_equals_expanded(form: str, new: int, past: int) -> None:
    config = FORMS[form]
    mixer = build(config)
    timeline = Timeline(2, torch.device("cpu"))
    timeline.append(past)
    ctx = Context((2, new), torch.device("cpu"), timeline=timeline)
    q_nope, q_rope = (
        torch.randn(2, new, config.heads, n, dtype=torch.float64) for n in (config.nope_dim, config.rope_dim)
    )
    keys = torch.randn(2, past + new, config.kv_rank + config.rope_dim, dtype=torch.float64)
    expanded, absorbed = (f(q_nope, q_rope, keys, ctx) for f in (mixer.expanded, mixer.absorbed))
    assert expanded.shape == (2, new, config.heads * config.v_dim)
    assert_close(absorbed, expanded)
    assert expanded.abs().max() > 0.1


def test_the_cheaper_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    v3 = MLAConfig(heads=128, kv_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    assert not v3.absorbs(4096, 4096)
    assert v3.absorbs(1, 4096)
    pair = v3.flops(7168, 1, 4097) - v3.flops(7168, 1, 4096)
    assert pair == 2 * 128 * (2 * 512 + 64)
    long, longer = v3.flops(7168, 4096, 4096), v3.flops(7168, 4096, 4097)
    expand = 2 * 512 * 128 * 256
    assert longer - long == 4096 * 640 * 128 + expand
    mixer, ran = build(FORMS["deepseek"]), []
    for name in ("absorbed", "expanded"):
        method = getattr(mixer, name)
        monkeypatch.setattr(mixer, name, lambda *a, m=method, n=name: ran.append(n) or m(*a))
    for new, total in ((1, 64), (64, 64), (1, 1)):
        timeline, device = Timeline(1, torch.device("cpu")), torch.device("cpu")
        state = mixer.new_state(1, 64, device, torch.float64)
        if total > new:
            state.append(torch.randn(1, total - new, 22, dtype=torch.float64))
            timeline.append(total - new)
        mixer(
            torch.randn(1, new, 64, dtype=torch.float64), Context((1, new), device, timeline=timeline), state
        )
    assert ran == [
        "absorbed" if FORMS["deepseek"].absorbs(n, s) else "expanded" for n, s in ((1, 64), (64, 64), (1, 1))
    ]
    assert len(set(ran)) == 2


def test_published_shapes() -> None:
    for name, rows in (("1b", 768), ("3b", 1536), ("8b", 1536)):
        config = archzoo.config(f"zebra-llama-{name}")
        with torch.device("meta"):
            mixer = config.specs[0].mixer.build(Site(0, 2, config.hidden_size, 1e-5))
        assert mixer.kv_b_proj.weight.shape[0] == rows
    v2 = archzoo.config("deepseek-v2-lite").specs[0].mixer
    assert v2.cache_bytes(2048, 1, itemsize=1) == 576
    with torch.device("meta"):
        deepseek, zebra = (
            archzoo.config(n).specs[0].mixer.build(Site(0, 2, 2048, 1e-6))
            for n in ("deepseek-v2-lite", "zebra-llama-1b")
        )
    assert deepseek.scale == pytest.approx(0.1147214, abs=1e-7)
    assert zebra.scale == 64**-0.5  # YaRN scales cos and sin instead


def test_cache_holds_the_normed_latent_and_one_rotated_key() -> None:
    config = FORMS["deepseek-q_rank"]
    mixer, x = build(config), torch.randn(2, 5, 64, dtype=torch.float64)
    state = mixer.new_state(2, 5, x.device, x.dtype)
    mixer(x, Context((2, 5), x.device, timeline=Timeline(2, x.device)), state)
    assert state.latent.shape == (2, 5, 16 + 6)
    assert state.nbytes == 2 * config.cache_bytes(64, 5, itemsize=8)
    latent = F.rms_norm((x @ mixer.kv_a_proj.weight.T)[..., :16], (16,), mixer.kv_a_norm.weight, 1e-6)
    assert_close(state.latent[..., :16], latent)
    raw = (x @ mixer.kv_a_proj.weight.T)[..., 16:]
    assert_close(state.latent[:, 0, 16:], torch.cat((raw[:, 0, ::2], raw[:, 0, 1::2]), -1))  # position 0
    assert not torch.allclose(state.latent[:, 1, 16:], torch.cat((raw[:, 1, ::2], raw[:, 1, 1::2]), -1))


def test_padded_decode_runs_absorbed_too() -> None:
    config = FORMS["zebra"]
    mixer, x = build(config), torch.randn(2, 30, 64, dtype=torch.float64)
    expected = formula(mixer, x[1:, 4:])
    positions = torch.stack((torch.arange(30), torch.arange(-4, 26).clamp(min=-1)))
    timeline, state = Timeline(2, x.device), mixer.new_state(2, 30, x.device, x.dtype)
    out = [mixer(x[:, :28], Context((2, 28), x.device, positions[:, :28], timeline=timeline), state)]
    assert config.absorbs(1, 29)
    for t in (28, 29):
        out.append(mixer(x[:, t : t + 1], Context((2, 1), x.device, timeline=timeline), state))
    assert_close(torch.cat(out, 1)[1:, 4:], expected)
