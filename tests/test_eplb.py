"""Placement of redundant experts: golden maps, invariants, and the published algorithm written in torch."""

from __future__ import annotations

import pytest
import torch
from eplb import reference
from torch import Tensor

from archzoo.errors import InputError
from archzoo.parallel import Placement, eplb

LOAD = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def gpu_loads(load: Tensor, placement: Placement, gpus: int) -> Tensor:
    share = load / placement.replicas
    return share.gather(1, placement.physical_to_logical).unflatten(1, (gpus, -1)).sum(-1)


def test_golden_maps() -> None:
    nested = eplb(LOAD, 16, groups=4, nodes=2, gpus=8)
    assert nested.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert nested.replicas[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert gpu_loads(LOAD, nested, 8)[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    flat = eplb(LOAD, 16, groups=3, nodes=2, gpus=8)
    assert flat.physical_to_logical.tolist() == [
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
    ]
    assert gpu_loads(LOAD, flat, 8)[0].tolist() == [130.5, 95.5, 130, 138, 138.5, 134.5, 134, 132]
    skewed = eplb(torch.tensor([[10, 1, 1, 1]]), 8, groups=1, nodes=1, gpus=4)
    assert skewed.physical_to_logical.tolist() == [[0, 0, 0, 1, 0, 2, 0, 3]]
    assert skewed.replicas.tolist() == [[5, 1, 1, 1]]


@pytest.mark.parametrize(
    ("experts", "replicas", "groups", "nodes", "gpus"),
    [
        (256, 288, 8, 4, 32), (256, 320, 8, 1, 320), (12, 16, 4, 2, 8), (12, 16, 3, 2, 8), (8, 8, 8, 8, 8),
        (1, 4, 1, 1, 4), (6, 6, 1, 1, 1), (64, 96, 8, 3, 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["random", "equal", "zero", "one"])
def test_invariants(experts: int, replicas: int, groups: int, nodes: int, gpus: int, kind: str) -> None:
    load = torch.rand(3, experts, generator=torch.Generator().manual_seed(experts))
    if kind != "random":
        load = torch.full_like(load, 0.0 if kind == "zero" else 1.0)
    if kind == "one":
        load[:, 1:] = 0
    p = eplb(load, replicas, groups, nodes, gpus)
    assert p.physical_to_logical.shape == (3, replicas)
    assert (p.replicas >= 1).all()
    assert (p.replicas.sum(1) == replicas).all()
    for layer in range(3):
        slots = p.physical_to_logical[layer]
        assert torch.equal(slots.bincount(minlength=experts), p.replicas[layer])
        for expert in range(experts):
            count = int(p.replicas[layer, expert])
            where = p.logical_to_physical[layer, expert]
            assert (slots[where[:count]] == expert).all()
            assert (where[count:] == -1).all()
            assert len(set(where[:count].tolist())) == count
    if groups % nodes == 0:  # a group stays on its node
        node = torch.arange(replicas) // (replicas // nodes)
        group = p.physical_to_logical // (experts // groups)
        for layer in range(3):
            pairs = {(int(g), int(n)) for g, n in zip(group[layer], node, strict=True)}
            assert len(pairs) == groups


@pytest.mark.parametrize(
    ("experts", "replicas", "groups", "nodes", "gpus"),
    [(16, 24, 4, 2, 8), (16, 30, 4, 3, 6), (24, 32, 8, 4, 8), (16, 16, 2, 2, 4)],
)
def test_a_thousand_random_traces_equal_the_reference(
    experts: int, replicas: int, groups: int, nodes: int, gpus: int
) -> None:
    generator = torch.Generator().manual_seed(replicas)
    load = torch.stack(
        [torch.randperm(10_000, generator=generator)[:experts] + 1 for _ in range(250)]
    ).float()
    ours = eplb(load, replicas, groups, nodes, gpus)
    slots, rank, counts = reference(load, replicas, groups, nodes, gpus)
    assert torch.equal(ours.physical_to_logical, slots)
    assert torch.equal(ours.replicas, counts)
    found = ours.logical_to_physical.flatten(1).gather(1, slots * ours.logical_to_physical.shape[2] + rank)
    assert torch.equal(found, torch.arange(replicas).expand_as(found))


def test_no_layers_and_other_dtypes() -> None:
    assert eplb(torch.zeros(0, 8), 8, 1, 1, 4).physical_to_logical.shape == (0, 8)
    for dtype in (torch.int32, torch.float64, torch.bfloat16):
        p = eplb(torch.tensor([[8, 1, 2, 4]], dtype=dtype), 6, 1, 1, 2)
        assert p.replicas.tolist() == [[3, 1, 1, 1]]


@pytest.mark.parametrize(
    ("load", "sizes", "message"),
    [
        (torch.ones(8), (8, 1, 1, 4), r"found torch.float32 \[8\]"),
        (torch.ones(1, 0), (8, 1, 1, 4), r"\[1, 0\]"),
        (torch.ones(1, 8), (10, 1, 1, 4), "multiple of the 4 gpus.*found 10"),
        (torch.ones(1, 8), (4, 1, 1, 4), "at least the 8 experts.*found 4"),
        (torch.ones(1, 8), (8, 3, 1, 4), "groups must divide the 8 experts, found 3"),
        (torch.ones(1, 8), (8, 1, 3, 4), "multiple of the 3 nodes, found 4"),
        (torch.ones(1, 8), (8, 1, 0, 4), "nodes must be in"),
        (torch.ones(1, 8), (2**31, 1, 1, 4), "replicas must be in"),
        (-torch.ones(2, 8), (8, 1, 1, 4), "found -1 for expert 0 of layer 0"),
        (torch.tensor([[1, 1], [1, torch.nan]]), (2, 1, 1, 1), "found NaN for expert 1 of layer 1"),
    ],
)
def test_names_what_is_wrong(load: Tensor, sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        eplb(load, *sizes)
