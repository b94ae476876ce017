"""Rotary embeddings: frequencies against transformers', scaling factors, and the rotation itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from archzoo.blocks.rope import RopeConfig
from archzoo.ops.backend import backend
from archzoo.ops.rope import apply_rope

HF_NAMES = {"original_max_positions": "original_max_position_embeddings"}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3-1b": {"kind": "llama3", "theta": 500000.0, "factor": 32.0, "original_max_positions": 8192},
    "llama3-8b": {"kind": "llama3", "theta": 500000.0, "factor": 8.0, "original_max_positions": 8192},
    "llama3-odd": {
        "kind": "llama3",
        "factor": 5.0,
        "original_max_positions": 512,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
    },
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_positions": 2048},
    "yarn-zebra": {"kind": "yarn", "theta": 500000.0, "factor": 32.0, "original_max_positions": 8192},
    "yarn-deepseek": {
        "kind": "yarn",
        "factor": 40.0,
        "original_max_positions": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "yarn-unequal": {
        "kind": "yarn",
        "factor": 40.0,
        "original_max_positions": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn-given": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_positions": 2048,
        "attention_factor": 1.7,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-short": {"kind": "yarn", "factor": 2.0, "original_max_positions": 6},
}


@pytest.mark.parametrize("dim", [64, 32, 128, 8])
@pytest.mark.parametrize("name", SCALED)
def test_frequencies_equal_transformers(name: str, dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    data = SCALED[name]
    rope = RopeConfig(**data)
    scaling = {HF_NAMES.get(k, k): v for k, v in data.items() if k not in ("kind", "theta")}
    scaling |= {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "llama3":
        scaling |= {k: getattr(rope, k) for k in ("low_freq_factor", "high_freq_factor")}
    hf = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=int((rope.original_max_positions or 64) * rope.factor),
        rope_parameters=scaling,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](hf, "cpu")
    ours = torch.tensor(rope.inv_freq(dim), dtype=torch.float64)
    torch.testing.assert_close(ours, frequencies.double(), rtol=1e-6, atol=0)
    assert rope.table_factor == pytest.approx(factor, rel=1e-12)
    plain = torch.tensor(RopeConfig(theta=rope.theta).inv_freq(dim), dtype=torch.float64)
    assert ((ours / plain) < 0.9).any()


@pytest.mark.parametrize("name", SCALED)
def test_scaling_by_one_is_plain_rope(name: str) -> None:
    rope = RopeConfig(**(SCALED[name] | {"factor": 1.0, "attention_factor": None}))
    assert rope.inv_freq(64) == pytest.approx(RopeConfig(theta=rope.theta).inv_freq(64), rel=1e-15)
    assert rope.table_factor == rope.softmax_factor == 1.0


def test_ntk_stretches_the_base() -> None:
    rope = RopeConfig(kind="ntk", theta=10000.0, factor=4.0)
    assert rope.inv_freq(64) == pytest.approx(RopeConfig(theta=10000.0 * 4 ** (64 / 62)).inv_freq(64))
    # the fastest pair stays, the slowest turns `factor` times slower
    assert rope.inv_freq(64)[0] == 1
    assert rope.inv_freq(64)[-1] == pytest.approx(RopeConfig().inv_freq(64)[-1] / 4)


def test_published_factors() -> None:
    """Zebra-Llama scales cos and sin, DeepSeek the softmax."""
    zebra = {"kind": "yarn", "theta": 500000.0, "original_max_positions": 8192}
    assert RopeConfig(factor=32.0, **zebra).table_factor == pytest.approx(1.34657, abs=1e-5)
    assert RopeConfig(factor=8.0, **zebra).table_factor == pytest.approx(1.20794, abs=1e-5)
    assert RopeConfig(factor=32.0, **zebra).softmax_factor == 1
    for mscale, scale in ((1.0, 0.1352338), (0.707, 0.1147214)):
        rope = RopeConfig(
            kind="yarn", factor=40.0, original_max_positions=4096, mscale=mscale, mscale_all_dim=mscale
        )
        assert rope.table_factor == 1
        assert rope.softmax_factor * 192**-0.5 == pytest.approx(scale, abs=1e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_each_pair_by_its_angle(interleaved: bool) -> None:
    rope, dim = RopeConfig(theta=100.0), 8
    x = torch.randn(2, 5, 3, dim, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 1000, 3, 0]])
    cos, sin = rope.table(positions, dim, x.dtype)
    out = apply_rope(x, cos, sin, interleaved)
    for p, f in enumerate(rope.inv_freq(dim)):
        a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + dim // 2)
        turned = torch.polar(torch.ones(2, 5, dtype=torch.float64), positions.double() * f)[..., None]
        expected = torch.complex(x[..., a], x[..., b]) * turned
        torch.testing.assert_close(torch.complex(out[..., p], out[..., p + dim // 2]), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_native_rotation_is_the_definition(interleaved: bool, rows: int | None) -> None:
    """Whole and partial heads, of a view as projections give them, one table or one a row."""
    for heads, dim, rotated in ((1, 8, 8), (3, 10, 6), (2, 128, 128), (5, 96, 32)):
        for tokens in (1, 7, 300):
            both = torch.randn(3, tokens, heads, 2 * dim)
            x = both[..., :dim]
            positions = torch.randint(5000, (tokens,) if rows is None else (rows, tokens))
            cos, sin = RopeConfig().table(positions, rotated, torch.float32)
            out = apply_rope(x, cos, sin, interleaved)
            with backend("reference"):
                expected = apply_rope(x, cos, sin, interleaved)
            assert torch.equal(out, expected)


def test_interleaved_weights_are_permuted_half_split_weights() -> None:
    """Scores agree; what is cached differs by a permutation."""
    rope, dim = RopeConfig(), 16
    q, k = torch.randn(2, 1, 6, 2, dim, dtype=torch.float64)
    order = torch.arange(dim).view(-1, 2).T.flatten()  # 0 2 4 ... 1 3 5 ...
    cos, sin = rope.table(torch.arange(6), dim, q.dtype)

    def scores(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
        a, b = apply_rope(a, cos, sin, interleaved), apply_rope(b, cos, sin, interleaved)
        return torch.einsum("bthd,bshd->bhts", a, b)

    expected = scores(q, k, interleaved=True)
    torch.testing.assert_close(scores(q[..., order], k[..., order], False), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores(q, k, interleaved=False), expected)


def test_table_precision() -> None:
    """Angles are at least fp32 before they are rounded: bf16 could not tell position 257 from 256."""
    rope = RopeConfig(theta=500000.0)
    positions = torch.tensor([255, 256, 257, 8191])
    exact = rope.table(positions, 64, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2**-8 + 1e-3)):
        for got, expected in zip(rope.table(positions, 64, dtype), exact, strict=True):
            assert got.dtype == dtype
            assert (got.double() - expected).abs().max() < tolerance
    angle = 257 * rope.inv_freq(64)[3]
    assert exact[0][2, 3].item() == pytest.approx(math.cos(angle), abs=1e-15)


def test_padding_positions_do_not_matter() -> None:
    cos, sin = RopeConfig().table(torch.tensor([[-1, -1, 0]]), 8, torch.float32)
    assert torch.equal(cos[0, 0], cos[0, 2])
    assert sin.isfinite().all()
