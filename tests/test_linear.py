"""The few-row linear layers against float64."""

from __future__ import annotations

import pytest
import torch

from archzoo.blocks.linear import Linear, together
from archzoo.ops.linear import FEW_ROWS, few, linear, linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 1, 33), (FEW_ROWS, 1), (3, 64), (1, 2048)])
@pytest.mark.parametrize("bias", [False, True])
def testfew_rows_equal_float64(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape).to(dtype), torch.randn(300, shape[-1]).to(dtype)
    b = torch.randn(300).to(dtype) if bias else None
    assert few(x, w)
    exact = x.double() @ w.double().t() + (0 if b is None else b.double())
    y = linear(x, w, b)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert ((y.double() - exact).abs() <= tolerance * (exact.abs() + shape[-1] ** 0.5)).all()


def test_bfloat16_rounds_to_nearest_even_and_keeps_specials() -> None:
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    w = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0], [3.0e38]], dtype=torch.bfloat16)
    y = linear(x, w)[0]
    assert y[0].isnan()
    assert torch.equal(y[1:], w[1:, 0])
    # 1 + 2^-8 lies halfway between two values: the even one wins, as in torch.
    x, w = torch.tensor([[1.0, 2.0**-8]]).bfloat16(), torch.ones(1, 2).bfloat16()
    assert linear(x, w).item() == torch.tensor(1 + 2.0**-8).bfloat16().item()


def test_several_layers_at_once_equal_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 64)
    parts = [(torch.randn(n, 64), None) for n in (0, 5, 192, 777)]
    for y, (w, b) in zip(linears(x, parts), parts, strict=True):
        assert y.shape == (2, 1, w.shape[0])
        torch.testing.assert_close(y, x @ w.t() if b is None else x @ w.t() + b)


def test_threads_do_not_change_the_result() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 1024), torch.randn(4099, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_needs_a_gradient_or_many_rows_stays_with_torch() -> None:
    w = torch.randn(8, 16, requires_grad=True)
    assert not few(torch.randn(1, 16), w)
    assert not few(torch.randn(FEW_ROWS + 1, 16), w.detach())
    assert not few(torch.randn(1, 16, dtype=torch.float64), w.detach().double())
    assert not few(torch.randn(0, 16), w.detach())
    linear(torch.randn(1, 16), w).sum().backward()
    assert w.grad is not None


def test_strided_inputs() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 6, 32)[:, -1], torch.randn(40, 32)
    torch.testing.assert_close(linear(x, w), x @ w.t())
    wide = torch.randn(32, 40)
    torch.testing.assert_close(linear(x, wide.t()), x @ wide)  # a transposed weight goes through torch


def test_together_respects_hooks_and_wrapped_layers() -> None:
    a, b = Linear(8, 4), Linear(8, 6)
    seen = []
    b.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        together(torch.randn(1, 8), a, b)
        ys = together(torch.randn(1, 8), a, torch.nn.Sequential(a))
    assert seen == [1]
    torch.testing.assert_close(ys[0], ys[1])
