"""Mixture of experts: the router's published order, ties, routed products, layer against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.blocks.ffns.moe import MoE, MoEConfig
from archzoo.blocks.registry import Site
from archzoo.errors import InputError
from archzoo.ops.backend import backend
from archzoo.ops.experts import Ffns, experts
from archzoo.ops.moe import gate

GOLDEN = torch.tensor([[2.0, -2, 1, 1, 0, 0, -1, 3]])
V3 = {"score": "sigmoid", "groups": 4, "top_groups": 2, "renormalize": True, "scale": 2.5}


def as_dict(weights: Tensor, ids: Tensor) -> dict[int, float]:
    return dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))


def dense(weights: Tensor, ids: Tensor, count: int) -> Tensor:
    return torch.zeros(len(ids), count, dtype=weights.dtype).scatter(1, ids, weights)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_v3_router_golden_values(name: str) -> None:
    """Groups by the sum of their two best, masked with -inf, weights without the bias (2412.19437)."""
    cases = {
        (0.0,) * 8: {2: 1.085538, 7: 1.414462},
        (-2.0,) * 8: {2: 1.085538, 7: 1.414462},  # masking with 0 would choose masked experts
        (0, 0, 0.2, 0.2, 0, 0, 0, -0.9): {2: 1.25, 3: 1.25},
    }
    for bias, expected in cases.items():
        with backend(name):
            got = as_dict(*gate(GOLDEN, top_k=2, bias=torch.tensor(bias), **V3))
        assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lowest_index_wins_ties(name: str, score: str, dtype: torch.dtype) -> None:
    with backend(name):
        _, ids = gate(torch.zeros(3, 8, dtype=dtype), top_k=3, score=score)
        assert ids.tolist() == [[0, 1, 2]] * 3
        _, ids = gate(torch.zeros(1, 8, dtype=dtype), top_k=2, score=score, groups=4, top_groups=1)
        assert ids.tolist() == [[0, 1]]
        _, ids = gate(torch.tensor([[0, 5, 1, 5, 5, 1.0]], dtype=dtype), top_k=4, score=score)
        assert ids.tolist() == [[1, 3, 4, 2]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", [(1, 1, "max"), (4, 2, "top2_sum"), (4, 2, "max")])
def test_rust_router_equals_the_definition(
    score: str, renormalize: bool, groups: tuple[int, int, str]
) -> None:
    logits = torch.randn(200, 16) * 2
    bias = torch.randn(16) * 0.1 if score == "sigmoid" else None
    options = dict(zip(("groups", "top_groups", "group_score"), groups, strict=True))
    options |= {"top_k": 4, "score": score, "bias": bias, "renormalize": renormalize, "scale": 1.5}
    fast = gate(logits, **options)
    with backend("reference"):
        slow = gate(logits, **options)
    assert torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-6, atol=1e-7)
    assert fast[0].dtype == torch.float32
    assert fast[1].dtype == torch.int64
    if renormalize or score == "softmax_topk":
        torch.testing.assert_close(fast[0].sum(1), torch.full((200,), 1.5))
    for row in fast[1].tolist():
        assert len(set(row)) == 4


def test_softmax_weights_are_over_all_experts() -> None:
    logits = torch.randn(5, 8)
    weights, ids = gate(logits, top_k=3)
    torch.testing.assert_close(weights, logits.softmax(-1).topk(3).values)
    assert torch.equal(ids, logits.topk(3).indices)
    picked, same = gate(logits, top_k=3, score="softmax_topk")
    torch.testing.assert_close(picked, gate(logits, top_k=3, renormalize=True)[0])
    assert torch.equal(same, ids)


def test_router_gradient_reaches_the_logits_but_not_the_bias() -> None:
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def weights(values: Tensor) -> Tensor:
        w, ids = gate(values, top_k=2, bias=bias, **V3)
        return dense(w, ids, 8)

    assert torch.autograd.gradcheck(weights, (logits,), eps=1e-7)
    weights(logits).square().sum().backward()
    assert logits.grad.abs().max() > 0
    assert bias.grad is None or not bias.grad.any()


def test_wrong_logits_are_refused() -> None:
    with pytest.raises(InputError, match=r"logits must be \[tokens, experts\], found \[2, 3, 4\]"):
        gate(torch.zeros(2, 3, 4), top_k=1)


# --- experts ---------------------------------------------------------------------------------------


def loop(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for t, k in torch.cartesian_prod(torch.arange(len(x)), torch.arange(ids.shape[1])).tolist():
        gate_rows, up_rows = (gate_up[ids[t, k]] @ x[t]).chunk(2)
        out[t] = out[t] + weights[t, k].to(x.dtype) * (down[ids[t, k]] @ (F.silu(gate_rows) * up_rows))
    return out


def problem(tokens: int, route: Callable[[int], Tensor], dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((tokens, 16), (tokens, 2), (6, 16, 16), (6, 16, 8))
    x, w, gate_up, down = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)
    return [x, w.abs(), route(tokens), gate_up, down]


ROUTES: dict[str, Callable[[int], Tensor]] = {
    "spread": lambda t: torch.stack((torch.arange(t) % 6, (torch.arange(t) * 5 + 1) % 6), 1),
    "unused experts": lambda t: torch.tensor([[1, 4]]).expand(t, 2),
    "one takes all": lambda t: torch.tensor([[5, 5]]).expand(t, 2),
}


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_experts_equal_a_loop(
    tokens: int, route: str, dtype: torch.dtype, tolerance: float, name: str
) -> None:
    args = problem(tokens, ROUTES[route], dtype)
    x, w, ids, gate_up, down = args
    tensors = [t.requires_grad_() for t in (x, w, gate_up, down)]
    with backend(name):
        out = experts(x, w, ids, Ffns(gate_up, down))
        grads = torch.autograd.grad(out.square().sum(), tensors, allow_unused=tokens == 0)
    expected = loop(*args)
    assert out.shape == expected.shape
    if tokens == 0:
        return
    slow = torch.autograd.grad(expected.square().sum(), tensors, retain_graph=True)
    for fast, exact in zip((out, *grads), (expected, *slow), strict=True):
        scale = 1 + exact.abs().max()
        torch.testing.assert_close(fast / scale, exact / scale, rtol=0, atol=tolerance)
    unused = torch.ones(6, dtype=torch.bool)
    unused[ids.flatten()] = False
    assert not grads[2][unused].any()  # exactly zero, not what happened to be in memory
    assert not grads[3][unused].any()


def test_experts_with_odd_widths_take_the_other_path() -> None:
    """Rows that are no multiple of 16 bytes."""
    gen = torch.Generator().manual_seed(0)
    x, w, gate_up, down = (torch.randn(s, generator=gen) for s in ((7, 10), (7, 2), (3, 6, 10), (3, 10, 3)))
    ids = torch.arange(14).view(7, 2) % 3
    torch.testing.assert_close(experts(x, w, ids, Ffns(gate_up, down)), loop(x, w, ids, gate_up, down))


def test_weight_a_half_twice_through_one_expert_is_that_expert() -> None:
    x, _, _, gate_up, down = problem(5, ROUTES["spread"], torch.float64)
    ids, half = torch.full((5, 2), 3), torch.full((5, 2), 0.5)
    g, u = (x @ gate_up[3].T).chunk(2, -1)
    torch.testing.assert_close(experts(x, half, ids, Ffns(gate_up, down)), (F.silu(g) * u) @ down[3].T)


# --- the layer -------------------------------------------------------------------------------------


def build(config: MoEConfig, dtype: torch.dtype = torch.float64) -> MoE:
    layer = config.build(Site(index=0, count=1, hidden_size=16, norm_eps=1e-6))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=gen) * 0.4)
        if layer.selection_bias is not None:
            layer.selection_bias.copy_(torch.randn(config.experts, generator=gen) * 0.2)
    return layer.to(dtype)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(experts=8, top_k=3, hidden=8, shared=2),
        MoEConfig(experts=8, top_k=2, hidden=8, score="sigmoid", renormalize=True, scale=2.5, shared=1),
        MoEConfig(experts=8, top_k=2, hidden=8, score="sigmoid", selection_bias=True),
        MoEConfig(experts=4, top_k=1, hidden=8),
    ],
    ids=["deepseek", "v3", "bias", "switch"],
)
def test_layer_equals_a_plain_loop(config: MoEConfig) -> None:
    layer, x = build(config), torch.randn(2, 5, 16, dtype=torch.float64)
    out = layer(x)
    total = sum(t.numel() for t in (*layer.parameters(), *layer.buffers()))
    assert total == config.params(16)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        row = x[b, t]
        logits = layer.router.weight @ row
        scores = logits.softmax(0) if config.score == "softmax" else logits.sigmoid()
        choice = scores if layer.selection_bias is None else scores + layer.selection_bias
        chosen = choice.topk(config.top_k).indices
        weights = scores[chosen]
        if config.renormalize:
            weights = weights / weights.sum()
        expected = torch.zeros(16, dtype=torch.float64)
        for w, e in zip(weights * config.scale, chosen, strict=True):
            gate_rows, up_rows = (layer.experts.gate_up[e] @ row).chunk(2)
            expected += w * (layer.experts.down[e] @ (F.silu(gate_rows) * up_rows))
        if config.shared:
            s = layer.shared
            assert s.gate_proj.weight.shape == (8 * config.shared, 16)
            expected += s.down_proj(F.silu(s.gate_proj(row)) * s.up_proj(row))
        torch.testing.assert_close(out[b, t], expected, rtol=1e-12, atol=1e-12)


def test_layer_routes_in_fp32() -> None:
    """Two experts whose bf16 scores are equal and whose fp32 scores are not."""
    layer = build(MoEConfig(experts=2, top_k=1, hidden=8), torch.bfloat16)
    x = torch.ones(1, 1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.router.weight[0] = 1.0
        layer.router.weight[1] = 1.0
        layer.router.weight[1, 0] = 1.0078125  # the next bf16: logit 16.0078, which bf16 rounds to 16
    assert layer.route(x[0])[1].tolist() == [[1]]


def test_selection_bias_stays_fp32_in_a_bf16_model() -> None:
    from archzoo import build as build_model
    from archzoo import config

    cfg = config("deepseek-moe-16b").tiny().override("layers.override.0.ffn.selection_bias=true")
    model = build_model(cfg, dtype=torch.bfloat16)
    bias = model.layers[1].ffn.selection_bias
    assert bias.dtype == torch.float32
    assert not bias.any()
    assert not any("selection_bias" in name for name, _ in model.named_parameters())
    assert "layers.1.ffn.selection_bias" in model.state_dict()
