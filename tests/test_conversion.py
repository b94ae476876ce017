"""Conversion of attention models: layouts, SVD and Mamba-2 initialisation, errors, and the files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import archzoo
from archzoo import CausalLM, ConfigError, InputError, ModelConfig
from archzoo.blocks.mixers import mamba2 as mamba2_module
from archzoo.blocks.mixers.attention import Attention, AttentionConfig
from archzoo.blocks.mixers.mamba2 import Mamba2
from archzoo.blocks.mixers.mla import MLA
from archzoo.conversion import Conversion, assemble
from archzoo.conversion.surgery import converted_config
from archzoo.conversion.weights import SVD, energy_rank
from archzoo.errors import UnknownNameError
from archzoo.ops.conv import causal_conv1d

F64 = torch.float64
SOURCES = {
    "gqa-tied": ("llama-3.2-1b",),
    "gqa-untied": ("llama-3.2-1b", "tie_embeddings=false"),
    "mha-tied": ("llama-130m", "tie_embeddings=true"),
    "mha-untied": ("llama-130m",),
}
# variant: source, MLA layers, q_rank, kv_rank, parameters, KV % (hybrid.md §2)
ZEBRA = {
    "zebra-llama-1b-4mla-12m2": ("llama-3.2-1b", (0, 5, 10, 14), 1344, 128, 1285700736, 3.90625),
    "zebra-llama-1b-6mla-10m2": ("llama-3.2-1b", (0, 2, 5, 8, 11, 14), 1344, 128, 1276425152, 5.859375),
    "zebra-llama-1b-8mla-8m2": ("llama-3.2-1b", tuple(range(0, 16, 2)), 1344, 128, 1267149568, 7.8125),
    "zebra-llama-3b-6mla-22m2": ("llama-3.2-3b", (0, 5, 10, 16, 21, 26), 1536, 128, 3389592112, 112.5 / 56),
    "zebra-llama-3b-8mla-20m2": (
        "llama-3.2-3b", (0, 3, 7, 10, 14, 18, 22, 26), 1536, 128, 3359502752, 75 / 28,
    ),
    "zebra-llama-3b-14mla-14m2": ("llama-3.2-3b", tuple(range(0, 28, 2)), 1536, 128, 3269234672, 4.6875),
    "zebra-llama-8b-8mla-24m2": (
        "llama-3.1-8b", (0, 4, 8, 12, 16, 20, 25, 30), 2048, 160, 8379095296, 2.734375,
    ),
    "zebra-llama-8b-16mla-16m2": ("llama-3.1-8b", tuple(range(0, 32, 2)), 2048, 160, 8185746944, 5.46875),
}  # fmt: skip


@cache
def source(kind: str = "gqa-tied", *changes: str, layers: int = 3, dtype: torch.dtype = F64) -> CausalLM:
    """A tiny Llama whose weights are large enough to show; shared, do not change it."""
    name, *more = SOURCES[kind]
    shape = f"layers.count={layers}", "layers.override=[]", "init_std=0.15"
    config = archzoo.config(name).tiny().override(*shape, *more, *changes)
    return archzoo.build(config, dtype=dtype, seed=3)


def attention_of(model: CausalLM, layer: int = 0) -> Attention:
    mixer = model.layers[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def mla_of(model: CausalLM, layer: int = 0) -> MLA:
    mixer = model.layers[layer].mixer
    assert isinstance(mixer, MLA)
    return mixer


def mean_kl(teacher: CausalLM, student: CausalLM, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("target", ["mla", "mamba2", "zebra-llama"])
@pytest.mark.parametrize("kind", SOURCES)
def test_everything_but_the_mixers_is_kept(kind: str, target: str, tokens) -> None:
    model = source(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = archzoo.convert(model, target, layers=[1] if target == "zebra-llama" else None)
    assert [s.mixer.kind for s in new.config.specs] == {
        "mla": ["mla"] * 3, "mamba2": ["mamba2"] * 3, "zebra-llama": ["mamba2", "mla", "mamba2"],
    }[target]  # fmt: skip
    state = new.state_dict()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        if ".mixer." not in name:
            assert torch.equal(state[name], tensor)
            assert state[name].data_ptr() != model.state_dict()[name].data_ptr()
    for i in range(3):
        out = "o_proj" if new.config.specs[i].mixer.kind == "mla" else "out_proj"
        assert torch.equal(state[f"layers.{i}.mixer.{out}.weight"], before[f"layers.{i}.mixer.o_proj.weight"])
    assert (new.lm_head is None) == (model.lm_head is None) == kind.endswith("-tied")
    assert new.training == model.training
    assert all(p.requires_grad and p.dtype == F64 and p.is_contiguous() for p in new.parameters())
    assert sum(p.numel() for p in new.parameters()) == archzoo.cost(new.config).params

    ids = tokens(2, 11)
    with torch.no_grad():
        whole = new(ids).logits
        cache = new.new_cache(2, 11)
        parts = [new(part, cache=cache).logits for part in torch.split(ids, [6, 1, 4], 1)]
    close(torch.cat(parts, 1), whole)


def test_training_mode_and_half_precision_are_kept(tokens) -> None:
    model = source(dtype=torch.bfloat16).eval()
    new = archzoo.convert(model, "zebra-llama", layers=(0,))
    assert not new.training
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new(tokens(1, 5)).logits.isfinite().all()
    wide = archzoo.convert(source(dtype=torch.float32), "mla")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


# Layouts: hybrid.md, checks 8 and 9.


@pytest.mark.parametrize("name", ZEBRA)
def test_published_layouts(name: str) -> None:
    base, layers, q_rank, kv_rank, params, kv_percent = ZEBRA[name]
    config = archzoo.config(base)
    settings = Conversion.of("zebra-llama", layers=layers, q_rank=q_rank, kv_rank=kv_rank)
    latent = settings.mla_layers(config.layers.count)
    attention = config.specs[0].mixer
    assert isinstance(attention, AttentionConfig)
    mla, mamba2 = settings.mla(attention, config.hidden_size), settings.mamba2(attention)
    mixers = [mla if i in latent else mamba2 for i in range(config.layers.count)]
    new = converted_config(config, mixers, name)
    assert new.specs == archzoo.config(name).specs
    assert new.family == archzoo.config(name).family == "zebra"

    assert archzoo.cost(new).params == archzoo.cost(name).params == params
    with torch.device("meta"):
        model = CausalLM(new)
    assert sum(p.numel() for p in model.parameters()) == params
    size = base.rpartition("-")[2]
    assert (mla.params(config.hidden_size), mamba2.params(config.hidden_size)) == {
        "1b": (10_125_312, 14_763_104), "3b": (19_660_800, 34_705_480), "8b": (34_717_696, 58_886_240),
    }[size]  # fmt: skip
    for kind, counted in (("mla", mla), ("mamba2", mamba2)):
        mixer = next(layer.mixer for layer in model.layers if layer.mixer.config.kind == kind)
        assert sum(p.numel() for p in mixer.parameters()) == counted.params(config.hidden_size)
    # Check 10: rows of the up-projection.
    assert mla.kv_heads * (mla.nope_dim + mla.v_dim) == {"1b": 768, "3b": 1536, "8b": 1536}[size]

    full = archzoo.cost(base).cache_bytes_per_token
    assert 100 * archzoo.cost(new).cache_bytes_per_token / full == kv_percent
    room = [model.to(torch.bfloat16).new_cache(1, slots).nbytes for slots in (0, 1, 100)]
    assert 100 * (room[1] - room[0]) / full == kv_percent
    assert room[2] - room[0] == 100 * (room[1] - room[0])
    assert room[0] == archzoo.cost(new).state_bytes


def test_llama_counts() -> None:
    counts = [archzoo.cost(n).params for n in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")]
    assert counts == [1_235_814_400, 3_212_749_824, 8_030_261_248]


@pytest.mark.parametrize(
    ("q_rank", "kv_rank", "kv_percent"), [(1344, 128, 15.625), (1424, 64, 9.375), (1440, 48, 7.8125)]
)
def test_x_ecomla_cache(q_rank: int, kv_rank: int, kv_percent: float) -> None:
    config = archzoo.config("llama-3.2-1b")
    attention = config.specs[0].mixer
    assert isinstance(attention, AttentionConfig)
    mla = Conversion.of("mla", q_rank=q_rank, kv_rank=kv_rank).mla(attention, config.hidden_size)
    new = converted_config(config, [mla] * 16, "x-ecomla")
    part = archzoo.cost(new).cache_bytes_per_token / archzoo.cost(config).cache_bytes_per_token
    assert 100 * part == kv_percent


def test_measured_cache_growth(tokens) -> None:
    """MLA grows by its formula, Mamba-2 not at all, with real tokens in the cache."""
    new = archzoo.convert(source(), "zebra-llama", layers=[1], kv_rank=24)
    sizes = []
    for length in (1, 9):
        cache = new.new_cache(2, length)
        with torch.no_grad():
            new(tokens(2, length), cache=cache)
        sizes.append([state.nbytes for state in cache.states])
    assert sizes[1][1] - sizes[0][1] == 2 * 8 * (24 + 8) * 8
    assert (sizes[0][0], sizes[0][2]) == (sizes[1][0], sizes[1][2])


def test_absorbed_equals_expanded(tokens) -> None:
    """Check 10, on converted weights."""
    new = archzoo.convert(source(), "mla")
    mixer, ids = mla_of(new), tokens(2, 13)
    ctx, c = new.context(ids), mixer.config
    generator = torch.Generator().manual_seed(5)
    q_nope, q_rope, keys = (
        torch.randn(2, 13, *shape, generator=generator, dtype=F64)
        for shape in ((c.heads, c.nope_dim), (c.heads, c.rope_dim), (c.kv_rank + c.rope_dim,))
    )
    expanded = mixer.expanded(q_nope, q_rope, keys, ctx)
    close(mixer.absorbed(q_nope, q_rope, keys, ctx), expanded)
    assert expanded.abs().max() > 0.1


def test_defaults_follow_the_source() -> None:
    mixers = {}
    for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "smollm2-135m", "llama-130m"):
        config = archzoo.config(name)
        attention = config.specs[0].mixer
        assert isinstance(attention, AttentionConfig)
        mixers[name] = Conversion.of("mla").mla(attention, config.hidden_size)
    assert {n: (m.q_rank, m.kv_rank, m.nope_dim, m.rope_dim, m.v_dim) for n, m in mixers.items()} == {
        "llama-3.2-1b": (1024, 64, 32, 32, 64),
        "llama-3.2-3b": (1536, 128, 64, 64, 128),
        "llama-3.1-8b": (2048, 128, 64, 64, 128),
        "smollm2-135m": (288, 24, 32, 32, 64),
        "llama-130m": (384, 96, 32, 32, 64),
    }
    rope = mixers["llama-3.1-8b"].rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("yarn", 5e5, 8.0, 8192)
    assert rope.table_factor == pytest.approx(1.20794, abs=1e-5)
    assert mixers["llama-3.2-1b"].rope.table_factor == pytest.approx(1.34657, abs=1e-5)
    plain = mixers["smollm2-135m"].rope
    assert (plain.kind, plain.theta, plain.interleaved) == ("default", 1e5, True)


def test_dims_of_a_head() -> None:
    new = archzoo.convert(source(), "mla", nope_dim=12)
    assert (mla_of(new).config.nope_dim, mla_of(new).config.rope_dim) == (12, 4)
    new = archzoo.convert(source(), "mla", rope_dim=6)
    assert (mla_of(new).config.nope_dim, mla_of(new).config.rope_dim) == (10, 6)
    new = archzoo.convert(source(), "mla", nope_dim=4, rope_dim=6)  # rows between the two are dropped
    assert mla_of(new).config.qk_dim == 10


# SVD initialisation: hybrid.md, check 11.


@pytest.mark.parametrize("kind", ["gqa-tied", "mha-untied"])
def test_full_rank_factors_are_exact(kind: str) -> None:
    attention = attention_of(source(kind))
    for weight in (attention.q_proj.weight, torch.cat((attention.k_proj.weight, attention.v_proj.weight))):
        up, down = SVD(weight).factors(min(weight.shape))
        close(up @ down, weight)


def test_truncated_error_is_the_tail_of_the_spectrum() -> None:
    attention = attention_of(source())
    for weight in (attention.q_proj.weight, torch.cat((attention.k_proj.weight, attention.v_proj.weight))):
        svd = SVD(weight)
        for rank in (1, 8, 40):
            up, down = svd.factors(rank)
            error = (up @ down - weight).square().sum()
            close(error, svd.s[rank:].square().sum())


@pytest.mark.parametrize("kind", ["gqa-tied", "mha-tied"])
def test_full_rank_mla_holds_the_attention_weights(kind: str) -> None:
    """Rows: NoPE the head's first, RoPE its last; the shared RoPE key is the mean over the heads."""
    model = source(kind, "hidden_size=32")  # 32 < the channels the latent expands to: full rank fits
    heads = attention_of(model).config.heads
    kv_heads = attention_of(model).config.kv_heads
    new = archzoo.convert(model, "mla", q_rank=32, kv_rank=32, nope_dim=10)
    for i in range(3):
        a, m = attention_of(model, i), mla_of(new, i)
        assert m.q_a_proj is not None
        assert m.q_b_proj is not None
        q = (m.q_b_proj.weight @ m.q_a_proj.weight).view(heads, 16, 32)
        w_q = a.q_proj.weight.view(heads, 16, 32)
        close(q[:, :10], w_q[:, :10])
        close(q[:, 10:], w_q[:, 10:])
        down, k_rope = m.kv_a_proj.weight.split((32, 6))
        kv = (m.kv_b_proj.weight @ down).view(kv_heads, 10 + 16, 32)
        w_k, w_v = (p.weight.view(kv_heads, 16, 32) for p in (a.k_proj, a.v_proj))
        close(kv[:, :10], w_k[:, :10])
        close(kv[:, 10:], w_v)
        close(k_rope, w_k.mean(0)[-6:])


def test_rows_are_taken_from_the_ends_of_each_head() -> None:
    model = source("gqa-tied", "hidden_size=32")
    new = archzoo.convert(model, "mla", q_rank=32, nope_dim=4, rope_dim=6)
    a, m = attention_of(model), mla_of(new)
    assert m.q_a_proj is not None
    assert m.q_b_proj is not None
    q, w_q = (m.q_b_proj.weight @ m.q_a_proj.weight).view(4, 10, 32), a.q_proj.weight.view(4, 16, 32)
    close(q, torch.cat((w_q[:, :4], w_q[:, -6:]), 1))


def test_full_rank_mla_equals_attention_where_rope_does_nothing(tokens) -> None:
    """One key head (its mean is exact) and equal positions (no rotation): nothing is approximate."""
    model = source("mha-untied", "hidden_size=24", "layers.default.mixer.kv_heads=1")
    new = archzoo.convert(model, "mla", q_rank=24, kv_rank=24)
    ids = tokens(2, 9)
    same = torch.zeros_like(ids)
    close(new(ids, positions=same).logits, model(ids, positions=same).logits)
    assert (new(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_energy_rank() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0] + [0.0] * 20, dtype=F64)  # shares 9/14, 13/14, 1
    assert energy_rank(singular, 0.5) == 8  # none fits: at least one, rounded up
    flat = torch.ones(40, dtype=F64)
    assert [energy_rank(flat, e) for e in (0.2, 0.201, 0.2251, 0.5, 1.0)] == [8, 8, 16, 24, 40]


def test_energy_gives_a_rank_per_layer(tokens) -> None:
    model = archzoo.build(source().config, dtype=F64, seed=3)
    with torch.no_grad():
        attention_of(model, 1).q_proj.weight[12:] = 0  # rank 12
        for proj in (attention_of(model, 1).k_proj, attention_of(model, 1).v_proj):
            proj.weight[3:] = 0  # rank 6 together
    new = archzoo.convert(model, "mla", energy=0.9)
    assert (mla_of(new, 1).config.q_rank, mla_of(new, 1).config.kv_rank) == (16, 8)
    assert mla_of(new, 0).config.kv_rank > 8
    for i in range(3):
        a, c = attention_of(model, i), mla_of(new, i).config
        for rank, weight in (
            (c.q_rank, a.q_proj.weight),
            (c.kv_rank, torch.cat((a.k_proj.weight, a.v_proj.weight))),
        ):
            assert rank is not None
            s2 = torch.linalg.svdvals(weight.detach()).square()
            kept = s2.cumsum(0) / s2.sum()
            assert rank % 8 == 0
            assert rank - 8 < max(1, int((kept <= 0.9).sum())) <= rank
    assert new.config.family == "archzoo"
    assert new.config.specs[0] == new.config.layers.default != new.config.specs[1]
    assert ModelConfig.from_dict(new.config.model_dump()).specs == new.config.specs
    assert new(tokens(1, 5)).logits.isfinite().all()
    # A rank that is given stays; one too large for the up-projection is cut to it.
    new = archzoo.convert(model, "mla", energy=1.0, q_rank=24)
    assert {(s.mixer.q_rank, s.mixer.kv_rank) for s in new.config.specs} == {(24, 48)}
    assert new.config.family == "zebra"


@pytest.mark.parametrize("kind", ["gqa-tied", "mha-untied"])
def test_higher_rank_stays_closer_to_the_source(kind: str, tokens) -> None:
    model, ids = source(kind, "init_std=0.05"), tokens(4, 32)  # weak attention: RoPE's pairing matters less
    full = 32 if kind == "mha-untied" else 64
    low, middle, high = (
        mean_kl(model, archzoo.convert(model, "mla", q_rank=q, kv_rank=kv), ids)
        for q, kv in ((8, 8), (full // 2, 24), (full, 48))
    )
    assert high < 0.5 * middle
    assert middle < 0.8 * low
    assert high < 0.2 * low


# Mamba-2 initialisation: hybrid.md, checks 12 and 13.


@pytest.mark.parametrize("kind", ["gqa-tied", "mha-untied"])
def test_mamba2_starts_as_linear_attention(kind: str, monkeypatch, tokens) -> None:
    """Identity convolution, no activation, A = 0, dt = 1, D = 0, no gate: y_t = Σ_{s<=t} (q_t·k_s) v_s."""
    model = source(kind)
    new = archzoo.convert(model, "mamba2")

    def conv(x, w, b, activation, *rest):  # type: ignore[no-untyped-def]
        return causal_conv1d(x, w, b, None, *rest)

    monkeypatch.setattr(mamba2_module, "causal_conv1d", conv)
    monkeypatch.setattr(mamba2_module, "gated_rms_norm", lambda y, *rest: y)
    ids = tokens(2, 37)
    for i in range(3):
        mixer, attention = new.layers[i].mixer, attention_of(model, i)
        assert isinstance(mixer, Mamba2)
        c = attention.config
        with torch.no_grad():
            mixer.conv1d.weight.zero_()[..., -1] = 1
            assert mixer.conv1d.bias is not None
            mixer.conv1d.bias.zero_()
            mixer.A_log.fill_(float("-inf"))
            mixer.D.zero_()
            mixer.in_proj.weight[-c.heads :] = 0
            mixer.dt_bias.fill_(torch.expm1(torch.ones((), dtype=F64)).log())
            x = torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(i), dtype=F64)
            q = (x @ attention.q_proj.weight.T).view(2, 37, c.heads, 16).transpose(1, 2)
            k, v = (
                (x @ p.weight.T).view(2, 37, c.kv_heads, 16).transpose(1, 2)
                for p in (attention.k_proj, attention.v_proj)
            )
            k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
            expected = (q @ k.transpose(-1, -2)).tril() @ v
            expected = expected.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
            close(mixer(x, new.context(ids)), expected, 1e-11)
            assert expected.abs().max() > 1


def test_mamba2_keeps_its_own_initialisation_elsewhere() -> None:
    model = source()
    new, again, other = (archzoo.convert(model, "mamba2", seed=s) for s in (0, 0, 1))
    first, same, different = (m.state_dict() for m in (new, again, other))
    assert all(torch.equal(first[n], same[n]) for n in first)
    for i in range(3):
        name = f"layers.{i}.mixer."
        a = attention_of(model, i)
        z, x, b, c, dt = first[name + "in_proj.weight"].split((64, 32, 32, 64, 4))
        for rows, weight in ((x, a.v_proj.weight), (b, a.k_proj.weight), (c, a.q_proj.weight)):
            assert torch.equal(rows, weight)
        for rows in (z, dt):
            assert 0 < rows.abs().max() <= 64**-0.5
        z2, x2, *_ = different[name + "in_proj.weight"].split((64, 32, 32, 64, 4))
        assert torch.equal(x, x2)
        assert not torch.equal(z, z2)
        assert first[name + "A_log"].exp().ge(1).all()
        assert first[name + "A_log"].exp().le(16).all()
        assert torch.equal(first[name + "D"], torch.ones(4, dtype=F64))
        step = nn.functional.softplus(first[name + "dt_bias"])
        assert step.ge(1e-4).all()
        assert step.le(0.1 + 1e-9).all()
    assert not torch.equal(first["layers.0.mixer.A_log"], first["layers.1.mixer.A_log"])


def test_convert_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    archzoo.convert(source(), "zebra-llama", layers=[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_share_key_value_heads_in_runs() -> None:
    """Check 13: heads 0..rep-1 read KV head 0; MambaInLlama's Mamba-1 repeats runs of 16 channels instead."""
    config = archzoo.config("llama-3.2-1b")
    attention = config.specs[0].mixer
    assert isinstance(attention, AttentionConfig)
    mamba2 = Conversion.of("mamba2").mamba2(attention.model_copy(update={"heads": 8, "kv_heads": 2}))
    small = config.override("layers.count=1", "hidden_size=64", "vocab_size=8")
    new = converted_config(small, [mamba2], "repeat")
    mixer = archzoo.build(new).layers[0].mixer
    assert isinstance(mixer, Mamba2)
    channels = torch.arange(2 * 64 + 2 * 64 + 8 * 64).float()
    x, b, _ = mixer._split(channels)
    kv_head = torch.arange(2 * 64).view(2, 64).float()
    assert torch.equal(x, kv_head.repeat_interleave(4, 0))  # [heads, head_dim]
    owner = b[:, 0] // 64 - 2  # B may stay grouped: the scan gives run i // (heads / groups) to head i
    assert torch.equal(owner.repeat_interleave(8 // len(owner)), torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))

    for kv_heads, differs in ((1, True), (2, True), (4, True), (8, False)):
        flat = torch.arange(kv_heads * 64)
        by_head = flat.view(kv_heads, 64).repeat_interleave(8 // kv_heads, 0).flatten()
        by_state = flat.view(-1, 16).repeat_interleave(8 // kv_heads, 0).flatten()
        assert torch.equal(by_head, by_state) is not differs


# The hybrid from two models.


def test_assembled_equals_converted() -> None:
    model = source(layers=5)
    settings = {"q_rank": 40, "kv_rank": 16}
    mla, mamba2 = archzoo.convert(model, "mla", **settings), archzoo.convert(model, "mamba2")
    hybrid = assemble(mla, mamba2, [3, 0])
    direct = archzoo.convert(model, "zebra-llama", layers=[0, 3], **settings)
    assert hybrid.config.specs == direct.config.specs
    assert hybrid.config.name == direct.config.name == "llama-3.2-1b-2mla-3m2"
    a, b = hybrid.state_dict(), direct.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert a["embed.weight"].data_ptr() != mamba2.embed.weight.data_ptr()


def test_assembled_layers_come_whole() -> None:
    """Feed-forwards and norms were trained too: each layer brings its own."""
    mla, mamba2 = archzoo.convert(source(), "mla"), archzoo.convert(source(), "mamba2")
    with torch.no_grad():
        for i, model in enumerate((mla, mamba2)):
            for p in model.parameters():
                p.add_(i + 1)
    hybrid = assemble(mla, mamba2, [1])
    for name, tensor in hybrid.state_dict().items():
        origin = mla if name.startswith("layers.1.") else mamba2
        assert torch.equal(tensor, origin.state_dict()[name])
    assert assemble(mla, mamba2, []).config.specs == mamba2.config.specs
    assert assemble(mla, mamba2, range(3)).config.specs == mla.config.specs


# Errors.


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("zebra", {}, "did you mean zebra-llama"),
        ("zebra-llama", {}, "needs `layers`"),
        ("mla", {"layers": [0]}, "takes no `layers`"),
        ("zebra-llama", {"layers": [0, 3]}, "from 0 to 2, found \\[0, 3\\]"),
        ("zebra-llama", {"layers": [1, 1]}, "distinct"),
        ("zebra-llama", {"layers": [-1]}, "found \\[-1\\]"),
        ("zebra-llama", {"layers": ["x"]}, "layers.0: .* found 'x'"),
        ("mla", {"kv_rank": 0}, "kv_rank: .* found 0"),
        ("mla", {"kv_rank": 49}, "kv_rank must be at most 48 for this model, found 49"),
        ("mla", {"q_rank": 65}, "q_rank must be at most 64"),
        ("mla", {"energy": 1.5}, "energy: .* found 1.5"),
        ("mla", {"nope_dim": 12, "rope_dim": 6}, "must share 16 rows"),
        ("mla", {"nope_dim": 16}, "must share 16 rows"),
        ("mla", {"rope_dim": 16}, "must share 16 rows"),
        ("mla", {"rope_dim": 5}, "even rope_dim"),
    ],
)
def test_bad_settings(target: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        archzoo.convert(source(), target, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mamba2-130m", "", "layer 0: convert starts from attention, found mixer 'mamba2'"),
        ("zebra-llama-1b", "", "found mixer '(mla|mamba2)'"),
        ("llama-3.2-1b", "layers.default.mixer.qk_norm=head", "plain attention, found qk_norm"),
        ("llama-3.2-1b", "layers.default.mixer.qkv_bias=true", "found qkv_bias"),
        ("llama-3.2-1b", "layers.default.mixer.window=4", "found window"),
        ("llama-130m-mod", "", "needs depth 'every', found 'mod'"),
    ],
)
def test_sources_that_cannot_be_converted(name: str, change: str, message: str) -> None:
    config = archzoo.config(name).tiny()
    with pytest.raises(InputError, match=message):
        archzoo.convert(archzoo.build(config.override(change) if change else config), "mla")


def test_sources_without_rope_or_weights() -> None:
    config = source().config.model_dump()
    config["layers"]["default"]["mixer"]["rope"] = None
    model = archzoo.build(ModelConfig.from_dict(config))
    with pytest.raises(ConfigError, match="source with RoPE"):
        archzoo.convert(model, "mla")
    assert archzoo.convert(model, "mamba2").config.specs[0].mixer.kind == "mamba2"
    with pytest.raises(InputError, match="'meta' device"):
        archzoo.convert(archzoo.build(source().config, device="meta"), "mla")


def test_models_that_do_not_fit_together() -> None:
    mla, mamba2 = archzoo.convert(source(), "mla"), archzoo.convert(source(), "mamba2")
    with pytest.raises(InputError, match=r"layer 0 of '.*-mamba2' must be 'mla', found 'mamba2'"):
        assemble(mamba2, mla, [0])
    with pytest.raises(InputError, match="must differ in their mixers only"):
        assemble(mla, archzoo.convert(source(layers=5), "mamba2"), [0])
    with pytest.raises(ConfigError, match="from 0 to 2"):
        assemble(mla, mamba2, [3])


# Files.


@pytest.mark.parametrize(
    ("target", "settings", "family"),
    [
        ("zebra-llama", {"layers": [1]}, "zebra"),
        ("mla", {}, "zebra"),
        ("mamba2", {}, "archzoo"),
        ("mla", {"energy": 0.5}, "archzoo"),
    ],
)
def test_saved_and_loaded(
    target: str, settings: dict[str, object], family: str, tmp_path: Path, tokens
) -> None:
    model = archzoo.build(source().config, dtype=torch.float32, seed=3)
    with torch.no_grad():
        attention_of(model, 0).q_proj.weight[8:] = 0  # so that energy picks another rank here
    new = archzoo.convert(model, target, **settings)  # type: ignore[arg-type]
    assert new.config.family == family
    archzoo.save(new, tmp_path / "new")
    assert (tmp_path / "new" / "hybrid_config.json").exists() == (family == "zebra")
    again = archzoo.load(tmp_path / "new")
    assert again.config.specs == new.config.specs
    for (name, a), (other, b) in zip(new.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    ids = tokens(1, 7)
    assert torch.equal(new(ids).logits, again(ids).logits)


def test_public_name() -> None:
    import archzoo.conversion

    assert archzoo.convert is archzoo.conversion.convert
