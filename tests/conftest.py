"""Shared fixtures: tiny models of the registry and token batches, both deterministic."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CausalLM

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


def _representatives() -> list[str]:
    """One registered model for each structure: the rest differ in sizes and rotary frequencies only."""
    found: dict[str, str] = {}
    for name in archzoo.list_models(with_aliases=False):
        specs = archzoo.config(name).tiny().specs
        found.setdefault(repr([s.model_dump(exclude={"mixer": {"rope"}}) for s in specs]), name)
    return list(found.values())


@cache
def _tiny(name: str, dtype: torch.dtype) -> CausalLM:
    """Random weights, large enough that every part of the model shows in its output."""
    cfg = archzoo.config(name).tiny().override("init_std=0.15")
    model = archzoo.build(cfg, dtype=dtype, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # norm weights, biases, decays: away from their neutral start
                noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.add_(noise.to(dtype), alpha=0.2)
    return model.requires_grad_(False)


@pytest.fixture
def tiny() -> Callable[..., CausalLM]:
    """tiny(name, dtype=float64): a shared, frozen, tiny model; do not change it."""
    return lambda name, dtype=torch.float64: _tiny(name, dtype)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """tokens(batch, length, seed=0, vocab=256) -> ids [batch, length]."""

    def make(batch: int, length: int, seed: int = 0, vocab: int = 256) -> Tensor:
        return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`model_name` runs over the registry, `structure` over one model for each structure in it."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", archzoo.list_models(with_aliases=False))
    if "structure" in metafunc.fixturenames:
        metafunc.parametrize("structure", _representatives())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
