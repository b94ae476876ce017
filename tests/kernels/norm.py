"""RMSNorm kernels through the public ops, interpreted or on a GPU; see tests/test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archzoo.kernels.ops import norm as kernels
from archzoo.ops import backend
from archzoo.ops import norm as ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # it truncates to bfloat16


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def agree(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor | None],
    tolerance: float = 1e-5,
) -> None:
    """Outputs and gradients of `op` are those of `definition` in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    got, expected = op(*inputs), definition(*wide)
    got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        close(a, b, tolerance)
    grads = [torch.randn(t.shape, dtype=t.dtype) for t in got]
    dgot = torch.autograd.grad(got, [t for t in inputs if t is not None], grads)
    leaves = [t for t in wide if t is not None]
    dexpected = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    for a, b, t in zip(dgot, dexpected, [t for t in inputs if t is not None], strict=True):
        assert a.dtype == t.dtype
        close(a, b, tolerance)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 123), (1000, 5), (7, 576), (3, 2048), (0, 16), (2, 0, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    for weight in (leaf(shape[-1]), None):
        agree(
            lambda x, w: ops.rms_norm(x, w, 1e-3, 0.5),
            lambda x, w: ops.rms_norm_reference(x, w, 1e-3, 0.5),
            [leaf(*shape), weight],
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    def op(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, r, w, 1e-5, 0.25)

    def definition(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm_reference(x, r, w, 1e-5, 0.25)

    x, w = leaf(5, 123, dtype=dtype), leaf(123, dtype=dtype)
    agree(op, definition, [x, leaf(5, 123, dtype=dtype), w], TOLERANCE[dtype])
    y, summed = op(x, leaf(5, 123), w)
    assert y.dtype == summed.dtype == torch.float32


def test_the_norm_sees_the_rounded_sum() -> None:
    x, r = torch.full((1, 16), 1024.0).half(), torch.full((1, 16), 0.25).half()
    y, summed = ops.add_rms_norm(x, r, None, 1e-9)
    assert torch.equal(summed, x)
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("d", "size"), [(5, None), (123, 41), (576, 64), (64, 64)])
def test_gated_rms_norm(d: int, size: int | None, norm_before_gate: bool) -> None:
    agree(
        lambda y, z, w: ops.gated_rms_norm(y, z, w, 1e-5, size, norm_before_gate),
        lambda y, z, w: ops.gated_rms_norm_reference(y, z, w, 1e-5, size, norm_before_gate),
        [leaf(2, 9, d), leaf(2, 9, d), leaf(d)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    x, z, w = leaf(6, 123, dtype=dtype), leaf(6, 123, dtype=dtype), leaf(123)
    agree(ops.rms_norm, ops.rms_norm_reference, [x, w], tolerance)
    agree(ops.gated_rms_norm, ops.gated_rms_norm_reference, [x, z, w], tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the rows that pad a tile
def test_no_eps() -> None:
    x, z, w = leaf(3, 8), leaf(3, 8), leaf(8)
    agree(lambda x, w: ops.rms_norm(x, w, 0.0), lambda x, w: ops.rms_norm_reference(x, w, 0.0), [x, w])
    agree(
        lambda *args: ops.gated_rms_norm(*args, 0.0),
        lambda *args: ops.gated_rms_norm_reference(*args, 0.0),
        [x, z, w],
    )


def test_strided_inputs() -> None:
    packed = torch.randn(4, 3, 40)
    x, z, w = packed[..., :16], packed[..., 20:36], torch.randn(32)[::2]
    close(ops.rms_norm(x, w), ops.rms_norm_reference(x, w), 1e-6)
    close(ops.rms_norm(x.transpose(0, 1), w), ops.rms_norm_reference(x.transpose(0, 1), w), 1e-6)
    close(ops.gated_rms_norm(x, z, w), ops.gated_rms_norm_reference(x, z, w), 1e-6)
    agree(
        lambda x: ops.rms_norm(x).expand(2, 3, 8).sum(0),  # its gradient is expanded
        lambda x: ops.rms_norm_reference(x).expand(2, 3, 8).sum(0),
        [leaf(3, 8)],
    )


def test_offsets_beyond_int32() -> None:
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16)  # never touched but for three rows
    x = storage.as_strided((3, 8), (stride, 1))
    x.copy_(torch.randn(3, 8))
    close(ops.rms_norm(x), ops.rms_norm_reference(x), 2**-9)
    dx, _ = kernels.rms_norm_backward(x, None, x, None, 1e-5, 1.0)
    assert dx.abs().max() < 1e-2  # y does not change along x


def test_long_rows_take_the_definition() -> None:
    x = torch.randn(1, 16384)
    assert torch.equal(ops.rms_norm(x), ops.rms_norm_reference(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
def test_registration() -> None:
    x, z, w = leaf(3, 7, 24), leaf(3, 7, 24), leaf(24)
    for weight in (w, None):
        torch.library.opcheck(ops._rms_norm_op, (x, weight, 1e-5, 0.5))
        torch.library.opcheck(ops._add_rms_norm_op, (x, z, weight, 1e-5, 0.5))
        detached = None if weight is None else weight.detach()
        torch.library.opcheck(ops._rms_norm_backward_op, (x.detach(), None, z.detach(), detached, 1e-5, 0.5))
    torch.library.opcheck(ops._gated_rms_norm_op, (x, z, w, 1e-5, 8, True))
    args = (x.detach(), z.detach(), z.detach(), w.detach(), 1e-5, 8, True)
    torch.library.opcheck(ops._gated_rms_norm_backward_op, args)


def test_second_derivatives_are_refused() -> None:
    x = leaf(2, 8)
    (dx,) = torch.autograd.grad(ops.rms_norm(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(dx.sum(), x)


def test_compile() -> None:
    def f(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        y, summed = ops.add_rms_norm(ops.rms_norm(x, w), z, w)
        return ops.gated_rms_norm(y, summed, w, group_size=8)

    def definition(*args: Tensor) -> Tensor:
        with backend("reference"):
            return f(*args)

    inputs: list[Tensor | None] = [leaf(5, 24), leaf(5, 24), leaf(24)]
    agree(torch.compile(f, fullgraph=True, backend="aot_eager"), definition, inputs, 1e-4)
