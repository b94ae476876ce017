"""Whole models, generation, training and checkpoints on a GPU against the CPU. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CausalLM, checkpoint
from archzoo.checkpoint import AsyncSaver
from archzoo.ops import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Tiny = Callable[..., CausalLM]
Tokens = Callable[..., Tensor]


def on_gpu(model: CausalLM, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The same weights on the GPU."""
    copy = archzoo.build(model.config, device="cuda", dtype=dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, NaN when anything is."""
    expected = expected.detach().double()
    return ((got.detach().cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_logits(structure: str, name: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(structure), tokens(2, 37)
    expected = model(ids).logits
    with torch.inference_mode(), backend(name):
        assert error(on_gpu(model)(ids.cuda()).logits, expected) < 1e-4


def test_bfloat16(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    """About as close to float64 as the CPU in bfloat16: rounding may change a route on either."""
    model, ids = tiny(structure), tokens(2, 37)
    with torch.inference_mode():
        expected = model(ids).logits
        got = error(on_gpu(model, torch.bfloat16)(ids.cuda()).logits, expected)
        with backend("reference"):
            rounded = error(tiny(structure, torch.bfloat16)(ids).logits, expected)
    assert got < 2 * rounded + 0.01


def test_cached_decode(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(structure), tokens(2, 24)
    with torch.inference_mode():
        expected = model(ids).logits
        gpu = on_gpu(model)
        cache = gpu.new_cache(2, 32)
        parts = [gpu(ids[:, :20].cuda(), cache=cache).logits]
        parts += [gpu(ids[:, t : t + 1].cuda(), cache=cache).logits for t in range(20, 24)]
    if model.config.name != "llama-130m-mod":  # a token's route depends on how many come at once
        assert error(torch.cat(parts, 1), expected) < 1e-4


def test_gradients(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    frozen, ids = tiny(structure), tokens(2, 37)
    model = archzoo.build(frozen.config, dtype=torch.float64)
    model.load_state_dict(frozen.state_dict())
    gpu = on_gpu(frozen)
    for m, x in ((model.eval(), ids), (gpu, ids.cuda())):  # in training, PR-MoE drops tokens by chance
        m(x, labels=x).loss.backward()
    grads = dict(gpu.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-9:
            grad = grads[key].grad
            assert grad is not None, key
            assert error(grad, parameter.grad) < 1e-3, key


def test_generate(structure: str, tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(structure)
    prompt = tokens(2, 9)
    got = archzoo.generate(on_gpu(model), prompt.cuda(), 8)
    assert got.device.type == "cuda"
    assert torch.equal(got.cpu(), archzoo.generate(model, prompt, 8))


@pytest.mark.parametrize("name", ["smollm2-135m", "mamba2-130m", "zebra-llama-1b-4mla-12m2", "deepseek-v3"])
def test_compiled(name: str, tokens: Tokens) -> None:
    torch._dynamo.reset()
    # In fp32, torch 2.11 compiles no grouped_mm.
    model = archzoo.build(archzoo.config(name).tiny(), device="cuda", dtype=torch.bfloat16).train()
    ids = tokens(2, 32).cuda()
    compiled = torch.compile(model, fullgraph=True)
    losses = [m(ids, labels=ids).loss for m in (model, compiled)]
    assert error(losses[1], losses[0].cpu()) < 1e-2
    losses[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("compress", [None, "dfloat11"])
def test_checkpoints(compress: str | None, tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("deepseek-v3").tiny(), device="cuda", dtype=torch.bfloat16)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    checkpoint.save(tensors, tmp_path / "state", max_shard_size=200_000, compress=compress)
    into = {name: torch.empty_like(t) for name, t in tensors.items()}
    checkpoint.open(tmp_path / "state").read_into(into)
    assert all(torch.equal(into[name], t) for name, t in tensors.items())


def test_load_and_save(tmp_path: Path, tokens: Tokens) -> None:
    model = archzoo.build(archzoo.config("zebra-llama-1b-4mla-12m2").tiny(), device="cuda").eval()
    archzoo.save(model, tmp_path / "a")
    with AsyncSaver() as saver:
        saver.save(model, tmp_path / "b")
        with torch.no_grad():
            expected = model(tokens(1, 9).cuda()).logits
            for parameter in model.parameters():
                parameter.zero_()
    for folder in ("a", "b"):
        again = archzoo.load(tmp_path / folder, device="cuda")
        assert next(again.parameters()).device.type == "cuda"
        with torch.no_grad():
            assert torch.equal(again(tokens(1, 9).cuda()).logits, expected)
