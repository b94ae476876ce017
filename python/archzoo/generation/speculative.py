"""Greedy decoding with the model's own MTP modules as drafter: the tokens of plain greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from archzoo.cache import Cache
from archzoo.errors import InputError
from archzoo.model import MTP, CausalLM


def check_mtp(model: CausalLM, cache: Cache, temperature: float) -> None:
    """InputError unless `model` can draft for itself and forget what it rejects."""
    if not model.mtp:
        raise InputError(f"use_mtp: '{model.config.name}' has no MTP modules")
    if temperature:
        raise InputError(f"use_mtp decodes greedily, found temperature {temperature}")
    if not all(getattr(state, "truncatable", True) for state in cache.states):
        raise InputError(
            "use_mtp needs a cache that can be truncated; recurrent layers cannot forget a token"
        )


def mtp_steps(
    model: CausalLM,
    ids: Tensor,
    positions: Tensor | None,
    hidden: Tensor,
    cache: Cache,
    count: int,
    ended: Tensor,
) -> Iterator[Tensor]:
    """`count` times the next token [B] of each row.

    Each round drafts one token per module, verifies them in one pass of the model and keeps what every row
    that has not ended agrees with. `hidden` [B, T, d] are those of the prompt ids [B, T], which `cache`
    holds; `ended` [B] is updated by the caller.

    Notation: N tokens are known, the model has seen all but the newest; `hidden` starts at token `start`.
    """
    depth, start = len(model.mtp), 0
    drafter = model.new_mtp_cache(ids.shape[0], ids.shape[1] + count)
    newest = model.head(hidden[:, -1:]).argmax(-1)
    yield newest[:, 0]
    tokens = torch.cat((ids, newest), 1)
    left = count - 1
    while left:
        drafts = _draft(model, drafter, tokens, hidden, start, positions)[:, : left - 1]
        positions = None  # the drafter's timeline knows those of the prompt now
        out = model.backbone(torch.cat((tokens[:, -1:], drafts), 1), cache)
        best = model.head(out).argmax(-1)
        agreed = (drafts == best[:, :-1]).cumprod(1).sum(1)
        accepted = int(agreed[~ended].min())
        for i in range(accepted + 1):
            yield best[:, i]
        # Of the drafter's entries those of the last depth - 1 tokens may rest on rejected drafts.
        known = tokens.shape[1]
        cache.truncate(known + accepted)
        settled = max(start, known - depth)
        hidden = torch.cat((hidden[:, settled - start :], out[:, : accepted + 1]), 1)
        tokens = torch.cat((tokens, best[:, : accepted + 1]), 1)
        start, left = settled, left - accepted - 1


def _draft(
    model: CausalLM, drafter: Cache, tokens: Tensor, hidden: Tensor, start: int, positions: Tensor | None
) -> Tensor:
    """Drafts [B, depth] after tokens [B, N]; hidden [B, N - 1 - start, d] are those of start ... N - 2."""
    drafter.truncate(start)
    known = tokens.shape[1]
    ctx = model.context(tokens[:, start:-1], drafter, positions)
    for k, (module, state) in enumerate(zip(model.mtp, drafter.states, strict=True), 1):
        embedded = model.embedded(tokens[:, start + k : known - 1 + k])
        hidden = cast("MTP", module)(embedded, hidden, ctx, state)
        tokens = torch.cat((tokens, model.head(hidden[:, -1:]).argmax(-1)), 1)
    return tokens[:, known:]
