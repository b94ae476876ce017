"""Routing of a mixture of experts: `gate`, from logits to expert ids and weights; `plan`, from ids to rows
sorted by expert."""

from __future__ import annotations

import math
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
    sized groups may be chosen from (DeepSeek-V2/V3, 2412.19437).

    CPU tensors go through Rust: ids by descending score, and without gradients the weights too, within 2e-6
    (relative) of the definition; a token whose scores are NaN is an error that names it.
    """
    if logits.dim() != 2:
        raise InputError(f"gate: logits must be [tokens, experts], found {list(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise InputError(f"gate: logits must be floating point, found {logits.dtype}")
    _check_gate(logits, top_k, bias, groups, top_groups, scale)
    trained = logits.requires_grad and torch.is_grad_enabled()
    if not trained and addressable(logits, bias) and _is_native(logits):
        return _native_gate(logits, bias, top_k, score, groups, top_groups, group_score, renormalize, scale)
    ids = torch.ops.archzoo.gate_ids(logits.detach(), bias, top_k, score, groups, top_groups, group_score)
    return gate_weights(logits, ids, score, renormalize, scale), ids


_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def _check_gate(
    logits: Tensor, top_k: int, bias: Tensor | None, groups: int, top_groups: int, scale: float
) -> None:
    experts = logits.shape[1]
    if groups < 1 or experts % groups:
        raise InputError(f"gate: groups must divide the {experts} experts, found {groups}")
    if not 1 <= top_groups <= groups:
        raise InputError(f"gate: top_groups must be in 1..={groups} (the groups), found {top_groups}")
    most = experts // groups * top_groups
    if not 1 <= top_k <= most:
        raise InputError(
            f"gate: top_k must be in 1..={most} (experts of {top_groups} of {groups} groups), found {top_k}"
        )
    if bias is not None and (bias.shape != (experts,) or bias.device != logits.device):
        raise InputError(
            f"gate: bias must be [{experts}] on {logits.device}, found {list(bias.shape)} on {bias.device}"
        )
    if not math.isfinite(scale):
        raise InputError(f"gate: scale must be finite, found {scale}")


def _is_native(logits: Tensor) -> bool:
    return choose(logits) == "cpu" and logits.dtype != torch.float64


def _native_gate(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    address = 0
    if bias is not None:
        bias = bias.float().contiguous()
        address = bias.data_ptr()
    out = (weights.data_ptr(), ids.data_ptr())
    try:
        _rust.gate(
            logits.data_ptr(), _DTYPES[logits.dtype], tokens, experts, top_k, score, address,
            groups, top_groups, group_score, renormalize, scale, out, torch.get_num_threads(),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"gate: {error}") from None
    return weights, ids


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
    # Without a bias or a sum over a group the order of the logits is that of the scores, and finer.
    choice = wide
    if bias is not None or (top_groups < groups and group_score == "top2_sum"):
        choice = wide.softmax(-1) if score == "softmax" else wide.sigmoid() if score == "sigmoid" else wide
    if bias is not None:
        choice = choice + bias
    if top_groups < groups:
        grouped = choice.unflatten(-1, (groups, -1))
        two = min(2, grouped.shape[-1])
        best = grouped.topk(two, -1).values.sum(-1) if group_score == "top2_sum" else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _top(best, top_groups), True)
        if bias is None:
            grouped = wide.unflatten(-1, (groups, -1))
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
    if _is_native(logits):
        options = (top_k, score, groups, top_groups, group_score, False, 1.0)
        return _native_gate(logits, bias, *options)[1]
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
    """The order of assignments ids [T, k] (or [T]) int64 by expert; the id E, no expert, sorts last."""
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
    return (
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(num_experts, dtype=torch.int32, device=device),
        torch.empty(num_experts, dtype=torch.int32, device=device),
    )


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


def align_blocks(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert, each expert's rows padded to whole blocks, for kernels of fixed tiles.

    Of ids [T, k] int64: assignments int32 [T * k + E * (block - 1)], pads being T * k; the expert of each
    block int32, 0 behind the last; and the number of rows up to there, int32 []. The id E is left out.
    """
    if block < 1:
        raise InputError(f"align_blocks: block must be at least 1, found {block}")
    n = ids.numel()
    most = n + num_experts * (block - 1)
    if most >= 2**31:
        raise InputError(
            f"align_blocks: {n} assignments of {num_experts} experts padded to blocks of {block} need {most} "
            f"rows, but rows are int32"
        )
    sorted_rows = plan(ids, num_experts)
    blocks = (sorted_rows.counts + (block - 1)) // block
    ends = blocks.cumsum(0)  # in blocks
    # How far padding moves each expert's rows; rows without an expert go behind all others.
    shift = (ends - blocks) * block - (sorted_rows.offsets - sorted_rows.counts)
    expert = ids.flatten()[sorted_rows.order]
    row = torch.arange(n, device=ids.device) + torch.cat([shift, shift.new_zeros(1)])[expert]
    row = torch.where(expert < num_experts, row, most)
    rows = torch.full((most + 1,), n, dtype=torch.int32, device=ids.device)
    rows.scatter_(0, row, sorted_rows.order.int())
    which = torch.arange(-(-most // block), device=ids.device)
    experts = torch.searchsorted(ends, which, right=True, out_int32=True)
    experts = torch.where(experts < num_experts, experts, 0)
    return rows[:most], experts, (ends[-1] * block).int()


Policy = Literal["position", "probability", "random", "batch_prioritised"]


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float, minimum: int = 4) -> int:
    """Rows an expert may take: `factor` times an even share, rounded up."""
    return max(math.ceil(tokens * top_k / num_experts * factor), minimum)


def capacity(
    ids: Tensor,
    num_experts: int,
    capacity: int,
    *,
    policy: Policy = "position",
    weights: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """ids [T, k] int64 with E in place of those beyond an expert's capacity; min(count, capacity) stay.

    Who comes first: "position" all first choices in the order of tokens, then all second ones (Switch);
    "probability" the largest weight [T, k]; "random" a draw from `seed`, the same on every device;
    "batch_prioritised" as position, but with the tokens of the largest weight first (V-MoE).
    """
    if ids.dim() != 2:
        raise InputError(f"capacity: ids must be [tokens, k], found {list(ids.shape)}")
    if capacity < 0:
        raise InputError(f"capacity: capacity must be at least 0, found {capacity}")
    priority = _priority(ids, policy, weights, seed)
    flat = ids.flatten()[priority]
    sorted_rows = plan(flat, num_experts)
    starts = torch.cat([sorted_rows.offsets - sorted_rows.counts, sorted_rows.counts.new_zeros(1)])
    kept = sorted_rows.inverse - starts[flat] < capacity
    left = ids.new_empty(ids.numel()).scatter_(0, priority, torch.where(kept, flat, num_experts))
    return left.view_as(ids)


def _priority(ids: Tensor, policy: str, weights: Tensor | None, seed: int | Tensor | None) -> Tensor:
    """[T * k]: assignments, the first to be served first."""
    index = torch.arange(ids.numel(), device=ids.device)
    if policy == "position":
        return index.view_as(ids).t().flatten()
    if policy == "random":
        if seed is None:
            raise InputError("capacity: policy 'random' needs a seed")
        return _mix(index + _mix(torch.as_tensor(seed % 2**63, device=ids.device))).argsort(stable=True)
    if policy not in ("probability", "batch_prioritised"):
        known = "position, probability, random, batch_prioritised"
        raise InputError(f"capacity: policy must be one of {known}, found {policy!r}")
    if weights is None or weights.shape != ids.shape:
        found = None if weights is None else list(weights.shape)
        raise InputError(f"capacity: policy {policy!r} needs weights {list(ids.shape)}, found {found}")
    if policy == "probability":
        return weights.flatten().argsort(descending=True, stable=True)
    if not ids.numel():
        return index
    tokens = weights.amax(1).argsort(descending=True, stable=True)
    return index.view_as(ids)[tokens].t().flatten()


def _mix(x: Tensor) -> Tensor:
    """A hash of each int64 (splitmix64): random numbers that depend on their position alone."""
    x = x * -7046029254386353131
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
