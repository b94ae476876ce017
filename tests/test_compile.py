"""torch.compile: one graph for each model, forward and backward, equal to eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CausalLM

Tokens = Callable[..., Tensor]
NAMES = [
    "smollm2-135m",
    "mamba2-130m",
    "zebra-llama-1b-4mla-12m2",
    "deepseek-v2-lite",
    "step-3",
    "gpt-oss-20b",
    "llama-4-scout",
    "llama-130m-mod",
]


def build(name: str) -> CausalLM:
    return archzoo.build(archzoo.config(name).tiny().override("init_std=0.1"))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_training_step_is_one_graph(name: str, tokens: Tokens) -> None:
    model, ids = build(name).train(), tokens(2, 20)

    def step(run: Callable[..., archzoo.Output]) -> dict[str, Tensor]:
        model.zero_grad()
        loss = run(ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    expected = step(model)
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert sorted(got) == sorted(expected)
    assert len(got) == 1 + len(list(model.parameters()))
    for key, grad in expected.items():
        assert_close(got[key], grad)


def test_packed_and_padded_forward_are_one_graph(tokens: Tokens) -> None:
    model, ids = build("zebra-llama-1b-4mla-12m2").eval(), tokens(1, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cu_seqlens = torch.tensor([0, 7, 8, 20])
    positions = torch.arange(-3, 17).clamp(min=-1)[None]
    with torch.no_grad():
        assert_close(compiled(ids, cu_seqlens=cu_seqlens).logits, model(ids, cu_seqlens=cu_seqlens).logits)
        assert_close(
            compiled(ids, positions=positions).logits[:, 3:], model(ids, positions=positions).logits[:, 3:]
        )
