"""Distillation losses: identities, gradients in float64, chunked against whole, masks, vocabulary padding."""

from __future__ import annotations

from math import log
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from archzoo.distill.losses import (
    JSD,
    TVD,
    Divergence,
    ForwardKL,
    Reduction,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TVDPlusPlus,
    common_vocab,
    hidden_loss,
    linear_distill_loss,
    token_loss,
)
from archzoo.errors import InputError
from archzoo.ops.linear_loss import linear_cross_entropy

KINDS: list[Divergence] = [
    ForwardKL(), ReverseKL(), JSD(), JSD(beta=0.1), JSD(beta=0), JSD(beta=1), TVD(), TVDPlusPlus(),
    SkewedForwardKL(), SkewedReverseKL(alpha=0.3),
]  # fmt: skip
B, T, V, D_S, D_T = 2, 37, 31, 7, 9
every_kind = pytest.mark.parametrize("spec", KINDS, ids=repr)


def problem(dtype: torch.dtype = torch.float64, tokens: int = T, seed: int = 0) -> tuple[Tensor, ...]:
    """Student hidden and weight, teacher hidden and weight, labels with 20 % masked."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    labels = torch.randint(V, (B, tokens), generator=gen)
    labels[torch.rand(B, tokens, generator=gen) < 0.2] = -100
    return (
        randn(B, tokens, D_S).requires_grad_(),
        randn(V, D_S).requires_grad_(),
        randn(B, tokens, D_T),
        randn(V, D_T),
        labels,
    )


def log_probs(rows: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_p, log_q = z.log_softmax(-1)
    return log_p, log_q


def value(spec: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    return spec.terms(log_p, log_q)[0]


def close(got: Tensor, want: Tensor, atol: float = 1e-14) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# Identities (distill sheet, check 6)


def test_values_follow_the_formulas() -> None:
    log_p, log_q = log_probs()
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    m = 0.1 * p + 0.9 * q
    for spec, want in [
        (ForwardKL(), kl(p, q)),
        (ReverseKL(), kl(q, p)),
        (JSD(beta=0.1), 0.1 * kl(p, m) + 0.9 * kl(q, m)),
        (TVD(), 1 - torch.minimum(p, q).sum(-1)),
        (SkewedForwardKL(alpha=0.1), kl(p, m)),
        (SkewedReverseKL(alpha=0.9), kl(q, m)),
    ]:
        close(value(spec, log_p, log_q), want)


def test_jsd_symmetry_and_special_cases() -> None:
    log_p, log_q = log_probs()
    close(value(JSD(), log_p, log_q), value(JSD(), log_q, log_p))
    close(value(JSD(beta=0.2), log_p, log_q), value(JSD(beta=0.8), log_q, log_p))
    assert (value(JSD(beta=0.2), log_p, log_q) - value(JSD(beta=0.8), log_p, log_q)).abs().max() > 1e-3
    close(value(JSD(beta=0), log_p, log_q), value(ForwardKL(), log_p, log_q), atol=0)
    close(value(JSD(beta=1), log_p, log_q), value(ReverseKL(), log_p, log_q), atol=0)
    close(value(JSD(beta=1e-9), log_p, log_q) / 1e-9, value(ForwardKL(), log_p, log_q), atol=1e-6)
    with pytest.raises(ValidationError):
        JSD(beta=1.1)


@every_kind
def test_zero_exactly_when_equal(spec: Divergence) -> None:
    log_p, log_q = log_probs()
    assert value(spec, log_p, log_p).abs().max() < 1e-15
    assert value(spec, log_p, log_q).min() > 1e-3


def test_disjoint_supports_reach_the_bounds() -> None:
    z = torch.full((2, 4), -1e4)
    z[0, :2] = z[1, 2:] = 0
    log_p, log_q = z.log_softmax(-1)
    for beta in (0.5, 0.1):
        want = -beta * log(beta) - (1 - beta) * log(1 - beta)
        assert value(JSD(beta=beta), log_p, log_q).item() == pytest.approx(want, rel=1e-6)
    assert value(JSD(), log_p, log_q).item() == pytest.approx(log(2), rel=1e-6)
    assert value(TVD(), log_p, log_q).item() == 1


# Gradients (checks 7 and 8)


@every_kind
def test_gradcheck(spec: Divergence) -> None:
    x, w, t_x, t_w, labels = problem(tokens=3)
    if isinstance(spec, TVDPlusPlus):  # σ is held constant, so finite differences see another function
        x = x.detach()
        here = tvdpp_sigma(x @ w.detach().T, t_x @ t_w.T, labels)

        def scaled(weight: Tensor) -> Tensor:
            sigma = tvdpp_sigma(x @ weight.detach().T, t_x @ t_w.T, labels)
            return linear_distill_loss(x, weight, t_x, t_w, labels, spec) * sigma / here

        assert torch.autograd.gradcheck(scaled, (w,))
        return
    for temperature, ce in [(1.0, 0.0), (2.0, 0.7)]:
        assert torch.autograd.gradcheck(
            lambda h, weight, temperature=temperature, ce=ce: linear_distill_loss(
                h, weight, t_x, t_w, labels, spec, temperature, ce, kd_weight=0.4, chunk=4
            ),
            (x, w),
        )


def test_forward_kl_gradient_is_q_minus_p_over_n() -> None:
    z, t = torch.randn(2, 1, 6, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(token_loss(z, t), z)
    close(grad, (z.softmax(-1) - t.softmax(-1)) / 6, atol=1e-16)


def tvdpp_sigma(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    q, p = z.softmax(-1)[labels != -100], t.softmax(-1)[labels != -100]
    r = (p > q).double()
    mean = (q * r).sum(-1).mean()
    variance: Tensor = (q * (r - mean).square()).sum(-1).mean()
    return variance.sqrt()


def test_tvd_and_tvdpp_gradients() -> None:
    """TVD is -ΣQ·stopgrad(r); TVD++ is -ΣQ·stopgrad((r-μ)/σ), so TVD++·σ is TVD."""
    z, t = torch.randn(2, B, T, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z.requires_grad_()
    labels = problem()[-1]
    valid, q = labels != -100, z.softmax(-1)
    r = (t.softmax(-1) > q).double()
    sigma = tvdpp_sigma(z.detach(), t, labels)
    mean = (q * r).sum(-1)[valid].mean()

    def grad(loss: Tensor) -> Tensor:
        g: Tensor = torch.autograd.grad(loss, z, retain_graph=True)[0]
        return g

    tvd = grad(token_loss(z, t, labels, "tvd"))
    tvdpp = grad(token_loss(z, t, labels, "tvd++"))
    close(tvd, grad(-(q * r).sum(-1)[valid].mean()), atol=1e-17)
    advantage = ((r - mean) / sigma).detach()
    close(tvdpp, grad(-(q * advantage).sum(-1)[valid].mean()), atol=1e-16)
    close(tvdpp * sigma, tvd, atol=1e-16)
    assert abs(sigma - 1) > 0.3  # so the two gradients do differ


# Chunked against whole (checks 9 and 10)


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_chunked_equals_whole(spec: Divergence, dtype: torch.dtype, tolerance: float) -> None:
    x, w, t_x, t_w, labels = problem(dtype)
    z, t = x @ w.T, t_x @ t_w.T
    for temperature, ce_weight in [(1.0, 0.0), (2.0, 0.3)]:
        want = 0.5 * token_loss(z, t, labels, spec, temperature)
        if ce_weight:
            ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
            want = want + ce_weight * ce
        want_grads = torch.autograd.grad(want, (x, w), retain_graph=True)
        for chunk in (1, 8, 37, 64):
            got = linear_distill_loss(
                x, w, t_x, t_w, labels, spec, temperature, ce_weight, kd_weight=0.5, chunk=chunk
            )
            torch.testing.assert_close(got, want, rtol=tolerance * 10, atol=tolerance)
            for g, wg in zip(torch.autograd.grad(got, (x, w)), want_grads, strict=True):
                close(g, wg, tolerance)


@every_kind
def test_masked_rows_do_nothing(spec: Divergence) -> None:
    x, w, t_x, t_w, labels = problem()
    loss = linear_distill_loss(x, w, t_x, t_w, torch.full_like(labels, -100), spec, ce_weight=1.0)
    assert loss.item() == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, (x, w)))

    def run(teacher: Tensor) -> list[Tensor]:
        loss = linear_distill_loss(x, w, teacher, t_w, labels, spec, ce_weight=0.5, chunk=8)
        return [loss, *torch.autograd.grad(loss, (x, w))]

    for broken in (1e3, float("nan")):
        masked = torch.where((labels == -100)[..., None], broken, t_x)
        assert all(torch.equal(a, b) for a, b in zip(run(t_x), run(masked), strict=True))
    kept = torch.where((labels != -100)[..., None], 1e3, t_x)
    assert not torch.equal(run(t_x)[0], run(kept)[0])


# Reductions, temperature, vocabulary


def test_reductions() -> None:
    """Doubling T at equal per-token KL doubles the papers' batchmean (hybrid sheet, check 14)."""
    x, w, t_x, t_w, labels = problem()
    valid = (labels != -100).sum()
    token, batch, total = (
        linear_distill_loss(x, w, t_x, t_w, labels, reduction=r) for r in get_args(Reduction)
    )
    close(token * valid, total, atol=1e-10)
    close(batch * B, total, atol=1e-10)
    twice: list[Any] = [torch.cat([a, a], 1) for a in (x, t_x, labels)]
    close(linear_distill_loss(twice[0], w, twice[1], t_w, twice[2]), token, atol=1e-10)
    close(linear_distill_loss(twice[0], w, twice[1], t_w, twice[2], reduction="batch"), 2 * batch, atol=1e-10)
    with pytest.raises(InputError, match="batch axis"):
        linear_distill_loss(x[0], w, t_x[0], t_w, labels[0], reduction="batch")


def test_equal_models_have_zero_loss() -> None:
    x, w, _, _, labels = problem()
    loss = linear_distill_loss(x, w, x.detach(), w.detach(), labels)
    assert abs(loss.item()) < 1e-15
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (x, w))) < 1e-15


def test_temperature_keeps_the_gradient_scale() -> None:
    """At T → ∞ the T² loss tends to half the variance of the logit gap: a constant, not 0."""
    z, t = torch.randn(2, 1, 5, V, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    gap = z - t
    want = 0.5 * gap.var(-1, correction=0).mean()
    assert token_loss(z, t, temperature=1e4).item() == pytest.approx(want.item(), rel=1e-3)


def test_padded_vocabulary_is_cut() -> None:
    vocab, pad = 256, 2
    gen = torch.Generator().manual_seed(1)
    x, t_x = torch.randn(2, 1, 9, D_S, generator=gen)
    w, t_w = torch.randn(2, vocab + pad, D_S, generator=gen)
    w.requires_grad_()
    labels = torch.randint(vocab, (1, 9), generator=gen)
    want = linear_distill_loss(x, w[:vocab], t_x, t_w[:vocab], labels, ce_weight=1.0)
    close(linear_distill_loss(x, w[:vocab], t_x, t_w, labels, ce_weight=1.0), want, atol=0)
    got = linear_distill_loss(x, w, t_x, t_w[:vocab], labels, ce_weight=1.0)
    close(got, want, atol=0)
    (grad,) = torch.autograd.grad(got, w)
    assert grad.shape == w.shape
    assert grad[vocab:].abs().max() == 0 < grad[:vocab].abs().max()
    assert common_vocab(151936, 152064) == 151936
    with pytest.raises(InputError, match="49152 and 50304"):
        common_vocab(49152, 50304)


def test_unknown_loss_lists_the_known_ones() -> None:
    x, w, t_x, t_w, labels = problem()
    with pytest.raises(ValidationError, match="forward_kl"):
        linear_distill_loss(x, w, t_x, t_w, labels, "kl")


def test_bf16_teacher_and_student() -> None:
    """Half-precision hidden states and weights: logits and loss are fp32."""
    x, w, t_x, t_w, labels = (a.detach() for a in problem(torch.bfloat16))
    got = linear_distill_loss(x, w, t_x, t_w, labels, chunk=8)
    want = token_loss(x.float() @ w.float().T, t_x.float() @ t_w.float().T, labels)
    assert got.dtype == torch.float32
    close(got, want, atol=1e-5)


def test_ce_alone_is_the_model_loss() -> None:
    x, w, t_x, t_w, labels = problem()
    got = linear_distill_loss(x, w, t_x, t_w, labels, temperature=3.0, ce_weight=1.0, kd_weight=0.0)
    close(got, linear_cross_entropy(x, w, labels))


# Hidden states


@pytest.mark.parametrize("kind", ["l2", "mse", "cosine"])
def test_hidden_losses(kind: Any) -> None:
    x, _, _, _, labels = problem()
    teacher = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    mask = labels != -100
    s, t = x[mask], teacher[mask]
    want = {
        "l2": (s - t).pow(2).sum(-1).sqrt().mean(),
        "mse": (s - t).pow(2).mean(),
        "cosine": 1 - ((s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean(),
    }[kind]
    got = hidden_loss(x, teacher, mask, kind)
    close(got, want, 1e-13)
    close(hidden_loss(x, teacher, mask, kind, "batch"), want * mask.sum() / B, 1e-12)
    assert torch.autograd.gradcheck(lambda h: hidden_loss(h, teacher[:, :3], mask[:, :3], kind), x[:, :3])
    (grad,) = torch.autograd.grad(got, x)
    assert grad[~mask].abs().max() == 0
    zero = hidden_loss(x, x, mask, kind)
    (grad,) = torch.autograd.grad(zero, x)
    assert abs(zero.item()) < 1e-15
    assert grad.abs().max() < 1e-15  # the norm is not NaN at 0
    assert hidden_loss(x, teacher, torch.zeros_like(mask), kind).item() == 0
