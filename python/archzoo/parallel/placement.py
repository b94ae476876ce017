"""Redundant experts: which to replicate and where, so that GPUs have about the same load (EPLB)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError


@dataclass(frozen=True)
class Placement:
    """Experts of L layers in P slots each, P / gpus slots to a GPU, neighbours together. Int64, CPU."""

    physical_to_logical: Tensor
    """[L, P]: the expert in each slot."""
    logical_to_physical: Tensor
    """[L, E, most replicas]: the slots of each expert, the rest -1."""
    replicas: Tensor
    """[L, E]: how many slots each expert has."""


def eplb(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Place `replicas` copies of E experts by their load [L, E] (tokens, or any measure) on GPUs.

    If the nodes divide the groups of neighbouring experts, groups are first packed onto nodes, so that a
    token limited to a few groups stays on few nodes; else all experts are replicated and packed at once.
    The algorithm is DeepSeek's.
    """
    if load.dim() != 2 or load.shape[1] < 1 or load.is_complex():
        raise InputError(f"eplb: load must be real [layers, experts], found {load.dtype} {list(load.shape)}")
    layers, experts = load.shape
    sizes = {"replicas": replicas, "groups": groups, "nodes": nodes, "gpus": gpus}
    for name, value in sizes.items():
        if not 1 <= value < 2**31:
            raise InputError(f"eplb: {name} must be in 1..2**31, found {value}")
    load = load.detach().to("cpu", torch.float32).contiguous()
    slots = load.new_empty((layers, replicas), dtype=torch.int64)
    rank = torch.empty_like(slots)
    counts = load.new_empty((layers, experts), dtype=torch.int64)
    out = (slots.data_ptr(), rank.data_ptr(), counts.data_ptr())
    try:
        cluster = (experts, replicas, groups, nodes, gpus)
        _rust.eplb(load.data_ptr(), layers, cluster, out, torch.get_num_threads())
    except ValueError as error:
        raise InputError(f"eplb: {error}") from None
    most = int(counts.max()) if layers else 1
    where = slots.new_full((layers, experts * most), -1)
    where.scatter_(1, slots * most + rank, torch.arange(replicas, device="cpu").expand(layers, -1))
    return Placement(slots, where.view(layers, experts, most), counts)
