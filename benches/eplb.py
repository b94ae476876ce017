"""Placement of redundant experts: Rust against the published algorithm written in torch."""

from __future__ import annotations

import torch
from harness import Row, interleaved, report
from torch import Tensor

from archzoo.parallel import eplb


def _pack(load: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bin and place of each item [L, n]: by descending load, to the lightest bin with room."""
    layers, n = load.shape
    room = n // bins
    if room == 1:
        return torch.arange(n).expand(layers, n), torch.zeros(layers, n, dtype=torch.int64)
    bin_of, place = (torch.empty(layers, n, dtype=torch.int64) for _ in range(2))
    for layer, order in enumerate(load.sort(dim=-1, descending=True, stable=True).indices.tolist()):
        weights = [torch.zeros(()) for _ in range(bins)]
        used = [0] * bins
        for item in order:
            best = min((b for b in range(bins) if used[b] < room), key=lambda b: weights[b])
            bin_of[layer, item], place[layer, item] = best, used[best]
            weights[best] = weights[best] + load[layer, item]
            used[best] += 1
    return bin_of, place


def _replicate(load: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Item and rank of each slot [L, slots], and slots of each item [L, n]."""
    layers, n = load.shape
    item = torch.arange(slots).repeat(layers, 1)
    rank = torch.zeros(layers, slots, dtype=torch.int64)
    count = torch.ones(layers, n, dtype=torch.int64)
    every = torch.arange(layers)
    for slot in range(n, slots):
        most = (load / count).max(-1).indices
        item[:, slot] = most
        rank[:, slot] = count[every, most]
        count[every, most] += 1
    return item, rank, count


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def reference(
    load: Tensor, replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and rank of each slot [L, P], replicas of each expert [L, E]."""
    if groups % nodes:
        groups = nodes = 1
    layers, experts = load.shape
    size = experts // groups
    node, place = _pack(load.float().unflatten(-1, (groups, size)).sum(-1), nodes)
    new = ((node * (groups // nodes) + place) * size)[..., None] + torch.arange(size)
    old = _inverse(new.flatten(-2))
    local = load.float().gather(-1, old).view(layers * nodes, -1)
    item, rank, count = _replicate(local, replicas // nodes)
    gpu, place = _pack((local / count).gather(-1, item), gpus // nodes)
    order = _inverse(gpu * (replicas // gpus) + place)
    item, rank = item.gather(-1, order), rank.gather(-1, order)
    start = torch.arange(nodes).mul(experts // nodes).repeat(layers)[:, None]
    slots = old.gather(-1, (item + start).view(layers, -1))
    counts = count.view(layers, -1).gather(-1, new.flatten(-2))
    return slots, rank.view(layers, -1), counts


def main() -> None:
    load = torch.rand(58, 256, generator=torch.Generator().manual_seed(0)) * 1000
    rows = []
    for name, sizes in {
        "8 groups, 4 nodes, 32 GPUs": (288, 8, 4, 32),
        "global, 36 GPUs": (288, 1, 1, 36),
    }.items():
        t = interleaved(
            {"ours": lambda s=sizes: eplb(load, *s), "peer": lambda s=sizes: reference(load, *s)}, 3
        )
        rows.append(
            Row(
                f"EPLB of 58 x 256 experts: {name}", "ms", t["ours"] * 1e3, t["peer"] * 1e3, "torch",
                t["peer"] / t["ours"], 20.0, 0.0, "",
            )
        )  # fmt: skip
    report("eplb", rows, {})


if __name__ == "__main__":
    main()
