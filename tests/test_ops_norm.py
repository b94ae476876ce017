"""RMSNorm ops: the definitions, and the CPU paths against them. The kernels: tests/kernels/norm.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.errors import InputError
from archzoo.ops import backend
from archzoo.ops.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

SHAPES = [(1, 5), (2, 3, 123), (1, 1, 576), (2, 63, 2048), (1000, 5), (0, 16), (2, 0, 16)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def agree(op: Op, definition: Op, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Outputs, with and without autograd, and gradients of `op` are those of `definition` in float64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, expected = op(*inputs), definition(*wide)
    got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
    with torch.no_grad():
        plain = op(*inputs)
    grads = [torch.randn(t.shape, dtype=t.dtype) for t in got]
    dgot = torch.autograd.grad(got, inputs, grads)
    dexpected = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    assert [t.dtype for t in dgot] == [t.dtype for t in inputs]
    plain = plain if isinstance(plain, tuple) else (plain,)
    for a, b in zip((*got, *plain, *dgot), (*expected, *expected, *dexpected), strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=["auto", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with backend(request.param):
        yield


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, w = randn(*shape), randn(shape[-1])
    agree(lambda x, w: rms_norm(x, w, 1e-3, 0.5), lambda x, w: rms_norm_reference(x, w, 1e-3, 0.5), [x, w])
    agree(rms_norm, rms_norm_reference, [x])


def test_definition() -> None:
    x, w = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, w, 1e-6, 0.5), F.rms_norm(x, (7,), w, 1e-6) / 2)
    y = torch.tensor([[3.0, 4.0, 0.0, 5.0]], dtype=torch.float64)
    rms = torch.tensor([12.5, 12.5, 12.5, 12.5], dtype=torch.float64).sqrt()
    torch.testing.assert_close(rms_norm_reference(y, None, 0.0), y / rms)


def test_layer_norm_scaling_folds_into_the_weight() -> None:
    x, w = torch.randn(4, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, w, scale=3**-0.5), rms_norm(x, w * 3**-0.5))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype) -> None:
    x, r, w = randn(3, 123, dtype=dtype), randn(3, 123, dtype=dtype), randn(123)
    agree(rms_norm, rms_norm_reference, [x, w], TOLERANCE[dtype])
    agree(gated_rms_norm, gated_rms_norm_reference, [x, r, w], TOLERANCE[dtype])
    agree(gated_rms_norm, gated_rms_norm_reference, [x, randn(3, 123), w], TOLERANCE[dtype])
    agree(rms_norm, rms_norm_reference, [x, randn(123, dtype=dtype)], TOLERANCE[dtype])
    agree(
        lambda x, w: rms_norm(x, w, 1e-5, 0.7),
        lambda x, w: rms_norm_reference(x, w, 1e-5, 0.7),
        [x, w],
        TOLERANCE[dtype],
    )
    y, summed = add_rms_norm(x, r, w)
    assert torch.equal(summed, x + r)
    assert torch.equal(y, rms_norm(summed, w))
    assert y.dtype == summed.dtype == dtype
    big = torch.full((1, 4), 300.0, dtype=dtype)  # its square is too large for float16
    torch.testing.assert_close(rms_norm(big), torch.ones_like(big))


@pytest.mark.usefixtures("path")
def test_add_rms_norm() -> None:
    inputs = [randn(2, 3, 123), randn(2, 3, 123), randn(123)]
    agree(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-3, 0.5),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-3, 0.5),
        inputs,
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("d", "size"), [(5, None), (123, 41), (576, 64), (64, 64), (6, 1)])
def test_gated_rms_norm(d: int, size: int | None, norm_before_gate: bool) -> None:
    args = 1e-3, size, norm_before_gate
    inputs = [randn(2, 9, d), randn(2, 9, d), randn(d)]
    agree(lambda *t: gated_rms_norm(*t, *args), lambda *t: gated_rms_norm_reference(*t, *args), inputs)


def test_groups_are_independent_norms() -> None:
    y, z, w = torch.randn(2, 12), torch.randn(2, 12), torch.randn(12)
    whole = gated_rms_norm(y, z, w, group_size=4)
    parts = zip(y.split(4, -1), z.split(4, -1), w.split(4), strict=True)
    torch.testing.assert_close(whole, torch.cat([gated_rms_norm(*part) for part in parts], -1))
    with pytest.raises(InputError, match="group_size 5 does not divide 12"):
        gated_rms_norm(y, z, w, group_size=5)


def test_gradients_of_the_definitions() -> None:
    x, r, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (2, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm_reference(*t, 1e-5, 0.5), (x, r, w))
    for first in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, f=first: gated_rms_norm_reference(*t, 1e-5, 3, f), (x, r, w)
        )
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-5, 0.5), (x, w))  # the CPU path
    assert torch.autograd.gradgradcheck(lambda *t: rms_norm(*t, 1e-5, 0.5), (x, w))


def test_autocast_leaves_it_in_float32() -> None:
    x, w = randn(64, 40), randn(40)
    dy = torch.randn(64, 40)
    expected = torch.autograd.grad(rms_norm(x, w), (x, w), dy)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(rms_norm(x, w), (x, w), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strided_inputs() -> None:
    packed = torch.randn(4, 3, 40)
    x, z, w = packed[..., :16], packed[..., 20:36], torch.randn(32)[::2]
    torch.testing.assert_close(rms_norm(x, w), rms_norm_reference(x, w))
    torch.testing.assert_close(gated_rms_norm(x, z, w), gated_rms_norm_reference(x, z, w))


def test_compile() -> None:
    def f(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        y, summed = add_rms_norm(rms_norm(x, w, scale=0.5), z, w)
        return gated_rms_norm(y, summed, w, group_size=8)

    inputs = [randn(3, 24), randn(3, 24), randn(24)]
    agree(torch.compile(f, fullgraph=True, backend="aot_eager"), f, inputs)
    torch.compiler.reset()
    agree(torch.compile(f, fullgraph=True), f, inputs)
