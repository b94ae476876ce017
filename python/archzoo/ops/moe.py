"""Routing of a mixture of experts: `gate`, from logits to expert ids and weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError
from archzoo.ops.backend import choose

Score = Literal["softmax", "sigmoid", "softmax_topk"]
GroupScore = Literal["top2_sum", "max"]


def gate(
    logits: Tensor,
    *,
    top_k: int,
    score: Score = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "top2_sum",
    renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Expert weights [T, k] fp32 and ids [T, k] int64 of router logits [T, E]; lowest index wins ties.

    `bias` [E] takes part in the choice only. With groups > 1 only the `top_groups` best of the E / groups
    sized groups may be chosen from (DeepSeek-V2/V3, 2412.19437). CPU tensors go through Rust.
    """
    if logits.dim() != 2:
        raise InputError(f"gate: logits must be [tokens, experts], found {list(logits.shape)}")
    ids = torch.ops.archzoo.gate_ids(logits.detach(), bias, top_k, score, groups, top_groups, group_score)
    return gate_weights(logits, ids, score, renormalize, scale), ids


def gate_weights(logits: Tensor, ids: Tensor, score: Score, renormalize: bool, scale: float) -> Tensor:
    """Differentiable weights [T, k] of chosen experts; the choice itself has no gradient."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax_topk":
        weights = wide.gather(1, ids).softmax(-1)
    else:
        weights = (wide.softmax(-1) if score == "softmax" else wide.sigmoid()).gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def _reference_ids(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    choice = {"softmax": lambda t: t.softmax(-1), "sigmoid": torch.sigmoid}.get(score, lambda t: t)(wide)
    if bias is not None:
        choice = choice + bias
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.topk(2, -1).values.sum(-1) if group_score == "top2_sum" else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _top(best, top_groups), True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    return _top(choice, top_k)


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest, lowest index first on ties (torch.topk does not promise that)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


@torch.library.custom_op("archzoo::gate_ids", mutates_args=())
def _gate_ids(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
) -> Tensor:
    if choose(logits) == "cpu" and logits.dtype != torch.float64:
        array = logits.contiguous()
        raw = array.numpy() if array.dtype == torch.float32 else array.view(torch.uint16).numpy()
        extra = None if bias is None else bias.detach().float().contiguous().numpy()
        name = str(array.dtype).removeprefix("torch.")
        _, ids = _rust.gate(raw, name, top_k, score, extra, groups, top_groups, group_score, False, 1.0)
        return torch.from_numpy(ids)
    return _reference_ids(logits, bias, top_k, score, groups, top_groups, group_score)


@_gate_ids.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
) -> Tensor:
    return logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)
