"""Upcycling: dense feed-forwards into copies (LLaVA-MoD) and segments (DeepSeekMoE) of themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import archzoo
from archzoo import CausalLM, ConfigError, InputError
from archzoo.cli import app

Tokens = Callable[..., Tensor]
F64 = torch.float64


@cache
def source(layers: int = 4, *changes: str, dtype: torch.dtype = F64) -> CausalLM:
    config = archzoo.config("llama-3.2-1b").tiny()
    config = config.override(f"layers.count={layers}", "layers.override=[]", "init_std=0.15", *changes)
    return archzoo.build(config, dtype=dtype, seed=3).eval()


def logits(model: CausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("experts", "top_k", "layers"), [(4, None, None), (4, 4, (1, 3)), (1, None, (0,)), (3, 1, (0, 1, 2, 3))]
)
def test_copies_compute_what_the_dense_model_does(
    experts: int, top_k: int | None, layers: tuple[int, ...] | None, tokens: Tokens
) -> None:
    model, ids = source(), tokens(2, 11)
    new = archzoo.convert(model, "moe", experts=experts, top_k=top_k, layers=layers)
    routed = [i for i, spec in enumerate(new.config.specs) if spec.ffn.kind == "moe"]
    assert routed == list(layers or (0, 2))
    ffn = new.config.specs[routed[0]].ffn
    assert (ffn.experts, ffn.top_k, ffn.hidden) == (experts, top_k or min(2, experts), 96)
    torch.testing.assert_close(logits(new, ids), logits(model, ids))
    assert new.layers[routed[0]].ffn.router.weight.std() > 0.1
    assert archzoo.cost(new.config).params == sum(p.numel() for p in new.parameters())
    assert not new.training
    cache = new.new_cache(2, 11)
    with torch.no_grad():
        parts = [new(part, cache=cache).logits for part in ids.split([6, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids))


@pytest.mark.parametrize(
    ("experts", "segments", "shared"), [(1, 4, 0), (1, 6, 2), (3, 4, 1), (2, 8, 7), (2, 1, 0)]
)
def test_all_segments_with_equal_weights_are_the_dense_model(
    experts: int, segments: int, shared: int, tokens: Tokens
) -> None:
    model, ids = source(), tokens(2, 11)
    routed = experts * (segments - shared)
    new = archzoo.convert(model, "moe", experts=experts, segments=segments, shared=shared, top_k=routed)
    for i in (0, 2):
        ffn = new.layers[i].ffn
        assert ffn.experts.gate_up.shape == (routed, 2 * 96 // segments, 64)
        assert ffn.config.shared == shared
        with torch.no_grad():
            ffn.router.weight.zero_()
    torch.testing.assert_close(logits(new, ids), logits(model, ids))


def test_the_segments_are_those_of_the_dense_model() -> None:
    model = source()
    new = archzoo.convert(model, "moe", experts=2, segments=3, shared=1)
    dense, ffn = model.layers[0].ffn, new.layers[0].ffn
    assert (ffn.config.experts, ffn.config.top_k, ffn.config.hidden, ffn.config.scale) == (4, 4, 32, 2)
    assert torch.equal(ffn.shared.down_proj.weight, dense.down_proj.weight[:, :32])
    for e, rows in enumerate((slice(32, 64), slice(64, 96)) * 2):
        gate, up = ffn.experts.gate_up[e].chunk(2)
        assert torch.equal(gate, dense.gate_proj.weight[rows])
        assert torch.equal(up, dense.up_proj.weight[rows])
        assert torch.equal(ffn.experts.down[e], dense.down_proj.weight[:, rows])


def test_the_source_stays_and_shares_nothing(tokens: Tokens) -> None:
    model = source(dtype=torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = archzoo.convert(model, "moe", seed=1)
    same = archzoo.convert(model, "moe", seed=1, layers=(2,))
    assert torch.equal(new.layers[2].ffn.router.weight, same.layers[2].ffn.router.weight)
    assert not torch.equal(new.layers[2].ffn.router.weight, new.layers[0].ffn.router.weight)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}
    ids = tokens(2, 12)
    out = new.train()(ids, labels=ids)
    out.loss.backward()
    assert out.aux["switch_loss"] > 0
    with torch.no_grad():
        for param in new.parameters():
            param.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if ".ffn." not in name:
            assert name in new.state_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"segments": 7}, ConfigError, r"segments \(7\) must divide the width 96"),
        ({"segments": 4, "shared": 4}, ConfigError, r"shared \(4\) must leave some of the 4 segments routed"),
        ({"shared": 1}, ConfigError, r"shared \(1\) must leave some of the 1 segments routed"),
        ({"top_k": 5}, ConfigError, r"top_k \(5\) exceeds experts \(4\)"),
        ({"experts": 0}, ConfigError, "convert: experts: .* found 0"),
        ({"layers": [0, 4]}, ConfigError, "layers must be distinct indices from 0 to 3"),
        ({"kv_rank": 8}, ConfigError, "convert: kv_rank: Extra inputs are not permitted, found 8"),
    ],
)
def test_wrong_settings(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        archzoo.convert(source(), "moe", **options)


def test_wrong_sources() -> None:
    with pytest.raises(InputError, match="starts from SwiGLU without bias, found 'moe'"):
        archzoo.convert(archzoo.build(archzoo.config("deepseek-moe-16b").tiny()), "moe", layers=[1])
    with pytest.raises(InputError, match="found no feed-forward"):
        archzoo.convert(archzoo.build(archzoo.config("mamba2-130m").tiny()), "moe")
    with pytest.raises(ConfigError, match="experts: Extra inputs"):
        archzoo.convert(source(), "mla", experts=2)


def test_command_line(tmp_path: Path, tokens: Tokens) -> None:
    model, ids = source(2, dtype=torch.float32), tokens(1, 8)
    archzoo.save(model, tmp_path / "dense")
    arguments = ["convert", str(tmp_path / "dense"), "moe", str(tmp_path / "moe")]
    result = CliRunner().invoke(app, [*arguments, "--experts", "3", "--layers", "1", "--top-k", "2"])
    assert result.exit_code == 0, result.output
    new = archzoo.load(tmp_path / "moe")
    assert [spec.ffn.kind for spec in new.config.specs] == ["swiglu", "moe"]
    assert new.config.specs[1].ffn.experts == 3
    torch.testing.assert_close(logits(new, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
