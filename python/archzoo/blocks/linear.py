"""nn.Linear whose product goes through `ops.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from archzoo.ops.linear import linear, linears


class Linear(nn.Linear):
    """x [..., in] -> [..., out]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def plain(*layers: nn.Module) -> bool:
    """Whether all are `Linear`s that do what their weights say: no adapter, no hook."""
    return all(type(layer) is Linear and not _hooked(layer) for layer in layers)


def together(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The outputs of several layers on one input, in one pass when all are plain `Linear`s."""
    if plain(*layers):
        return linears(x, [(layer.weight, layer.bias) for layer in layers])  # type: ignore[misc]
    return [layer(x) for layer in layers]


def _hooked(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its product."""
    own = layer.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
