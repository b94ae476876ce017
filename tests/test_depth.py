"""Residual schemes and depth policies: LayerNorm Scaling and Mixture-of-Depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import CausalLM
from archzoo.blocks.context import Aux, Context
from archzoo.blocks.depth.mod import MixtureOfDepthsConfig, RoutedState
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import Site
from archzoo.blocks.residual import ResidualConfig
from archzoo.configuration import LayerSpec
from archzoo.model import Layer

# --- LayerNorm Scaling -----------------------------------------------------------------------------


def test_output_variance_grows_linearly_without_and_logarithmically_with_scaling() -> None:
    """Measured for width 512 and std 0.02: .415 and 2.04 after 12 and 48 layers, .068 and .119 with LNS.

    Half the width with the double variance of weights behaves the same.
    """
    config = archzoo.config("llama-130m-lns").override(
        "vocab_size=8",
        "hidden_size=256",
        f"init_std={0.02 * 2**0.5}",
        "layers.count=48",
        "layers.default.mixer.heads=4",
        "layers.default.mixer.kv_heads=4",
        "layers.default.ffn.hidden=688",
    )
    model = archzoo.build(config)
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    seen: dict[str, dict[int, Tensor]] = {}
    for residual in ("lns", "pre"):
        if residual == "pre":  # the same weights without the factor
            for module in model.modules():
                if isinstance(module, RMSNorm):
                    module.scale = 1.0
        h, ctx = x, Context((1, 64), x.device)
        seen[residual] = {}
        with torch.inference_mode():
            for i, layer in enumerate(model.layers, 1):
                h = layer(h, ctx)
                if i in (1, 12, 48):
                    seen[residual][i] = h
    assert torch.equal(seen["lns"][1], seen["pre"][1])
    pre, lns = ({i: h.var().item() for i, h in seen[kind].items()} for kind in ("pre", "lns"))
    assert pre[48] / pre[12] > 4
    assert lns[48] / lns[12] < 2
    assert pre[12] == pytest.approx(0.415, rel=0.2)
    assert pre[48] == pytest.approx(2.04, rel=0.2)
    assert lns[12] == pytest.approx(0.068, rel=0.2)
    assert lns[48] == pytest.approx(0.119, rel=0.2)


def test_factor_is_the_inverse_root_of_the_layer_counted_from_one() -> None:
    assert [ResidualConfig(kind="lns").norm_scale(i) for i in (0, 3, 15)] == [1.0, 0.5, 0.25]
    assert ResidualConfig().norm_scale(7) == 1.0
    model = archzoo.build(archzoo.config("llama-130m-lns"), device="meta")
    for i, layer in enumerate(model.layers, 1):
        assert layer.mixer_norm.scale == layer.ffn_norm.scale == i**-0.5
    assert model.norm.scale == 1.0


def test_scaling_folds_into_the_gains(tokens: Any) -> None:
    config = archzoo.config("llama-130m-lns").tiny().override("layers.count=4", "init_std=0.2")
    scaled = archzoo.build(config, dtype=torch.float64)
    plain = archzoo.build(config.override("layers.default.residual.kind=pre"), dtype=torch.float64)
    with torch.no_grad():
        for i, layer in enumerate(plain.layers, 1):
            layer.mixer_norm.weight /= i**0.5
            layer.ffn_norm.weight /= i**0.5
    ids = tokens(1, 9)
    torch.testing.assert_close(scaled(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


def test_layer_is_pre_norm() -> None:
    config = archzoo.config("llama-130m-lns").tiny().override("init_std=0.2")
    layer = archzoo.build(config, dtype=torch.float64).layers[1]
    x, ctx = torch.randn(1, 5, 64, dtype=torch.float64), Context((1, 5), torch.device("cpu"))

    def normed(h: Tensor, norm: RMSNorm) -> Tensor:
        return F.rms_norm(h, (64,), norm.weight, 1e-6) / 2**0.5

    attended = x + layer.mixer(normed(x, layer.mixer_norm), ctx)
    expected = attended + layer.ffn(normed(attended, layer.ffn_norm))
    torch.testing.assert_close(layer(x, ctx), expected, rtol=1e-12, atol=1e-12)


# --- Mixture-of-Depths -----------------------------------------------------------------------------


def layer_with(depth: MixtureOfDepthsConfig, mixer: str = "smollm2-135m") -> Layer:
    """One layer whose router reads channel 0 of its input: tests choose the scores."""
    spec = archzoo.config(mixer).tiny().specs[0]
    layer = Layer(
        LayerSpec(mixer=spec.mixer, ffn=spec.ffn, depth=depth),
        Site(index=0, count=1, hidden_size=64, norm_eps=1e-5),
    ).double()
    gen = torch.Generator().manual_seed(0)
    for name, param in layer.named_parameters():
        torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.2, generator=gen)
    with torch.no_grad():
        layer.depth.router.weight.copy_(F.one_hot(torch.tensor([0]), 64))
    return layer.requires_grad_(False)


def inputs(scores: list[list[float]]) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(len(scores), len(scores[0]), 64, generator=gen, dtype=torch.float64)
    x[..., 0] = torch.tensor(scores, dtype=torch.float64)
    return x


def context(x: Tensor, positions: Tensor | None = None, aux: Aux | None = None) -> Context:
    return Context(x.shape[:2], x.device, positions, aux=aux)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", ["smollm2-135m", "x-ecomla-1b", "step-3"])
@pytest.mark.parametrize("gate", ["raw", "sigmoid", "tanh"])
def test_full_capacity_is_a_weighted_residual(gate: str, mixer: str) -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=1.0, gate=gate), mixer).train()
    x = inputs([[0.3, -0.7, 1.0, 0.0, 2.0], [1.0, 1.0, -1.0, 0.5, 0.1]])
    block = layer.parts(x, context(x))[0]
    r = {"raw": lambda t: t, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[gate](x[..., :1])
    assert_close(layer(x, context(x)), x + r * (block - x))


def test_score_one_is_the_dense_block_and_score_zero_is_the_identity() -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=1.0)).train()
    x = inputs([[1.0] * 6])
    assert_close(layer(x, context(x)), layer.parts(x, context(x))[0])
    x = inputs([[0.0] * 6])
    assert torch.equal(layer(x, context(x)), x)


def test_weight_on_the_feed_forward_only() -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=1.0, weight_target="mlp")).train()
    x = inputs([[0.3, -0.7, 1.0, 2.0]])
    block, mixed = layer.parts(x, context(x))
    attended = x + mixed
    assert_close(layer(x, context(x)), attended + x[..., :1] * (block - attended))


@pytest.mark.parametrize("training", [True, False])
def test_chosen_tokens_run_the_block_on_their_subsequence(training: bool) -> None:
    """Attention sees the chosen tokens only, at their original positions; the rest pass bitwise."""
    layer = layer_with(MixtureOfDepthsConfig(capacity=0.5)).train(training)
    chosen = [1, 2, 5, 7]
    scores = [-1.0] * 8
    for i in chosen:
        scores[i] = 1.0
    x = inputs([scores])
    aux = Aux()
    y = layer(x, context(x, aux=aux))
    rest = [i for i in range(8) if i not in chosen]
    assert torch.equal(y[:, rest], x[:, rest])
    picked = x[:, chosen]
    block = layer.parts(picked, context(picked, torch.tensor([chosen])))[0]
    assert_close(y[:, chosen], block)
    squeezed = layer.parts(picked, context(picked))[0]
    assert not torch.allclose(y[:, chosen], squeezed, atol=1e-6)  # positions 0 1 2 3 would be wrong
    assert len(aux.losses()) == training


def test_training_takes_the_best_of_each_row_and_teaches_the_sign() -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=0.4)).train()
    x = inputs([[0.1, 0.9, -0.5, 0.9, 0.9], [-3.0, -1.0, -2.0, -4.0, -1.5]])
    aux = Aux()
    y = layer(x, context(x, aux=aux))
    moved = (y != x).any(-1)
    assert moved.tolist() == [[False, True, False, True, False], [False, True, False, False, True]]
    assert_close(aux.losses()["depth_loss"], F.binary_cross_entropy_with_logits(x[..., 0], moved.double()))


def test_evaluation_takes_every_positive_score() -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=0.2)).eval()
    x = inputs([[0.1, 0.9, -0.5, 0.0, 0.9], [-3.0, -1.0, -2.0, -4.0, -1.5]])
    moved = (layer(x, context(x)) != x).any(-1)
    assert moved.tolist() == [[True, True, False, False, True], [False] * 5]


def test_padding_is_never_chosen() -> None:
    layer = layer_with(MixtureOfDepthsConfig(capacity=0.5))
    x = inputs([[9.0, 9.0, 0.2, 0.4, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    for training in (True, False):
        aux = Aux()
        y = layer.train(training)(x, context(x, positions, aux))
        assert torch.equal(y[0, :2], x[0, :2])
        alone = layer(x[:1, 2:], context(x[:1, 2:]))
        if not training:
            assert_close(y[0, 2:], alone[0])
        assert y.isfinite().all()
        assert all(a.isfinite() for a in aux.losses().values())


@pytest.mark.parametrize(
    ("capacity", "length", "kept"),
    [(0.125, 64, 8), (0.125, 7, 1), (0.125, 15, 1), (1.0, 5, 5), (0.29, 100, 29), (0.5, 0, 0)],
)
def test_capacity_is_rounded_down_and_at_least_one(capacity: float, length: int, kept: int) -> None:
    assert MixtureOfDepthsConfig(capacity=capacity).tokens(length) == kept


def test_routed_cache_holds_what_was_routed(tokens: Any) -> None:
    model: CausalLM = archzoo.build(
        archzoo.config("llama-130m-mod").tiny().override("init_std=0.15"), dtype=torch.float64
    ).eval()
    routed: list[int] = []
    model.layers[1].depth.router.register_forward_hook(lambda m, a, out: routed.append(int((out > 0).sum())))
    cache, ids = model.new_cache(1, 24), tokens(1, 24)
    with torch.inference_mode():
        for part in ids.split([10] + [1] * 14, 1):
            model(part, cache=cache)
    state = cache.states[1]
    assert isinstance(state, RoutedState)
    assert len(routed) == 15
    assert 0 < sum(routed) < 24
    assert state.timeline.length == state.inner.length == sum(routed)
    assert cache.length == cache.states[0].length == 24
    kept = state.timeline.positions()[0]
    assert (kept.diff() > 0).all()


def test_rows_that_route_different_numbers_of_tokens(tokens: Any, tiny: Any) -> None:
    """A batch equals its rows alone, and the cache stays exact when a row skips a step."""
    model, ids = tiny("llama-130m-mod"), tokens(3, 20)
    with torch.inference_mode():
        alone = torch.cat([model(row[None]).logits for row in ids])
        assert_close(model(ids).logits, alone)
        cache = model.new_cache(3, 20)
        stepped = [model(part, cache=cache).logits for part in ids.split([4, 3] + [1] * 13, 1)]
    assert_close(torch.cat(stepped, 1), alone)


def test_depth_loss_joins_the_training_loss(tokens: Any) -> None:
    model = archzoo.build(archzoo.config("llama-130m-mod").tiny(), dtype=torch.float64).train()
    ids = tokens(2, 24)
    out = model(ids, labels=ids)
    assert list(out.aux) == ["depth_loss"]
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(out.loss, plain + out.aux["depth_loss"])
    assert model.eval()(ids, labels=ids).aux == {}


def test_cost_counts_the_share_of_tokens() -> None:
    """Six of twelve layers at 1/8: KV and linear FLOPs 0.5625 of the dense model's, attention 0.508."""
    dense, mod = archzoo.config("llama-130m"), archzoo.config("llama-130m-mod")
    seq_len, head, router = 1024, 2 * 32000 * 768, 2 * 768

    def prefill(tokens: int) -> int:
        return (archzoo.cost(dense, tokens).prefill_flops - head) // 12

    def step(keys: int) -> float:
        return (archzoo.cost(dense, keys - 1).decode_flops - head) / 12

    cost, full = archzoo.cost(mod, seq_len), archzoo.cost(dense, seq_len)
    assert cost.prefill_flops == head + 6 * (prefill(1024) + prefill(128) + router * 1024)
    assert cost.decode_flops == pytest.approx(
        head + 6 * (step(1025) + step(128) * 128 / 1025 + router), abs=6
    )
    assert cost.cache_bytes == 0.5625 * full.cache_bytes
    assert cost.cache_bytes_per_token == 0.5625 * full.cache_bytes_per_token
