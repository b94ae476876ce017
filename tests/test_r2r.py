"""R2R: the router's size and formula, and decoding with two models against a loop without caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import CausalLM, InputError
from archzoo.generation import R2RRouter, r2r_generate

Tokens = Callable[..., Tensor]


def build(name: str, seed: int, *changes: str) -> CausalLM:
    config = archzoo.config(name).tiny().override("init_std=0.15", *changes)
    return archzoo.build(config, dtype=torch.float64, seed=seed).eval()


@pytest.fixture(scope="module")
def models() -> tuple[CausalLM, CausalLM]:
    return build("llama-130m", 1), build("deepseek-v2-lite", 2, "vocab_size=272")


@pytest.fixture
def router(models: tuple[CausalLM, CausalLM]) -> R2RRouter:
    torch.manual_seed(5)
    return R2RRouter(models[0].embed.weight, width=32, depth=2).eval()


def test_parameters() -> None:
    with torch.device("meta"):
        router = R2RRouter(torch.empty(151_936, 1536))
    trained = sum(p.numel() for p in router.parameters() if p.requires_grad)
    assert trained == 56_302_081
    assert not router.embed.weight.requires_grad
    assert sum(p.numel() for p in router.parameters()) == trained + 151_936 * 1536


def test_score_follows_the_formula(router: R2RRouter) -> None:
    p = dict(router.named_parameters())
    hidden, embedded, logits = torch.randn(7, 64), torch.randn(7, 64), torch.randn(7, 100)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = torch.cat((linear(logits, "logits_proj"), hidden, embedded), -1)
    x = linear(linear(x, "input_proj"), "hidden_proj")
    for i in range(2):
        inner = F.gelu(linear(norm(x, f"blocks.{i}.norm"), f"blocks.{i}.up"))
        x = x + linear(inner, f"blocks.{i}.down")
    expected = linear(norm(x, "norm"), "out")[:, 0]
    torch.testing.assert_close(router.score(hidden, embedded, logits), expected)
    assert torch.equal(router(hidden.double(), embedded, logits), expected.sigmoid())
    out = router.train()(hidden, embedded, logits)
    assert not torch.equal(out, expected.sigmoid())  # dropout
    out.sum().backward()
    grads = {name for name, q in p.items() if q.grad is not None and q.grad.abs().max() > 0}
    assert grads == set(p) - {"embed.weight"}


def test_embedding_is_a_copy(models: tuple[CausalLM, CausalLM], router: R2RRouter) -> None:
    weight = models[0].embed.weight
    assert router.embed.weight.dtype == torch.float32
    own = build("llama-130m", 1).float()
    copy = R2RRouter(own.embed.weight, width=8, depth=1)
    with torch.no_grad():
        own.embed.weight.zero_()
    assert torch.equal(copy.embed.weight, weight.float())


def counted(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each later call of the model."""
    calls, plain = [], model.backbone

    def backbone(ids: Tensor, *args: object) -> Tensor:
        calls.append(ids.shape[1])
        return plain(ids, *args)

    monkeypatch.setattr(model, "backbone", backbone)
    return calls


def test_never_and_always(
    models: tuple[CausalLM, CausalLM], router: R2RRouter, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = models
    ids = tokens(1, 9)
    expected = [archzoo.generate(model, ids, 20, stop_tokens=[]) for model in models]
    assert not torch.equal(*expected)
    calls = counted(large, monkeypatch)
    out = r2r_generate(small, large, router, ids, 20, threshold=1.5, stop_tokens=[])
    assert torch.equal(out.ids, expected[0])
    assert not out.replaced.any()
    assert calls == []
    out = r2r_generate(small, large, router, ids, 20, threshold=-0.5, stop_tokens=[])
    assert torch.equal(out.ids, expected[1])
    assert out.replaced.all()
    assert calls == [9] + [1] * 19


def uncached(
    small: CausalLM, large: CausalLM, router: R2RRouter, ids: Tensor, count: int, threshold: float
) -> tuple[Tensor, list[bool], list[float]]:
    replaced, chances = [], []
    for _ in range(count):
        out = small(ids)
        logits = out.logits[:, -1]
        new = logits.argmax(-1)
        top = logits.sort(-1, descending=True).values[:, :100]
        chances.append(float(router(out.hidden[:, -1], small.embed(new), top)))
        replaced.append(chances[-1] > threshold)
        if replaced[-1]:
            new = large(ids).logits[:, -1, :256].argmax(-1)
        ids = torch.cat((ids, new[:, None]), 1)
    return ids, replaced, chances


@torch.inference_mode()
def test_mixed_decoding_equals_a_loop_without_caches(
    models: tuple[CausalLM, CausalLM], router: R2RRouter, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = models
    ids = tokens(1, 6)
    *_, chances = uncached(*models, router, ids, 30, 1.5)
    threshold = sorted(chances)[20]
    expected, replaced, _ = uncached(*models, router, ids, 30, threshold)
    assert 3 < sum(replaced) < 27
    router.train()  # which decoding does not keep
    calls = counted(large, monkeypatch)
    out = r2r_generate(small, large, router, ids, 30, threshold, stop_tokens=[])
    assert router.training
    assert not small.training
    assert torch.equal(out.ids, expected)
    assert out.replaced.tolist() == replaced
    assert len(calls) == sum(replaced)
    last = max(i for i, on in enumerate(replaced) if on)
    assert sum(calls) == 6 + last  # every token once, none after the last call


def test_stop_tokens(models: tuple[CausalLM, CausalLM], router: R2RRouter, tokens: Tokens) -> None:
    ids = tokens(1, 5)
    whole = r2r_generate(*models, router, ids, 12, 0.5, stop_tokens=[])
    stop = int(whole.ids[0, 9])
    first = whole.ids[0, 5:].tolist().index(stop)
    out = r2r_generate(*models, router, ids, 12, 0.5, stop_tokens=[stop])
    assert torch.equal(out.ids, whole.ids[:, : 6 + first])
    assert len(out.replaced) == first + 1
    assert torch.equal(r2r_generate(*models, router, ids, 0).ids, ids)


def test_what_does_not_go_together(
    models: tuple[CausalLM, CausalLM], router: R2RRouter, tokens: Tokens
) -> None:
    small, large = models
    with pytest.raises(InputError, match=r"input_ids must be \[1, tokens\].*found \[2, 4\]"):
        r2r_generate(small, large, router, tokens(2, 4))
    with pytest.raises(InputError, match="4 prompt tokens and 600 new ones exceed the 512 positions"):
        r2r_generate(small, large, router, tokens(1, 4), 600)
    with pytest.raises(InputError, match=r"token id 260 at \[0, 0\] is outside the vocabulary of 256"):
        r2r_generate(small, large, router, torch.tensor([[260]]))
    with pytest.raises(InputError, match=r"embedding \[256, 64\] is not that of a model \[272, 64\]"):
        r2r_generate(large, small, router, tokens(1, 4))
    with pytest.raises(InputError, match="the router wants 300 logits, the models share 256"):
        r2r_generate(small, large, R2RRouter(small.embed.weight, top=300, width=8), tokens(1, 4))
