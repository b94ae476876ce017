"""Block-scaled 8-bit floats: what a block and a tile hold, and how exactly."""

from __future__ import annotations

import pytest
import torch

from archzoo.ops.fp8 import dequantize_blocks, quantize_blocks, quantize_tiles


def test_dequantize_is_weight_times_the_scale_of_its_block() -> None:
    w = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    out = dequantize_blocks(w, scale, block=3)
    assert out.dtype == torch.float32
    for r in range(5):
        for c in range(7):
            assert out[r, c] == w[r, c].float() * scale[r // 3, c // 3]


@pytest.mark.parametrize("shape", [(128, 256), (200, 300), (1, 129), (127, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_round_to_four_bits(shape: tuple[int, int], power_of_two: bool) -> None:
    w = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    small, scale = quantize_blocks(w, power_of_two=power_of_two)
    assert small.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    again = dequantize_blocks(small, scale)
    block = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert ((again - w).abs() <= w.abs() / 16 * 1.001 + block * 2**-10).all()  # 3 stored bits; subnormals
    if not power_of_two:
        for r, c in torch.cartesian_prod(*(torch.arange(n) for n in scale.shape)).tolist():
            part = w[r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128]
            assert scale[r, c] == part.abs().max().clamp(min=1e-4) / 448
    else:
        assert torch.equal(scale.log2(), scale.log2().round())
    twice, scales = quantize_blocks(again, power_of_two=power_of_two)
    assert torch.equal(dequantize_blocks(twice, scales), again)


@pytest.mark.parametrize("columns", [128, 256, 200, 1])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_have_a_scale_for_each_token_and_128_channels(columns: int, power_of_two: bool) -> None:
    x = torch.randn(2, 3, columns, dtype=torch.bfloat16)
    x[0, 0] = 0
    small, scale = quantize_tiles(x, power_of_two=power_of_two)
    assert small.dtype == torch.float8_e4m3fn
    assert small.shape == x.shape
    assert scale.shape == (2, 3, -(-columns // 128))
    assert scale.dtype == torch.float32
    for i in range(scale.shape[-1]):
        tile = x[..., i * 128 : (i + 1) * 128].float()
        exact = tile.abs().amax(-1).clamp(min=1e-4) / 448
        ratio = scale[..., i] / exact
        assert ((ratio >= 1) & (ratio < 2)).all() if power_of_two else torch.equal(scale[..., i], exact)
        again = small[..., i * 128 : (i + 1) * 128].float() * scale[..., i, None]
        assert ((again - tile).abs() <= tile.abs() / 16 * 1.001 + scale[..., i, None] * 2**-10).all()
    assert not small[0, 0].float().any()
