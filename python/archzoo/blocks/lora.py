"""Mixture of LoRAs (2503.01743): low-rank adapters on a frozen model, one per modality.

There is no learned gate, the caller names the modality: `with adapters.use("vision"): model(...)`. That of
input with several is the caller's choice as well (Phi-4-multimodal lets vision win over speech).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from archzoo.blocks.linear import Linear
from archzoo.errors import InputError
from archzoo.ops.linear import linear

# Projections of one input share the down-projection, as in a checkpoint that stores them fused.
GROUPS = (
    ("mixer", ("q_proj", "k_proj", "v_proj")),
    ("mixer", ("o_proj",)),
    ("ffn", ("gate_proj", "up_proj")),
    ("ffn", ("down_proj",)),
)


class LoRA(nn.Module):
    """x [..., in] -> scale * B A x [..., out]; A [r, in], B [out, r] starts at zero."""

    def __init__(self, a: nn.Parameter, out: int, scale: float) -> None:
        super().__init__()
        self.a, self.scale = a, scale
        self.b = nn.Parameter(a.new_zeros(out, a.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.a), self.b) * self.scale


class LoRALinear(Linear):
    """The same layer, plus the adapter in use."""

    def __init__(self, base: Linear, owner: MixtureOfLoRAs) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.owner, self.lora = owner, nn.ModuleDict()

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        active = self.owner.active
        return out if active is None else out + self.lora[active](input)


class MixtureOfLoRAs:
    """Puts adapters {name: (rank, alpha)} on the attention and feed-forward of every layer of `model`.

    The model changes in place: its own parameters are frozen, the adapters train, and until they have it
    computes what it did. A model's folder has no place for adapters: `archzoo.checkpoint.save` keeps those
    of `tensors`.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, tuple[int, float]], seed: int = 0) -> None:
        self.active: str | None = None
        self.names, self.model = tuple(adapters), model
        layers = list(cast("nn.ModuleList", model.layers))
        for i, layer in enumerate(layers):  # all or nothing
            for slot, names in GROUPS:
                for name in names:
                    if type(getattr(getattr(layer, slot), name, None)) is not Linear:
                        raise InputError(f"layer {i}: LoRA needs a linear layer {slot}.{name}")
        model.requires_grad_(False)
        device = next(model.parameters()).device
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        for layer in layers:
            for slot, names in GROUPS:
                block = getattr(layer, slot)
                wrapped = [LoRALinear(getattr(block, name), self) for name in names]
                for modality, (rank, alpha) in adapters.items():
                    a = nn.Parameter(wrapped[0].weight.new_empty(rank, wrapped[0].in_features))
                    bound = 1 / math.sqrt(wrapped[0].in_features)
                    nn.init.uniform_(a, -bound, bound, generator=generator)
                    for module in wrapped:
                        module.lora[modality] = LoRA(a, module.out_features, alpha / rank)
                for name, module in zip(names, wrapped, strict=True):
                    setattr(block, name, module)

    def tensors(self, modality: str) -> dict[str, Tensor]:
        """The parameters of one adapter by name."""
        return {n: p for n, p in self.model.named_parameters() if f".lora.{modality}." in n}

    @contextmanager
    def use(self, modality: str | None) -> Iterator[None]:
        """Inside, the model runs with this adapter (None: with none)."""
        if modality is not None and modality not in self.names:
            raise InputError(f"no adapter '{modality}'; there are {', '.join(self.names)}")
        before, self.active = self.active, modality
        try:
            yield
        finally:
            self.active = before
