"""Causal convolution kernels through the public ops, interpreted or on a GPU; see tests/test_triton.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archzoo.ops import conv as ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # it truncates to bfloat16
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def make(
    B: int,
    T: int,
    C: int,
    K: int = 4,
    bias: bool = True,
    state: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """x, weight, bias, state."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    return leaf(B, T, C), leaf(C, K), leaf(C) if bias else None, leaf(B, K, C) if state else None


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def agree(
    inputs: Inputs, activation: str | None, seq_idx: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """Output and gradients are those of the definition in float64."""
    x, weight, bias, state = inputs
    got = ops.causal_conv1d(x, weight, bias, activation, state, seq_idx)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = ops.causal_conv1d_reference(*wide[:3], activation, wide[3], seq_idx)
    close(got, expected, tolerance)
    dy = torch.randn(got.shape, dtype=got.dtype)
    leaves = [t for t in inputs if t is not None]
    grads = torch.autograd.grad(got, leaves, dy)
    definition = torch.autograd.grad(expected, [t for t in wide if t is not None], dy.double())
    for a, b, t in zip(grads, definition, leaves, strict=True):
        assert a.dtype == t.dtype
        close(a, b, tolerance)


def packed(B: int, T: int) -> Tensor:
    """Sequences of uneven lengths, one of a single step."""
    return (torch.arange(T) >= torch.tensor([[1, 2, 7, 31, 33]]).T).sum(0, dtype=torch.int32).expand(B, T)


@pytest.mark.parametrize(
    ("T", "C", "K"), [(0, 5, 4), (1, 5, 4), (2, 123, 4), (63, 70, 4), (9, 5, 2), (4, 8, 1)]
)
def test_conv(T: int, C: int, K: int) -> None:
    agree(make(2, T, C, K, bias=True, state=True), "silu", packed(2, T))
    agree(make(2, T, C, K, bias=False, state=False), None)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_every_combination(activation: str | None, seq_idx: bool, state: bool) -> None:
    agree(make(2, 37, 6, state=state), activation, packed(2, 37).long() if seq_idx else None)


def test_long() -> None:
    agree(make(1, 1000, 5, state=False, bias=False), "silu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    agree(make(1, 13, 24, dtype=dtype), "silu", tolerance=TOLERANCE[dtype])


def test_strided_inputs() -> None:
    x = torch.randn(2, 9, 40)[..., 3:19]
    _, weight, bias, state = make(2, 0, 16)
    y = ops.causal_conv1d(x, weight, bias, "silu", state)
    close(y, ops.causal_conv1d_reference(x, weight, bias, "silu", state), 1e-6)
    x = torch.randn(2, 16, 9).transpose(1, 2)
    close(ops.causal_conv1d(x, weight), ops.causal_conv1d_reference(x, weight), 1e-6)


def test_offsets_beyond_int32() -> None:
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16)  # never touched but for three steps
    x = storage.as_strided((1, 3, 8), (8, stride, 1))
    x.copy_(torch.randn(1, 3, 8))
    weight = torch.randn(8, 4)
    close(ops.causal_conv1d(x, weight), ops.causal_conv1d_reference(x, weight), 2**-9)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_continue_a_sequence(dtype: torch.dtype) -> None:
    x, weight, bias, _ = (
        None if t is None else t.detach() for t in make(2, 9, 300, state=False, dtype=dtype)
    )
    assert x is not None
    assert weight is not None
    expected = ops.causal_conv1d_reference(x, weight, bias)
    state = ops.causal_conv1d_state(x[:, :3], 4)
    for t in range(3, 9):
        y = ops.causal_conv1d_step(x[:, t], state, weight, bias)
        close(y, expected[:, t], TOLERANCE[dtype])
        assert torch.equal(state, ops.causal_conv1d_state(x[:, : t + 1], 4))


def test_a_long_kernel_takes_the_definition() -> None:
    x, weight, _, _ = make(1, 12, 3, K=5)
    assert torch.equal(ops.causal_conv1d(x, weight), ops.causal_conv1d_reference(x, weight))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
def test_registration() -> None:
    x, weight, bias, state = make(2, 5, 6)
    torch.library.opcheck(ops._conv_op, (x, weight, bias, True, state, packed(2, 5)))
    torch.library.opcheck(ops._conv_op, (x, weight, None, False, None, None))
    x, weight, bias, state = (None if t is None else t.detach() for t in (x, weight, bias, state))
    torch.library.opcheck(ops._conv_backward_op, (x, x, weight, bias, True, state, None))
    torch.library.opcheck(ops._conv_step_op, (x[:, 0].clone(), state, weight, bias, True))


def test_compile() -> None:
    x, weight, bias, state = make(2, 5, 6)

    def f(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = ops.causal_conv1d(x, weight, bias, "silu", state)
        state = ops.causal_conv1d_state(x, 4, state)
        return y, ops.causal_conv1d_step(y[:, -1], state, weight), state

    with torch.no_grad():
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(x, weight, state)
        for a, b in zip(compiled, f(x, weight, state), strict=True):
            close(a, b, 1e-6)
