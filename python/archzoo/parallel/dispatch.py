"""Bookkeeping of an expert-parallel all-to-all: R ranks with E / R neighbouring experts each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.errors import InputError
from archzoo.ops.moe import plan


def expert_parallel_splits(counts: Tensor, ranks: int) -> Tensor:
    """Rows for each rank [..., R] of the rows for each expert, counts [..., E].

    Of a rank's own counts these are its input_splits of all_to_all_single; of the counts that it received,
    [R, E / R] flattened, its output_splits. Of all ranks' counts [R, E], rank r has row r and column r.
    """
    if ranks < 1 or counts.dim() < 1 or counts.shape[-1] % ranks:
        raise InputError(f"expert_parallel_splits: {ranks} ranks do not divide counts {list(counts.shape)}")
    return counts.unflatten(-1, (ranks, -1)).sum(-1)


def regroup(received: Tensor) -> tuple[Tensor, Tensor]:
    """The order [n] that takes rows from [rank, expert]-major to [expert, rank]-major, and its inverse.

    received [R, E / R]: rows that came from each rank for each local expert; they arrive rank by rank.
    """
    if received.dim() != 2:
        raise InputError(f"regroup: received must be [ranks, local experts], found {list(received.shape)}")
    ranks, experts = received.shape
    each = torch.arange(experts, device=received.device).repeat(ranks)
    sorted_rows = plan(each.repeat_interleave(received.flatten()), experts)
    return sorted_rows.order, sorted_rows.inverse


@dataclass(frozen=True)
class Layout:
    """How many tokens go where; a token goes once to a rank, whatever its number of experts there."""

    tokens_per_rank: Tensor
    """int32 [R]."""
    tokens_per_node: Tensor
    """int32 [nodes]: a token goes once to a node."""
    tokens_per_expert: Tensor
    """int32 [E]."""
    is_in_rank: Tensor
    """bool [T, R]."""


def dispatch_layout(ids: Tensor, num_experts: int, ranks: int, nodes: int = 1) -> Layout:
    """Layout of ids [T, k] int64 (the id E means no expert) over ranks, equally many to a node."""
    if ranks < 1 or nodes < 1 or num_experts % ranks or ranks % nodes:
        raise InputError(
            f"dispatch_layout: nodes must divide ranks and ranks the experts, "
            f"found {nodes} nodes, {ranks} ranks, {num_experts} experts"
        )
    if ids.dim() != 2:
        raise InputError(f"dispatch_layout: ids must be [tokens, k], found {list(ids.shape)}")
    counts = plan(ids, num_experts).counts
    in_rank = hits(ids // (num_experts // ranks), ranks)
    in_node = in_rank.unflatten(1, (nodes, -1)).any(2)
    return Layout(in_rank.sum(0, dtype=torch.int32), in_node.sum(0, dtype=torch.int32), counts, in_rank)


def hits(places: Tensor, count: int) -> Tensor:
    """bool [T, count]: whether a token has a place [T, k] there; the place `count` is none."""
    hit = places.new_zeros((len(places), count + 1), dtype=torch.bool)
    return hit.scatter_(1, places, True)[:, :count]
