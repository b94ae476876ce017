"""Capacity, GShard's and Switch's training, experts that choose tokens, and PR-MoE."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import CacheError, ConfigError
from archzoo.blocks.context import Aux, Context
from archzoo.blocks.ffns.mlp import MLPConfig
from archzoo.blocks.ffns.moe import MoE, MoEConfig
from archzoo.blocks.registry import Site
from archzoo.ops.experts import Ffns, routed
from archzoo.ops.moe import capacity as keep

Tokens = Callable[..., Tensor]
F64 = torch.float64
POLICIES = ["position", "probability", "random", "batch_prioritised"]


def build(config: MoEConfig) -> MoE:
    layer = config.build(Site(index=0, count=1, hidden_size=16, norm_eps=1e-6)).double()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=gen) * 0.4)
    return layer


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    """Expert e of x [..., d], by itself."""
    w, config = layer.experts, layer.config
    h = x @ w.gate_up[e].T
    if w.gate_up_bias is not None:
        h = h + w.gate_up_bias[e]
    if config.activation == "gelu":
        h = F.gelu(h)
    else:
        gate, up = h.chunk(2, -1)
        h = F.silu(gate) * up
    h = h @ w.down[e].T
    return h if w.down_bias is None else h + w.down_bias[e]


# --- capacity ---------------------------------------------------------------------------------------


def queue(ids: Tensor, weights: Tensor, policy: str) -> list[tuple[int, int]]:
    """(token, choice) of every assignment, the first to be served first."""
    tokens, k = ids.shape
    pairs = [(t, j) for j in range(k) for t in range(tokens)]
    if policy == "probability":
        pairs.sort(key=lambda pair: -float(weights[pair]))
    if policy == "batch_prioritised":
        pairs.sort(key=lambda pair: (pair[1], -float(weights[pair[0]].max())))
    return pairs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("tokens", "capacity"), [(0, 4), (1, 4), (20, 0), (20, 3), (37, 9), (37, 1000)])
def test_each_expert_keeps_its_capacity(policy: str, tokens: int, capacity: int) -> None:
    """Check 13: min(count, C) per expert, and those that the policy serves first."""
    p = torch.randn(tokens, 6, dtype=F64).softmax(-1)
    weights, ids = p.topk(2, -1)
    kept = keep(ids, 6, capacity, policy=policy, weights=weights, seed=1)
    assert ((kept == ids) | (kept == 6)).all()
    counts = ids.flatten().bincount(minlength=6)
    assert torch.equal(kept.flatten().bincount(minlength=7)[:6], counts.clamp(max=capacity))
    if policy != "random":
        room = [capacity] * 6
        expected = torch.full_like(ids, 6)
        for pair in queue(ids, weights, policy):
            if room[ids[pair]]:
                room[ids[pair]] -= 1
                expected[pair] = ids[pair]
        assert torch.equal(kept, expected)


def test_ids_of_nobody_take_no_slot() -> None:
    ids = torch.tensor([[3], [0], [3], [0], [0]])
    assert keep(ids, 3, 2).tolist() == [[3], [0], [3], [0], [3]]


def test_random_dropping_treats_tokens_alike() -> None:
    ids = torch.zeros(10, 1, dtype=torch.long)
    kept = sum((keep(ids, 1, 5, policy="random", seed=i) == 0).float() for i in range(400))
    assert (kept.flatten() - 200).abs().max() < 45  # 4.5 standard deviations


@pytest.mark.parametrize("policy", POLICIES)
def test_dropped_tokens_return_the_shared_expert_only(policy: str) -> None:
    capacity = {"factor": 0.5, "minimum": 0, "drop": policy}
    layer = build(MoEConfig(experts=4, top_k=1, hidden=8, shared=1, capacity=capacity)).train()
    x, aux = torch.randn(2, 12, 16, dtype=F64), Aux()
    out = layer(x, Context((2, 12), x.device, aux=aux)).flatten(0, 1)
    flat, shared = x.flatten(0, 1), layer.shared(x).flatten(0, 1)
    weights, ids = layer.route(flat)
    full = torch.stack([w * expert(layer, int(e), t) for w, e, t in zip(weights, ids, flat, strict=True)])
    alone = torch.isclose(out, shared).all(-1)
    torch.testing.assert_close(out[~alone], (full + shared)[~alone])
    load = ids.flatten().bincount(minlength=4)
    assert int((~alone).sum()) == int(load.clamp(max=3).sum())
    assert aux.statistics()["load"][0].tolist() == load.tolist()  # what the router wanted
    assert float(aux.statistics()["dropped"]) == pytest.approx(float(alone.sum() / 24))
    everything = layer.eval()(x).flatten(0, 1)
    torch.testing.assert_close(everything, full + shared)  # no eval_factor: nothing is dropped


def test_capacity_of_evaluation_and_the_minimum() -> None:
    config = MoEConfig(experts=4, top_k=2, hidden=8, capacity={"factor": 1.25, "eval_factor": 2.0})
    slots = config.capacity.slots
    assert slots(64, 2, 4, True) == 40
    assert slots(64, 2, 4, False) == 64
    assert slots(3, 2, 4, True) == 4
    assert slots(65, 1, 4, True) == math.ceil(1.25 * 65 / 4)


def test_padding_takes_no_slot() -> None:
    layer = build(MoEConfig(experts=2, top_k=1, hidden=8, capacity={"factor": 1.0, "minimum": 0})).train()
    x = torch.randn(1, 1, 16, dtype=F64).expand(1, 8, 16)  # all want the same expert, which takes four
    positions = torch.tensor([[-1, -1, -1, 0, 1, 2, 3, 4]])
    out = layer(x, Context((1, 8), x.device, positions))
    assert out[0].any(-1).tolist() == [False] * 3 + [True] * 4 + [False]


def test_weights_are_renormalised_after_dropping() -> None:
    config = MoEConfig(experts=3, top_k=2, hidden=8, renormalize=True, scale=1.5)
    layer = build(config.model_copy(update={"capacity": _capacity(0.5)})).train()
    x = torch.randn(24, 16, dtype=F64)
    weights, ids = layer.route(x)
    kept = keep(ids, 3, 8)
    expected = torch.zeros_like(x)
    for t in range(24):
        left = [(w, int(e)) for w, e in zip(weights[t], kept[t], strict=True) if e < 3]
        for w, e in left:
            expected[t] += 1.5 * w / sum(w for w, _ in left) * expert(layer, e, x[t])
    torch.testing.assert_close(layer(x[None])[0], expected)
    assert (kept == 3).any()


def _capacity(factor: float) -> object:
    return MoEConfig(experts=3, top_k=2, hidden=8, capacity={"factor": factor}).capacity


# --- GShard and Switch ------------------------------------------------------------------------------


def test_gshard_samples_the_second_expert() -> None:
    layer = build(MoEConfig(experts=4, top_k=2, hidden=8, renormalize=True, sample_second=True))
    x = torch.randn(1, 1, 16, dtype=F64)
    weights, ids = layer.route(x[0])
    chance = 2 * float(weights[0, 1].detach())
    first = expert(layer, int(ids[0, 0]), x[0, 0])
    both = weights[0, 0] * first + weights[0, 1] * expert(layer, int(ids[0, 1]), x[0, 0])
    out = layer.train()(x.expand(1, 2000, 16))[0]
    alone = torch.isclose(out, first).all(-1)
    torch.testing.assert_close(out[~alone], both.expand(2000, -1)[~alone])
    assert float((~alone).double().mean()) == pytest.approx(chance, abs=4 * math.sqrt(0.25 / 2000))
    torch.testing.assert_close(layer.eval()(x)[0, 0], both)


def test_switch_weighs_by_the_raw_probability_and_jitters_in_training() -> None:
    layer = build(MoEConfig(experts=4, top_k=1, hidden=8, jitter=0.2))
    x = torch.randn(1, 5, 16, dtype=F64)
    p = (x[0] @ layer.router.weight.T).softmax(-1)
    expected = torch.stack(
        [q.max() * expert(layer, int(q.argmax()), t) for q, t in zip(p, x[0], strict=True)]
    )
    torch.testing.assert_close(layer.eval()(x)[0], expected)
    assert not torch.isclose(layer.train()(x)[0], expected).all(-1).any()
    ratio = (layer.logits(torch.eye(16, dtype=F64)) / layer.router.weight.T).detach()  # one factor each
    assert 0.8 <= float(ratio.min()) < float(ratio.max()) <= 1.2


# --- experts that choose tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(("length", "top_k"), [(12, 2), (7, 1), (5, 4), (1, 1)])
def test_expert_choice_equals_a_loop(length: int, top_k: int) -> None:
    layer = build(MoEConfig(experts=4, top_k=top_k, hidden=8, choice="experts"))
    x = torch.randn(2, length, 16, dtype=F64, requires_grad=True)
    flat = x.flatten(0, 1)
    p = (flat @ layer.router.weight.T).softmax(-1)
    count = min(2 * length, math.ceil(2 * length * top_k / 4))
    expected = torch.zeros_like(flat)
    for e in range(4):
        for t in p[:, e].topk(count).indices.tolist():
            expected[t] = expected[t] + p[t, e] * expert(layer, e, flat[t])
    aux = Aux()
    out = layer(x, Context((2, length), x.device, aux=aux)).flatten(0, 1)
    torch.testing.assert_close(out, expected)
    statistics = aux.statistics()
    assert statistics["load"].tolist() == [[count] * 4]
    assert statistics["max_violation"].tolist() == [0]
    grads = [torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (out, expected)]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow)


def test_expert_choice_leaves_padding_out() -> None:
    layer = build(MoEConfig(experts=4, top_k=1, hidden=8, choice="experts"))
    x = torch.randn(1, 8, 16, dtype=F64)
    positions = torch.tensor([[-1, -1, -1, -1, -1, -1, 0, 1]])
    out = layer(x, Context((1, 8), x.device, positions))[0]
    assert not out[:6].any()
    p = (x[0, 6:] @ layer.router.weight.T).softmax(-1)
    full = sum(p[:, e, None] * expert(layer, e, x[0, 6:]) for e in range(4))
    torch.testing.assert_close(out[6:], full)  # two slots each, two tokens: everyone takes both


def test_expert_choice_breaks_ties_by_the_lowest_token() -> None:
    layer = build(MoEConfig(experts=2, top_k=1, hidden=8, choice="experts"))
    out = layer(torch.ones(1, 6, 16, dtype=F64))[0]
    assert out.any(-1).tolist() == [True] * 3 + [False] * 3


def test_expert_choice_trains_and_does_not_decode(tokens: Tokens) -> None:
    config = archzoo.config("deepseek-moe-16b").tiny()
    config = config.override('layers.override.0.ffn.choice="experts"')
    model = archzoo.build(config).train()
    ids = tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    assert model.layers[1].ffn.router.weight.grad.abs().max() > 0
    with pytest.raises(CacheError, match="layer 1: experts that choose tokens look at later ones"):
        archzoo.generate(model, ids, 3)
    with pytest.raises(ConfigError, match="choice 'experts' is a softmax alone, found renormalize"):
        config.override("layers.override.0.ffn.renormalize=true")


# --- products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 0, 0], [0, 1, 0], [2, 0, 3]])
def test_rows_behind_the_last_count_are_nothing(counts: list[int], dtype: torch.dtype) -> None:
    """Check 18: no NaN from the tail, and an unused expert gets a gradient of exactly zero."""
    x = torch.randn(9, 16, dtype=dtype, requires_grad=True)
    up = torch.randn(3, 16, 16, dtype=dtype, requires_grad=True)
    down = torch.randn(3, 16, 8, dtype=dtype, requires_grad=True)
    token, scale = torch.arange(9), torch.rand(9, dtype=dtype, requires_grad=True)
    used = sum(counts)
    out = routed(x, token, scale, torch.tensor(counts), Ffns(up, down))
    assert not out[used:].any()
    out.square().sum().backward()
    for grad in (x.grad, up.grad, down.grad, scale.grad):
        assert grad.isfinite().all()
    for e, count in enumerate(counts):
        assert bool(up.grad[e].any()) == bool(down.grad[e].any()) == (count > 0)
    assert not x.grad[used:].any()


def test_permuting_there_and_back_is_the_identity() -> None:
    """Check 13: with weights 1 / k, identical experts are one feed-forward."""
    layer = build(MoEConfig(experts=4, top_k=2, hidden=8, score="softmax_topk"))
    with torch.no_grad():
        layer.router.weight.zero_()
        for weight in (layer.experts.gate_up, layer.experts.down):
            weight.copy_(weight[:1].expand_as(weight))
    x = torch.randn(3, 5, 16, dtype=F64)
    torch.testing.assert_close(layer(x), expert(layer, 0, x))


# --- PR-MoE ------------------------------------------------------------------------------------------


def test_residual_weighs_the_mlp_and_the_expert() -> None:
    """2201.05596: softmax(Linear(d, 2)) times (expert, MLP)."""
    layer = build(MoEConfig(experts=4, top_k=1, hidden=8, activation="gelu", bias=True, residual=12))
    x = torch.randn(2, 5, 16, dtype=F64)
    assert sum(p.numel() for p in layer.parameters()) == layer.config.params(16)
    assert layer.config.active_params(16) == layer.config.params(16) - 3 * (2 * 16 * 8 + 8 + 16)
    for t in x.flatten(0, 1):
        p = (layer.router.weight @ t).softmax(-1)
        routed_part = p.max() * expert(layer, int(p.argmax()), t)
        mlp = layer.residual
        dense = mlp.down_proj.weight @ F.gelu(mlp.up_proj.weight @ t + mlp.up_proj.bias) + mlp.down_proj.bias
        a, b = (layer.coefficient.weight @ t + layer.coefficient.bias).softmax(-1)
        torch.testing.assert_close(layer(t[None, None])[0, 0], a * routed_part + b * dense)


def test_mlp_counts_its_parameters() -> None:
    for bias in (True, False):
        config = MLPConfig(hidden=32, bias=bias)
        layer = config.build(Site(index=0, count=1, hidden_size=16, norm_eps=1e-6))
        assert sum(p.numel() for p in layer.parameters()) == config.params(16)


def test_published_sizes() -> None:
    """Check 16: the totals of 2201.05596 to the digits that it prints."""
    totals = {
        "pr-moe-350m": 4.11,
        "pr-moe-1.3b": 31.4,
        "pr-moe-350m-mos": 3.54,
        "pr-moe-1.3b-mos": 26.9,
    }
    for name, billions in totals.items():
        params = archzoo.cost(name).params / 1e9
        assert round(params, 2 if billions < 10 else 1) == billions
        specs = archzoo.config(name).specs
        experts = [spec.ffn.experts for spec in specs[1::2]]
        small, count = (32, "350m") if "350m" in name else (64, "1.3b")
        assert count in name
        assert experts == [small] * (8 if "mos" in name else 10) + [2 * small] * 2
        assert all(spec.ffn.kind == "mlp" for spec in specs[::2])
        assert len(specs) == (21 if "mos" in name else 24)


@pytest.mark.parametrize(("name", "billions"), [("pr-moe-350m", 13.1), ("pr-moe-1.3b", 52.5)])
def test_standard_moe_of_the_same_base(name: str, billions: float) -> None:
    """128 experts in every other layer and no residual."""
    data = archzoo.config(name).model_dump()
    ffn = data["layers"]["override"][0]["ffn"] | {"experts": 128, "residual": None}
    data["layers"]["override"] = [{"indices": range(1, 24, 2), "ffn": ffn}]
    assert round(archzoo.cost(archzoo.ModelConfig.from_dict(data)).params / 1e9, 1) == billions


@pytest.mark.parametrize(
    "change",
    [
        'capacity={factor=0.5, minimum=0, drop="batch_prioritised"}',
        'choice="experts"',
    ],
)
def test_training_step_is_one_graph(change: str, tokens: Tokens) -> None:
    torch._dynamo.reset()
    config = archzoo.config("deepseek-moe-16b").tiny().override("init_std=0.1")
    key, _, value = change.partition("=")
    data = config.model_dump()
    ffn = data["layers"]["override"][0]["ffn"]
    ffn.update(tomllib.loads(f"{key} = {value}"))
    model = archzoo.build(archzoo.ModelConfig.from_dict(data)).train()
    ids = tokens(2, 20)
    seen = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(ids, labels=ids)
        out.loss.backward()
        seen.append((out.loss.detach(), out.aux, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
