"""Mixture of LoRAs: published sizes, one adapter at a time, a frozen base."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CausalLM, InputError
from archzoo.blocks.lora import LoRALinear, MixtureOfLoRAs

Tokens = Callable[..., Tensor]
PHI4 = {"vision": (256, 512.0), "speech": (320, 640.0)}


def tiny(name: str = "llama-3.2-1b") -> CausalLM:
    return archzoo.build(archzoo.config(name).tiny().override("init_std=0.15"), dtype=torch.float64).eval()


def test_phi4_sizes() -> None:
    """Check 16: 370M and 460M published."""
    phi4 = archzoo.config("llama-3.2-3b").override(
        "layers.count=32",
        "layers.override=[]",
        "layers.default.mixer.heads=24",
        "layers.default.ffn.hidden=8192",
    )
    model = archzoo.build(phi4, device="meta")
    before = sum(p.numel() for p in model.parameters())
    MixtureOfLoRAs(model, PHI4)
    sizes = {name: sum(p.numel() for n, p in model.named_parameters() if f".{name}." in n) for name in PHI4}
    assert sizes == {"vision": 369_098_752, "speech": 461_373_440}
    assert sum(p.numel() for p in model.parameters()) == before + sum(sizes.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(sizes.values())


def test_the_named_adapter_and_no_other_runs(tokens: Tokens) -> None:
    model, ids = tiny(), tokens(2, 9)
    with torch.no_grad():
        base = model(ids).logits
        adapters = MixtureOfLoRAs(model, {"vision": (4, 8.0), "speech": (6, 6.0)})
        for name in (None, "vision", "speech"):
            with adapters.use(name):
                torch.testing.assert_close(model(ids).logits, base)  # B is zero
    with adapters.use("vision"):
        model(ids, labels=ids).loss.backward()
    for name, param in model.named_parameters():
        trained = name.endswith(".b") and ".vision." in name
        assert (param.grad is not None and bool(param.grad.any())) == trained, name
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".b"):
                param.normal_(0, 0.1)
        with adapters.use("vision"):
            vision = model(ids).logits
            cache = model.new_cache(2, 9)
            parts = [model(part, cache=cache).logits for part in ids.split([5, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), vision)
        torch.testing.assert_close(model(ids).logits, base)
        merged = tiny()
        for layer, other in zip(merged.layers, model.layers, strict=True):
            for (name, module), (_, adapted) in zip(
                layer.named_modules(),
                ((n, m) for n, m in other.named_modules() if ".lora" not in n),
                strict=True,
            ):
                if isinstance(adapted, LoRALinear):
                    lora = adapted.lora["vision"]
                    assert lora.scale == 2, name
                    module.weight += 2 * lora.b @ lora.a
        torch.testing.assert_close(merged(ids).logits, vision)
        assert (vision - base).abs().max() > 1e-3


def test_an_adapter_is_saved_by_itself(tmp_path: Path) -> None:
    model = tiny()
    adapters = MixtureOfLoRAs(model, {"vision": (4, 8.0), "speech": (6, 6.0)})
    tensors = adapters.tensors("vision")
    assert not set(tensors) & set(adapters.tensors("speech"))
    assert sum(t.numel() for t in tensors.values()) == 2 * 4 * (64 + 128 + 64 + 64 + 64 + 192 + 96 + 64)
    archzoo.checkpoint.save({n: t.detach() for n, t in tensors.items()}, tmp_path / "vision")
    again = archzoo.checkpoint.load(tmp_path / "vision")
    assert all(torch.equal(t, again[n]) for n, t in tensors.items())
    copy = deepcopy(model)
    assert copy.layers[0].mixer.q_proj.owner is not adapters


def test_wrong_names_and_models() -> None:
    adapters = MixtureOfLoRAs(tiny(), {"vision": (4, 8.0)})
    with pytest.raises(InputError, match="no adapter 'sound'; there are vision"), adapters.use("sound"):
        pass
    assert adapters.active is None
    model = tiny("deepseek-v2-lite")
    with pytest.raises(InputError, match=r"layer 0: LoRA needs a linear layer mixer\.k_proj"):
        MixtureOfLoRAs(model, {"vision": (4, 8.0)})
    assert all(p.requires_grad for p in model.parameters())
