"""Mamba-2: the scan in its three forms, segment sums, initialisation, groups, decode state."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.blocks.context import Context
from archzoo.blocks.mixers.mamba2 import Mamba2, Mamba2Config, Mamba2State
from archzoo.blocks.registry import Site
from archzoo.cache import Timeline
from archzoo.ops.backend import backend
from archzoo.ops.conv import causal_conv1d_step
from archzoo.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from archzoo.ops.ssd import segsum, ssd, ssd_step

T, H, P, N = 37, 6, 5, 4
GROUPS = [(1, 1), (2, 2), (6, 6), (2, 6), (3, 1), (2, 3)]  # heads of B and of C


def problem(gb: int, gc: int, dtype: torch.dtype = torch.float64, t: int = T) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(t)
    x, a, b, c = (
        torch.randn(shape, generator=gen, dtype=torch.float64)
        for shape in ((2, t, H, P), (2, t, H), (2, t, gb, N), (2, t, gc, N))
    )
    return tuple(v.to(dtype) for v in (x, -a.abs(), b, c))


def quadratic(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """y = ((C B') * exp(segsum a)) x with one T x T matrix per head, and the final state."""
    b, c = (v.repeat_interleave(H // v.shape[2], 2) for v in (b, c))
    decay = segsum(a.transpose(1, 2)).exp()  # [B, H, T, T]
    matrix = torch.einsum("bthn,bshn->bhts", c, b) * decay
    return torch.einsum("bhts,bshp->bthp", matrix, x), torch.einsum(
        "bhs,bshp,bshn->bhpn", decay[:, :, -1], x, b
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("gb", "gc"), GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_recurrent_chunked_and_quadratic_forms_agree(
    gb: int, gc: int, dtype: torch.dtype, tolerance: float
) -> None:
    args = problem(gb, gc, dtype)
    expected = quadratic(*problem(gb, gc))
    with backend("reference"):
        outcomes = [ssd(*args)]
    outcomes += [ssd(*args, chunk_size=q) for q in (1, 4, 16, 64, T)]
    for y, state in outcomes:
        assert y.dtype == state.dtype == dtype
        assert_close(y.double(), expected[0], tolerance)
        assert_close(state.double(), expected[1], tolerance)


@pytest.mark.parametrize(("gb", "gc"), GROUPS)
def test_scan_goes_on_from_a_state(gb: int, gc: int) -> None:
    args = problem(gb, gc)
    full, end = ssd(*args)
    for cut, chunk in product((1, 16, 20), (4, 16)):
        first, state = ssd(*(v[:, :cut] for v in args), chunk_size=chunk)
        rest, last = ssd(*(v[:, cut:] for v in args), chunk_size=chunk, state=state)
        assert_close(torch.cat((first, rest), 1), full, 1e-12)
        assert_close(last, end, 1e-12)
    state = torch.zeros(end.shape, dtype=end.dtype)
    steps = [ssd_step(*(v[:, t] for v in args), state) for t in range(T)]
    assert_close(torch.stack(steps, 1), full, 1e-12)
    assert_close(state, end, 1e-12)  # written in place


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_scan_resets_between_packed_sequences(chunk: int, name: str) -> None:
    lengths = [4, 1, 7, 8, 17]  # ends inside and at the end of a chunk
    args = problem(2, 2)
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).expand(2, -1)
    with backend(name):
        packed, state = ssd(*args, chunk_size=chunk, seq_idx=seq_idx)
        pieces = zip(*(v.split(lengths, 1) for v in args), strict=True)
        alone = [ssd(*piece, chunk_size=chunk) for piece in pieces]
    assert_close(packed, torch.cat([y for y, _ in alone], 1), 1e-12)
    assert_close(state, alone[-1][1], 1e-12)


def test_scan_of_bf16_inputs_is_wide_inside() -> None:
    args = problem(2, 2, torch.bfloat16)
    y, state = ssd(*args)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, end = ssd(*(v.double() for v in args))
    assert_close(state.double(), end, 1e-5)
    assert_close(y.double(), exact, 2**-7)


def test_steps_refuse_wrong_shapes() -> None:
    """Also by kernels that read and write memory by address."""
    right = {"x": (2, 4, 3), "a": (2, 4), "B": (2, 2, 5), "C": (2, 4, 5), "state": (2, 4, 3, 5)}
    ssd_step(*(torch.zeros(shape) for shape in right.values()))
    wrong = {
        "x": [(1, 4, 3), (2, 4, 2), (2, 3, 3)],
        "a": [(1, 4), (2, 3)],
        "B": [(1, 2, 5), (2, 2, 4), (2, 3, 5)],
        "C": [(1, 4, 5), (2, 4, 4), (2, 3, 5)],
        "state": [(1, 4, 3, 5), (2, 4, 3, 6), (2, 8, 3, 5)],
    }
    for name, shape in ((n, s) for n, shapes in wrong.items() for s in shapes):
        with pytest.raises(RuntimeError), torch.inference_mode():
            ssd_step(*(torch.zeros(s) for s in (right | {name: shape}).values()))


def test_convolution_step_refuses_wrong_shapes() -> None:
    right = {"x": (2, 6), "state": (2, 4, 6), "weight": (6, 4), "bias": (6,)}
    causal_conv1d_step(*(torch.zeros(shape) for shape in right.values()))
    wrong = {
        "x": [(1, 6), (2, 5)],
        "state": [(1, 4, 6), (3, 4, 6), (2, 3, 6), (2, 4, 7)],
        "weight": [(5, 4), (6, 3)],
        "bias": [(5,)],
    }
    for name, shape in ((n, s) for n, shapes in wrong.items() for s in shapes):
        with pytest.raises(RuntimeError), torch.inference_mode():
            causal_conv1d_step(*(torch.zeros(s) for s in (right | {name: shape}).values()))


def test_norms_refuse_weights_of_another_size() -> None:
    x, weight = torch.ones(2, 6), torch.ones(5)
    for call in (
        lambda: rms_norm(x, weight),
        lambda: add_rms_norm(x, x, weight),
        lambda: gated_rms_norm(x, x, weight),
    ):
        with pytest.raises(RuntimeError), torch.inference_mode():
            call()


def test_segsum() -> None:
    a = -torch.rand(3, 9, dtype=torch.float64)
    s = segsum(a)
    for i, j in product(range(9), range(9)):
        if j > i:
            assert (s[:, i, j] == float("-inf")).all()
        else:
            assert_close(s[:, i, j], a[:, j + 1 : i + 1].sum(-1), 1e-14)


def test_gradients_are_finite_and_right_under_strong_decay() -> None:
    x, a, b, c = (v.requires_grad_() for v in problem(1, 1))
    with torch.no_grad():
        a[:, ::3] = -1e4
    grads = []
    for name in ("auto", "reference"):
        with backend(name):
            y, state = ssd(x, a, b, c, chunk_size=8)
        grads.append(torch.autograd.grad((y * y.detach().cos()).sum() + state.sum(), (x, a, b, c)))
    for fast, slow in zip(*grads, strict=True):
        assert fast.isfinite().all()
        assert_close(fast, slow, 1e-9)
    assert segsum(a).exp().sum().isfinite()
    (grad,) = torch.autograd.grad(segsum(a).exp().sum(), a)
    assert grad.isfinite().all()


# --- the block ------------------------------------------------------------------------------------


PLAIN = Mamba2Config(heads=4, head_dim=16, state_size=8)
GROUPED = Mamba2Config(heads=4, head_dim=16, state_size=8, groups=4, kv_heads=2)


def build(config: Mamba2Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Mamba2:
    mixer = config.build(Site(index=0, count=3, hidden_size=64, norm_eps=1e-5)).to(dtype)
    mixer.reset_parameters(torch.Generator().manual_seed(seed))
    return mixer.requires_grad_(False)


def run(mixer: Mamba2, x: Tensor) -> Tensor:
    return mixer(x, Context(x.shape[:2], x.device))


def test_initialisation_ranges() -> None:
    config = Mamba2Config(heads=512, head_dim=2, state_size=8)
    mixer = config.build(Site(index=3, count=16, hidden_size=64, norm_eps=1e-5)).double()
    mixer.reset_parameters(torch.Generator().manual_seed(0))
    dt, a = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert dt.min() >= 1e-4
    assert 0.097 < dt.max() <= 0.1 + 1e-9
    assert 0.9e-3 < dt.min() < 1.3e-3  # log-uniform from 1e-3: half of the heads below 1e-2
    assert 0.4 < (dt < 1e-2).double().mean() < 0.6
    assert a.min() >= 1
    assert a.max() <= 16
    assert 0.4 < (a < 8.5).double().mean() < 0.6
    assert (mixer.D == 1).all()
    bound = config.inner**-0.5 / 16**0.5  # divided by the root of the number of layers
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("config", [PLAIN, GROUPED, GROUPED.model_copy(update={"repeat_before_conv": True})])
@pytest.mark.parametrize(
    "changes", [{}, {"norm_before_gate": True}, {"dt_limit": (0.01, 0.05)}, {"conv_kernel": 2}]
)
def test_decode_equals_scan_for_every_option(config: Mamba2Config, changes: dict[str, object]) -> None:
    config = config.model_copy(update=changes)
    mixer, x = build(config), torch.randn(2, 11, 64, dtype=torch.float64)
    full = run(mixer, x)
    assert full.isfinite().all()
    if "dt_limit" in changes or "norm_before_gate" in changes:  # the option matters
        plain = build(config.model_copy(update={k: getattr(PLAIN, k) for k in changes}))
        assert not torch.allclose(full, run(plain, x), atol=1e-6)
    for first in (1, 2, 5):
        timeline = Timeline(2, x.device)
        state = mixer.new_state(2, 0, x.device, x.dtype)
        assert not state.conv.any()
        assert not state.ssm.any()
        parts = []
        for part in x.split([first] + [1] * (11 - first), 1):
            parts.append(mixer(part, Context(part.shape[:2], x.device, timeline=timeline), state))
        assert_close(torch.cat(parts, 1), full, 1e-12)
    assert sum(p.numel() for p in mixer.parameters()) == config.params(64)
    assert state.nbytes == 2 * config.state_bytes(64, itemsize=8)


def test_heads_that_share_a_kv_head_are_neighbours() -> None:
    """repeat_interleave: heads 0 and 1 read KV head 0 (x and B), heads 2 and 3 read KV head 1."""
    config = GROUPED
    mixer, x = build(config), torch.randn(1, 9, 64, dtype=torch.float64)
    mixer.out_proj.weight.copy_(torch.eye(64))
    before = run(mixer, x).unflatten(-1, (4, 16))
    z, xs, b, *_ = config.splits
    for kv, part, width in product((0, 1), ("x", "B"), (16,)):
        changed = build(config)
        changed.out_proj.weight.copy_(torch.eye(64))
        start, step = (z, width) if part == "x" else (z + xs, config.state_size)
        rows = slice(start + kv * step, start + (kv + 1) * step)
        changed.in_proj.weight[rows] *= 1.5
        moved = (run(changed, x).unflatten(-1, (4, 16)) - before).abs().amax((0, 1, 3)) > 1e-9
        assert moved.tolist() == [kv == 0, kv == 0, kv == 1, kv == 1], part
    assert b == xs // 2


def test_repeating_before_the_convolution_allows_own_filters() -> None:
    """With equal filters for the copies of a KV head both orders are the same map."""
    after = build(GROUPED)
    before = build(GROUPED.model_copy(update={"repeat_before_conv": True}))
    before.load_state_dict(
        {k: v for k, v in after.state_dict().items() if not k.startswith("conv1d")}, strict=False
    )
    for old, new in zip(after.conv1d.parameters(), before.conv1d.parameters(), strict=True):
        x, b, c = old.split(GROUPED.conv_splits)
        x = x.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
        b = b.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
        new.copy_(torch.cat((x, b, c)))
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    assert_close(run(before, x), run(after, x), 1e-12)


def test_group_of_b_and_c_is_head_divided_by_group_size() -> None:
    config = PLAIN.model_copy(update={"groups": 2})
    mixer, x = build(config), torch.randn(1, 9, 64, dtype=torch.float64)
    mixer.out_proj.weight.copy_(torch.eye(64))
    before = run(mixer, x).unflatten(-1, (4, 16))
    z, xs, b, c, _ = config.splits
    for start, size in ((z + xs, b), (z + xs + b, c)):
        changed = build(config)
        changed.out_proj.weight.copy_(torch.eye(64))
        changed.in_proj.weight[start : start + size // 2] *= 1.5  # group 0
        moved = (run(changed, x).unflatten(-1, (4, 16)) - before).abs().amax((0, 1, 3)) > 1e-9
        assert moved.tolist() == [True, True, False, False]


def test_gated_norm_groups_and_order() -> None:
    y, z, w = (torch.randn(3, 64, dtype=torch.float64) for _ in range(3))
    w = w[0]
    assert not torch.allclose(gated_rms_norm(y, z, w), gated_rms_norm(y, z, w, norm_before_gate=True))
    assert torch.equal(gated_rms_norm(y, z, w, group_size=64), gated_rms_norm(y, z, w))
    louder = y.clone()
    louder[:, :16] *= 3
    quiet, loud = (gated_rms_norm(v, z, w, group_size=16) for v in (y, louder))
    assert torch.equal(quiet[:, 16:], loud[:, 16:])
    assert not torch.allclose(gated_rms_norm(louder, z, w)[:, 16:], gated_rms_norm(y, z, w)[:, 16:])
    h = y * F.silu(z)
    assert_close(gated_rms_norm(y, z, w), h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w, 1e-12)


def test_state_after_prefill_holds_no_more_memory_than_it_reports() -> None:
    """Not a view into the activations of a long prompt."""
    mixer, x = build(PLAIN), torch.randn(1, 300, 64, dtype=torch.float64)
    for config_state in (None, 300):
        state: Mamba2State = mixer.new_state(1, config_state or 0, x.device, x.dtype)
        mixer(x, Context((1, 300), x.device, timeline=Timeline(1, x.device)), state)
        held = state.conv.untyped_storage().nbytes() + state.ssm.untyped_storage().nbytes()
        assert held == state.nbytes == PLAIN.state_bytes(64, itemsize=8)


def test_state_in_bf16_keeps_the_scan_in_fp32() -> None:
    state = build(PLAIN, dtype=torch.bfloat16).new_state(3, 0, torch.device("cpu"), torch.bfloat16)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert state.nbytes == 3 * PLAIN.state_bytes(64, itemsize=2)


def test_padding_in_later_chunks_is_skipped() -> None:
    """Rows that go on with different numbers of tokens: padding on the left of any chunk."""
    mixer = build(GROUPED)
    x = torch.randn(2, 12, 64, dtype=torch.float64)
    lengths = [(5, 4, 1, 2), (2, 1, 0, 3)]  # of each row in each chunk
    expected = [run(mixer, x[i : i + 1, : sum(n)])[0] for i, n in enumerate(lengths)]
    timeline, done = Timeline(2, x.device), [0, 0]
    state = mixer.new_state(2, 0, x.device, x.dtype)
    for chunk in zip(*lengths, strict=True):
        width = max(chunk)
        part = torch.full((2, width, 64), math.pi, dtype=torch.float64)
        positions = torch.full((2, width), -1)
        for i, n in enumerate(chunk):
            part[i, width - n :] = x[i, done[i] : done[i] + n]
            positions[i, width - n :] = torch.arange(done[i], done[i] + n)
        out = mixer(part, Context((2, width), x.device, positions, timeline=timeline), state)
        for i, n in enumerate(chunk):
            assert_close(out[i, width - n :], expected[i][done[i] : done[i] + n], 1e-12)
            done[i] += n
