"""Causal convolution: the definition, and the CPU path against it. The kernels: tests/kernels/conv.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.errors import InputError
from archzoo.ops import backend
from archzoo.ops.conv import causal_conv1d, causal_conv1d_reference, causal_conv1d_state, causal_conv1d_step

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def agree(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    seq_idx: Tensor | None = None,
) -> None:
    """Output, with and without autograd, and gradients are those of the definition in float64."""
    inputs = x, weight, bias, state
    x_, weight_, bias_, state_ = (None if t is None else t.detach().double().requires_grad_() for t in inputs)
    expected = causal_conv1d_reference(x_, weight_, bias_, activation, state_, seq_idx)
    got = causal_conv1d(x, weight, bias, activation, state, seq_idx)
    with torch.no_grad():
        plain = causal_conv1d(x, weight, bias, activation, state, seq_idx)
    dy = torch.randn(got.shape, dtype=got.dtype)
    leaves = [t for t in inputs if t is not None]
    dgot = torch.autograd.grad(got, leaves, dy)
    wide = [t for t in (x_, weight_, bias_, state_) if t is not None]
    dexpected = torch.autograd.grad(expected, wide, dy.double())
    assert got.dtype == x.dtype
    assert [t.dtype for t in dgot] == [t.dtype for t in leaves]
    tolerance = TOLERANCE[x.dtype]
    for a, b in zip((got, plain, *dgot), (expected, expected, *dexpected), strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


def packed(B: int, T: int) -> Tensor:
    """Sequences of uneven lengths, one of a single step."""
    return (torch.arange(T) >= torch.tensor([[1, 2, 7, 31, 33]]).T).sum(0, dtype=torch.int32).expand(B, T)


@pytest.fixture(params=["auto", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with backend(request.param):
        yield


def test_definition() -> None:
    """It is PyTorch's grouped convolution with padding on the left."""
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 11, 6), (6, 4), (6,)))
    expected = F.conv1d(x.transpose(1, 2), w.unsqueeze(1), b, padding=3, groups=6)[..., :11].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d_reference(x, w, b, None), expected)
    torch.testing.assert_close(causal_conv1d_reference(x, w, b), F.silu(expected))
    torch.testing.assert_close(causal_conv1d(x, w.unsqueeze(1), b), F.silu(expected))
    with pytest.raises(InputError, match="'relu'"):
        causal_conv1d(x, w, b, "relu")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("T", "C", "K"), [(0, 5, 4), (1, 5, 4), (2, 123, 4), (63, 576, 4), (1000, 5, 2), (4, 8, 1)]
)
def test_conv(T: int, C: int, K: int) -> None:
    agree(randn(2, T, C), randn(C, K), randn(C), "silu", randn(2, K, C))
    agree(randn(2, T, C), randn(C, K), None, None, None)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_combination(dtype: torch.dtype, seq_idx: bool, state: bool) -> None:
    x, weight, bias = randn(2, 37, 6, dtype=dtype), randn(6, 4), randn(6)
    agree(x, weight, bias, "silu", randn(2, 4, 6) if state else None, packed(2, 37) if seq_idx else None)


def test_gradients_of_the_definition() -> None:
    shapes = [(2, 5, 3), (3, 4), (3,), (2, 4, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 5, 6]])
    for ids in (seq_idx, None):  # None: the CPU path
        assert torch.autograd.gradcheck(
            lambda x, w, b, s, i=ids: causal_conv1d(x, w, b, "silu", s, i), inputs
        )
    assert torch.autograd.gradgradcheck(lambda x, w, b, s: causal_conv1d(x, w, b, "silu", s), inputs)


@pytest.mark.usefixtures("path")
def test_packed_sequences_are_separate() -> None:
    lengths = [1, 4, 7]
    x, w, b, state = torch.randn(1, 12, 5), torch.randn(5, 4), torch.randn(5), torch.randn(1, 4, 5)
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    states = [state, None, None]
    parts = [causal_conv1d(t, w, b, state=s) for t, s in zip(x.split(lengths, 1), states, strict=True)]
    torch.testing.assert_close(causal_conv1d(x, w, b, state=state, seq_idx=seq_idx), torch.cat(parts, 1))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE])
def test_pieces_and_steps_continue_a_sequence(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(s).to(dtype) for s in ((2, 11, 6), (6, 4), (6,)))
    whole = causal_conv1d(x, w, b)
    state, pieces = torch.zeros(2, 4, 6, dtype=dtype), []
    for piece in x.split([2, 5, 4], 1):
        if piece.shape[1] == 4:
            pieces += [causal_conv1d_step(t, state, w, b).unsqueeze(1) for t in piece.unbind(1)]
        else:
            pieces.append(causal_conv1d(piece, w, b, state=state))
            state = causal_conv1d_state(piece, 4, state)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, x[:, -4:])


def test_state() -> None:
    x, state = torch.arange(1.0, 7).view(1, 6, 1), torch.tensor([-4.0, -3, -2, -1]).view(1, 4, 1)
    assert causal_conv1d_state(x, 4).flatten().tolist() == [3, 4, 5, 6]
    assert causal_conv1d_state(x[:, :2], 4).flatten().tolist() == [0, 0, 1, 2]
    assert causal_conv1d_state(x[:, :2], 4, state).flatten().tolist() == [-2, -1, 1, 2]
    assert causal_conv1d_state(x[:, :0], 4).flatten().tolist() == [0, 0, 0, 0]
    assert causal_conv1d_state(x[:, :0], 4, state).flatten().tolist() == state.flatten().tolist()
    kept = causal_conv1d_state(x, 4)
    assert kept.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_strided_inputs() -> None:
    x, w = torch.randn(2, 9, 40)[..., 3:19], torch.randn(16, 4)
    torch.testing.assert_close(causal_conv1d(x, w), causal_conv1d_reference(x, w))
    x = torch.randn(2, 16, 9).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, w), causal_conv1d_reference(x, w))


def test_compile() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = causal_conv1d(x, w, b, "silu", state)
        state = causal_conv1d_state(x, 4, state)
        return y, causal_conv1d_step(x[:, -1], state, w, b), state

    args = torch.randn(2, 7, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 4, 6)
    for inductor in (False, True):
        compiled = torch.compile(f, fullgraph=True, backend="inductor" if inductor else "aot_eager")
        for a, b in zip(compiled(*args), f(*args), strict=True):
            torch.testing.assert_close(a, b)
    x, w = randn(2, 7, 6), randn(6, 4)
    grads = torch.autograd.grad(causal_conv1d(x, w).sum(), (x, w))
    compiled = torch.compile(lambda x, w: causal_conv1d(x, w).sum(), fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, w), (x, w)), grads, strict=True):
        torch.testing.assert_close(a, b)
