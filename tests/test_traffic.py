"""The traffic simulator against counting by hand and by loops."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from archzoo.errors import InputError
from archzoo.ops.moe import gate, plan
from archzoo.parallel import Link, decode_bound, eplb, simulate


def by_loops(ids: Tensor, experts: int, nodes: int, per_node: int) -> list[int]:
    """Copies between and inside nodes, with and without de-duplication."""
    gpus, counts = nodes * per_node, [0, 0, 0, 0]
    for t, row in enumerate(ids.tolist()):
        source = t * gpus // len(ids)
        at = [e * gpus // experts for e in row if e < experts]
        reached = {g // per_node for g in at}
        counts[0] += len(reached - {source // per_node})
        arrivals = {n * per_node + source % per_node for n in range(nodes)}
        counts[1] += len(set(at) - arrivals)
        counts[2] += sum(g // per_node != source // per_node for g in at)
        counts[3] += sum(g // per_node == source // per_node and g != source for g in at)
    return counts


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 4), (4, 1), (2, 4), (4, 4)])
def test_equals_counting_by_loops(nodes: int, per_node: int) -> None:
    generator = torch.Generator().manual_seed(nodes)
    layers = [torch.randint(17, (101, 3), generator=generator) for _ in range(2)]  # 16 is no expert
    traffic = simulate(layers, 16, nodes=nodes, gpus_per_node=per_node, hidden=256)
    expected = [sum(n) for n in zip(*(by_loops(x, 16, nodes, per_node) for x in layers), strict=True)]
    found = [
        traffic.between_nodes,
        traffic.inside_nodes,
        traffic.between_nodes_undeduplicated,
        traffic.inside_nodes_undeduplicated,
    ]
    assert found == [Link(n * (256 + 8), n * 512) for n in expected]
    gpus = nodes * per_node
    kept = torch.stack([x.flatten().bincount(minlength=17)[:16] for x in layers])
    assert torch.equal(traffic.tokens_per_gpu, kept.unflatten(1, (gpus, -1)).sum(2))
    assert traffic.nodes_hit.sum() == 202
    assert traffic.redundancy_gain == 1


def test_the_node_limit_of_the_router_bounds_the_nodes() -> None:
    logits = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    _, ids = gate(logits, top_k=8, score="sigmoid", groups=8, top_groups=4, renormalize=True)
    limited = simulate(ids, 256, nodes=8, gpus_per_node=8, hidden=7168)
    assert limited.nodes_hit[5:].sum() == 0
    _, ids = gate(logits, top_k=8, score="sigmoid", renormalize=True)
    free = simulate(ids, 256, nodes=8, gpus_per_node=8, hidden=7168)
    assert free.nodes_hit[5:].sum() > 0
    assert free.between_nodes.dispatch > limited.between_nodes.dispatch
    saved = limited.between_nodes.dispatch / limited.between_nodes_undeduplicated.dispatch
    assert saved < 0.6


def test_redundant_experts_even_out_a_skewed_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(256, generator=generator)
    ids = (torch.randn(20_000, 256, generator=generator) + skew).topk(8, -1).indices
    load = plan(ids, 256).counts[None]
    placement = eplb(load, 288, groups=8, nodes=4, gpus=32)
    traffic = simulate(ids, 256, nodes=4, gpus_per_node=8, hidden=7168, placement=placement)
    assert traffic.imbalance < 1.3 < 4 < traffic.plain_imbalance
    assert traffic.redundancy_gain > 1.8
    assert traffic.tokens_per_gpu.sum() == ids.numel()
    same = eplb(torch.ones(1, 256), 256, groups=1, nodes=1, gpus=32)
    plain = simulate(ids, 256, nodes=4, gpus_per_node=8, hidden=7168)
    placed = simulate(ids, 256, nodes=4, gpus_per_node=8, hidden=7168, placement=same)
    assert placed.tokens_per_gpu.sum() == plain.tokens_per_gpu.sum()


def test_hundreds_of_gpus_take_seconds_at_most() -> None:
    ids = torch.randint(256, (100_000, 8), generator=torch.Generator().manual_seed(0))
    placement = eplb(plan(ids, 256).counts[None], 320, groups=1, nodes=1, gpus=320)
    start = time.perf_counter()
    simulate(ids, 256, nodes=40, gpus_per_node=8, hidden=7168, placement=placement)
    assert time.perf_counter() - start < 10  # about 0.5 on an idle machine


def test_the_decode_bound_of_deepseek_v3() -> None:
    layer, token = decode_bound()
    assert layer == pytest.approx(120.96e-6)
    assert token == pytest.approx(14.757e-3, abs=1e-6)


def test_no_tokens_and_bad_input() -> None:
    empty = torch.zeros(0, 2, dtype=torch.int64)
    traffic = simulate(empty, 8, nodes=2, gpus_per_node=2, hidden=64)
    assert traffic.between_nodes == Link(0, 0)
    assert traffic.imbalance == 1
    ids = torch.zeros(4, 2, dtype=torch.int64)
    options = {"nodes": 2, "gpus_per_node": 2, "hidden": 64}
    with pytest.raises(InputError, match="4 GPUs must divide 6 experts"):
        simulate(ids, 6, **options)
    with pytest.raises(InputError, match="found 9 at token 0"):
        simulate(ids + 9, 8, **options)
    with pytest.raises(InputError, match="at least 1"):
        simulate(ids, 8, **options | {"nodes": 0})
    with pytest.raises(InputError, match="at least 1"):
        simulate([], 8, **options)
    with pytest.raises(InputError, match=r"\[tokens, k\]"):
        simulate(ids[0], 8, **options)
    placement = eplb(torch.ones(2, 8), 8, 1, 1, 4)
    with pytest.raises(InputError, match="must have 1 layers, 8 experts"):
        simulate(ids, 8, **options, placement=placement)
