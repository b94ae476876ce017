"""From logits to the distribution that is sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.errors import InputError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """InputError for a setting outside its range."""
    if temperature < 0:
        raise InputError(f"temperature must be >= 0, found {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be >= 1, found {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise InputError(f"{name} must be in (0, 1], found {value}")


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """logits [..., V] -> fp32 probabilities: temperature, then top-k, top-p (nucleus), min-p.

    top_p keeps the smallest set of most likely tokens whose mass reaches p; min_p keeps tokens at least
    p times as likely as the likeliest (2407.01082).
    """
    scores = logits.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the strictly better tokens
        cut = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, index, before >= top_p)
        scores = scores.masked_fill(cut, float("-inf"))
    probs = scores.softmax(-1)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
