"""Routing of a mixture of experts: `gate`, from logits to expert ids and weights; `plan`, from ids to rows
sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError
from archzoo.ops.backend import addressable, choose

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


@dataclass(frozen=True)
class Plan:
    """Assignments [T * k] sorted by expert, the earlier first among equals.

    Rows from offsets[-1] on have no expert.
    """

    order: Tensor
    """int64 [T * k]: the assignment in each sorted row."""
    inverse: Tensor
    """int64 [T * k]: the sorted row of each assignment."""
    token: Tensor
    """int64 [T * k]: the token of each sorted row, order // k."""
    counts: Tensor
    """int32 [E]: rows of each expert."""
    offsets: Tensor
    """int32 [E]: end of each expert's rows, as grouped_mm wants them."""


def plan(ids: Tensor, num_experts: int) -> Plan:
    """The order of assignments ids [T, k] (or [T]) int64 by expert; the id E means no expert and sorts last."""
    if ids.dim() not in (1, 2) or ids.dtype != torch.int64:
        raise InputError(f"plan: ids must be int64 [tokens, k], found {ids.dtype} {list(ids.shape)}")
    if not 1 <= num_experts < 2**31 or ids.numel() >= 2**31:
        raise InputError(
            f"plan: counts and offsets are int32, so experts and assignments must be below 2**31 "
            f"(and experts at least 1), found {num_experts} experts and ids {list(ids.shape)}"
        )
    if addressable(ids) and choose(ids) == "cpu":
        return Plan(*_native_plan(ids, num_experts))
    return Plan(*torch.ops.archzoo.plan(ids, num_experts))


_PlanParts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _native_plan(ids: Tensor, num_experts: int) -> _PlanParts:
    ids = ids.contiguous()
    parts = _empty_plan(ids, num_experts)
    order, inverse, token, counts, offsets = parts
    addresses = (
        order.data_ptr(), inverse.data_ptr(), token.data_ptr(), counts.data_ptr(), offsets.data_ptr()
    )  # fmt: skip
    top_k = ids.shape[1] if ids.dim() == 2 else 1
    try:
        threads = torch.get_num_threads()
        _rust.plan(ids.data_ptr(), ids.numel(), num_experts, max(top_k, 1), addresses, threads)
    except ValueError as error:
        raise InputError(f"plan: {error}") from None
    return parts


def _empty_plan(ids: Tensor, num_experts: int) -> _PlanParts:
    n, device = ids.numel(), ids.device
    order, inverse, token = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(3))
    counts, offsets = (torch.empty(num_experts, dtype=torch.int32, device=device) for _ in range(2))
    return order, inverse, token, counts, offsets


def _reference_plan(ids: Tensor, num_experts: int) -> _PlanParts:
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))[:num_experts].clone()
    top_k = ids.shape[1] if ids.dim() == 2 else 1
    return order, inverse, order // max(top_k, 1), counts, counts.cumsum(0, dtype=torch.int32)


@torch.library.custom_op("archzoo::plan", mutates_args=())
def _plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (_native_plan if choose(ids) == "cpu" else _reference_plan)(ids, num_experts)


@_plan.register_fake
def _(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_plan(ids, num_experts)
