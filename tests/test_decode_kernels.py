"""Rust's kernels for few tokens against the definitions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archzoo.ops import attention as attention_op
from archzoo.ops import conv, norm, ssd
from archzoo.ops import experts as experts_op
from archzoo.ops import linear as linear_op
from archzoo.ops.backend import backend, native, row_stride


def both(call: Callable[..., object], *args: object, **kwargs: object) -> tuple[object, object]:
    """(the fast path in fp32, the definition in fp64)."""
    fast = call(*args, **kwargs)
    with backend("reference"):
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return fast, call(*wide, **kwargs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 5), (2, 4, 123), (1, 2048)])
@pytest.mark.parametrize("weighted", [True, False])
def test_norms(shape: tuple[int, ...], weighted: bool) -> None:
    x, r = torch.randn(shape), torch.randn(shape)
    w = torch.randn(shape[-1]) if weighted else None
    assert native(x, r, w)
    fast, exact = both(norm.rms_norm, x, w, 1e-5, 0.7)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)
    fast, exact = both(norm.add_rms_norm, x, r, w, 1e-5, 1.0)
    for a, b in zip(fast, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("d", "group"), [(64, 16), (60, 60), (66, 11)])
def test_gated_norm(d: int, group: int, before: bool) -> None:
    y, z, w = torch.randn(2, 3, d), torch.randn(2, 3, d) * 4, torch.randn(d)
    fast, exact = both(norm.gated_rms_norm, y, z, w, 1e-5, group, before)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_strided_inputs_of_many_tokens(batch: int, threads: int) -> None:
    """Parts of one projection, as Mamba-2 makes them; long enough for the work to be shared."""
    both_parts = torch.randn(batch, 70, 1000) * 3
    z, x = both_parts.split((490, 510), -1)
    y, w, taps = torch.randn(batch, 70, 490), torch.randn(490), torch.randn(510, 1, 4)
    assert row_stride(z) == row_stride(x) == 1000
    state = torch.randn(batch, 4, 510)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pairs = [both(norm.gated_rms_norm, y, z, w, 1e-5, 245)]
        for past in (None, state):
            pairs.append(both(conv.causal_conv1d, x, taps, torch.randn(510), "silu", past))
            pairs.append(both(conv.causal_conv1d, x[:, :2], taps, None, None, past))
    finally:
        torch.set_num_threads(before)
    for fast, exact in pairs:
        torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)


def test_row_stride() -> None:
    t = torch.zeros(3, 4, 10)
    assert row_stride(t) == 10
    assert row_stride(t[..., :7]) == 10
    assert row_stride(t[1:2, ::2, :7]) == 20
    assert row_stride(t[:, :3, :7]) == 0  # a gap after every third row
    assert row_stride(t[..., ::2]) == 0
    assert row_stride(t[:, :1].expand(-1, 4, -1)) == 0


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_scans_of_many_tokens(groups: int) -> None:
    x, a = torch.randn(2, 150, 6, 8), -torch.rand(2, 150, 6) * 2
    b, c = torch.randn(2, 150, groups, 16), torch.randn(2, 150, 1, 16)
    for fast, exact in zip(*both(ssd.ssd, x, a, b, c), strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [True, False])
def test_conv_steps(k: int, activation: str | None, biased: bool) -> None:
    state, w = torch.randn(2, k, 37), torch.randn(37, 1, k)
    b = torch.randn(37) if biased else None
    exact_state = state.double()
    for _ in range(3):
        x = torch.randn(2, 37) * 5
        fast = conv.causal_conv1d_step(x, state, w, b, activation)
        with backend("reference"):
            wide = None if b is None else b.double()
            exact = conv.causal_conv1d_step(x.double(), exact_state, w.double(), wide, activation)
        torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.double(), exact_state)


@pytest.mark.parametrize(("heads", "gb", "gc"), [(6, 1, 1), (6, 2, 3), (6, 6, 6), (32, 1, 32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_ssd_steps(heads: int, gb: int, gc: int, threads: int) -> None:
    state = torch.randn(2, heads, 16, 24)
    exact_state = state.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            x, a = torch.randn(2, heads, 16), -torch.rand(2, heads) * 3
            b, c = torch.randn(2, gb, 24), torch.randn(2, gc, 24)
            fast = ssd.ssd_step(x, a, b, c, state)
            exact, exact_state = ssd._reference(
                *(t.double()[:, None] for t in (x, a, b, c)), exact_state, None
            )
            torch.testing.assert_close(fast.double(), exact[:, 0], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize(
    ("b", "h", "g", "d", "e"), [(1, 9, 3, 64, 64), (2, 4, 4, 20, 12), (1, 9, 1, 128, 96), (3, 4, 1, 16, 33)]
)
def test_attention_over_a_cache(
    b: int, h: int, g: int, d: int, e: int, slots: int, dtype: torch.dtype
) -> None:
    q = (torch.randn(b, h, 1, d) * 3).to(dtype)
    room = torch.randn(b, g, slots + 7, d).to(dtype)
    k = room[:, :, :slots]  # a cache with room: rows of a head are not next to those of the other
    v = torch.randn(b, slots, g, e).to(dtype).transpose(1, 2)
    fast = attention_op.attention(q, k, v, 0.3)
    assert fast.dtype == dtype
    exact = attention_op._reference(q.double(), k.double(), v.double(), 0.3, None, False)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fast.double(), exact, rtol=tolerance, atol=tolerance)


def test_attention_with_huge_and_equal_scores() -> None:
    q, v = torch.full((1, 2, 1, 8), 30.0), torch.randn(1, 1, 600, 8)
    same = torch.full((1, 1, 600, 8), 30.0)
    torch.testing.assert_close(
        attention_op.attention(q, same, v, 1.0), v.mean(2, keepdim=True).expand(1, 2, 1, 8)
    )
    peak = -same
    peak[0, 0, 599] = 30.0
    torch.testing.assert_close(attention_op.attention(q, peak, v, 1.0), v[:, :, 599:].expand(1, 2, 1, 8))


def test_latent_values_are_a_view_of_the_keys() -> None:
    latent = torch.randn(2, 300, 24)
    q = torch.randn(2, 5, 1, 24)
    single = latent.unsqueeze(1)
    fast = attention_op.attention(q, single, single[..., :16], 0.2)
    exact = attention_op._reference(q, single, single[..., :16], 0.2, None, False)
    torch.testing.assert_close(fast, exact)


def test_native_says_no() -> None:
    x = torch.randn(4, 4)
    assert native(x, None)
    assert not native(x.double())
    assert not native(x.t())
    assert not native(x.requires_grad_())
    with torch.no_grad():
        assert native(x)
    with backend("reference"):
        assert not native(x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "d", "hidden"), [(1, 64, 96), (3, 100, 130), (16, 33, 70)])
def test_swiglu(rows: int, d: int, hidden: int, dtype: torch.dtype) -> None:
    x, down = torch.randn(rows, d).to(dtype), torch.randn(d, hidden).to(dtype)
    gate, up = torch.randn(2, hidden, d).to(dtype)
    assert linear_op.few(x, gate)
    fast = linear_op.swiglu(x, gate, up, down).double()
    g, u = x.double() @ gate.double().t(), x.double() @ up.double().t()
    exact = (torch.nn.functional.silu(g) * u) @ down.double().t()
    assert (fast - exact).abs().max() < exact.abs().max() * (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("slots", [1, 100, 1000])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_latent_attention(heads: int, groups: int, slots: int) -> None:
    batch, rank, nope, rope, v_dim = 2, 40, 24, 8, 17
    room = torch.randn(batch, slots + 5, rank + rope)
    keys, weight = room[:, :slots], torch.randn(groups, nope + v_dim, rank)
    q = torch.randn(batch, heads, nope + rope)
    fast = attention_op.latent_attention(q, keys, weight, v_dim, 0.2)
    assert fast is not None
    up = weight.double().repeat_interleave(heads // groups, 0)
    latent, rotated = keys.double().split((rank, rope), -1)
    scores = torch.einsum("bhn,hnr,bsr->bhs", q[..., :nope].double(), up[:, :nope], latent)
    scores = (scores + torch.einsum("bhp,bsp->bhs", q[..., nope:].double(), rotated)) * 0.2
    exact = torch.einsum("bhs,bsr,hvr->bhv", scores.softmax(-1), latent, up[:, nope:])
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4)
    assert attention_op.latent_attention(q.bfloat16(), keys, weight, v_dim, 0.2) is None
    assert attention_op.latent_attention(q[..., 1:], keys, weight, v_dim, 0.2) is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_their_gradients(
    dtype: torch.dtype, many: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_op, "MANY_ROWS", 0 if many else 10**9)
    tokens, count, k, d, hidden = 90, 6, 2, 72, 40
    ids = torch.stack([torch.randperm(count - 1)[:k] for _ in range(tokens)])  # the last expert idles
    ids[3, 1] = count  # dropped
    leaves = [
        torch.randn(tokens, d).to(dtype),
        torch.rand(tokens, k),
        (torch.randn(count, 2 * hidden, d) * d**-0.5).to(dtype),
        (torch.randn(count, d, hidden) * hidden**-0.5).to(dtype),
    ]
    upstream = torch.randn(tokens, d).to(dtype)

    def run(parts: list[Tensor]) -> list[Tensor]:
        x, weights, up, down = parts = [t.clone().requires_grad_() for t in parts]
        out = experts_op.experts(x, weights, ids, experts_op.Ffns(up, down))
        out.backward(upstream.to(out.dtype))
        return [out.detach(), *(t.grad for t in parts if t.grad is not None)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = run(leaves)
        with torch.no_grad():
            again = experts_op.experts(leaves[0], leaves[1], ids, experts_op.Ffns(*leaves[2:]))
    finally:
        torch.set_num_threads(before)
    with backend("reference"):
        exact = run([t.double() for t in leaves])
    assert len(fast) == len(exact) == 5
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for a, b in zip([*fast, again], [*exact, exact[0]], strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()
    assert not fast[3][-1].any()
    assert not fast[4][-1].any()
