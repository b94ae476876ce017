"""The chunked head loss against the plain one: values, both gradients, memory, edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from archzoo.distill.losses import linear_distill_loss
from archzoo.ops.linear_loss import chunk_rows, linear_cross_entropy

N, D, V = 101, 12, 53


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.nelement() * value.element_size())
        return out


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=gen, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (N,), generator=gen)
    labels[torch.rand(N, generator=gen) < 0.2] = -100
    assert 0 < (labels == -100).sum() < N
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction=reduction)


@pytest.mark.parametrize("chunk", [1, 8, 37, 64, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_the_unchunked_loss(
    chunk: int | None, dtype: torch.dtype, tolerance: float, reduction: Any
) -> None:
    hidden, weight, labels = problem(dtype)
    scale = 3.0 / (1 if reduction == "mean" else N)  # a factor on the loss must reach both gradients
    got = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk=chunk)
    want = plain(hidden, weight, labels, reduction)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for g, w in zip(
        torch.autograd.grad(got * scale, (hidden, weight)),
        torch.autograd.grad(want * scale, (hidden, weight)),
        strict=True,
    ):
        assert g.dtype == dtype
        torch.testing.assert_close(g, w, rtol=0, atol=tolerance)


def test_gradcheck() -> None:
    hidden, weight, labels = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels[:9], chunk=4),
        (hidden[:9].detach().requires_grad_(), weight),
    )


def test_leading_dimensions_and_frozen_weight() -> None:
    hidden, weight, labels = problem(torch.float32)
    want = plain(hidden, weight, labels)
    got = linear_cross_entropy(hidden.view(1, N, D), weight.detach(), labels.view(1, N), chunk=10)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(want, hidden)[0])


def test_nothing_counts() -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), chunk=16)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert grad.abs().max() == 0


def test_second_derivative_raises() -> None:
    hidden, weight, labels = problem(torch.float64)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


def test_half_precision_is_accumulated_in_fp32() -> None:
    """bf16 inputs: the weight gradient is that of fp32 arithmetic, rounded once."""
    hidden, weight, labels = problem(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk=1)
    wide = (hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    want = plain(*wide, labels, "sum")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # logits were never rounded to bf16
    grads = torch.autograd.grad(loss, (hidden, weight))
    for got, exact, tensor in zip(grads, torch.autograd.grad(want, wide), (hidden, weight), strict=True):
        assert got.dtype == tensor.dtype == torch.bfloat16
        assert ((got.float() - exact).norm() / exact.norm()).item() < 4e-3  # bf16 unit: 2^-8 = 3.9e-3


def test_autocast_reaches_the_head_but_not_the_loss() -> None:
    hidden, weight, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    rounded = plain(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32


def test_peak_memory_is_chunk_sized() -> None:
    """Forward and backward never hold a tensor larger than a chunk of logits or the inputs themselves."""
    rows, d, vocab, chunk = 2048, 8, 1024, 32
    hidden = torch.randn(rows, d, requires_grad=True)
    weight = torch.randn(vocab, d, requires_grad=True)
    labels = torch.randint(vocab, (rows,))
    bound = 4 * max(chunk * vocab, rows * d, vocab * d)
    with LargestTensor() as chunked:
        torch.autograd.backward(linear_cross_entropy(hidden, weight, labels, chunk=chunk))
    with LargestTensor() as whole:
        torch.autograd.backward(plain(hidden, weight, labels))
    assert chunked.bytes <= bound
    assert whole.bytes >= 4 * rows * vocab > 10 * bound  # the meter does see stored logits


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd++", "skewed_reverse_kl"])
def test_peak_memory_of_distillation(kind: str) -> None:
    """The same with a teacher: nothing of the size of the logits [N, V] is ever made."""
    rows, d, vocab, chunk = 1024, 8, 1024, 32
    x = torch.randn(1, rows, d, requires_grad=True)
    w = torch.randn(vocab, d, requires_grad=True)
    labels = torch.randint(vocab, (1, rows))
    with LargestTensor() as meter:
        loss = linear_distill_loss(x, w, x.detach(), w.detach(), labels, kind, ce_weight=1.0, chunk=chunk)
        torch.autograd.backward(loss)
    assert meter.bytes <= 4 * max(chunk * vocab, rows * d, vocab * d)


def test_chunk_rule() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(10, 100, cpu) == 10
    for vocab in (1000, 49152, 128256):
        rows = chunk_rows(1 << 30, vocab, cpu)
        assert rows * vocab * 4 <= 1 << 26 < (rows + 1) * vocab * 4
    assert chunk_rows(5, 1 << 40, cpu) == 1


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, labels = problem(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, weight, labels, chunk=40)
    torch.testing.assert_close(loss, plain(hidden, weight, labels))
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
