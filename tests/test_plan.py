"""The dispatch plan and what is built on it: against torch, by conservation, and with bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archzoo.errors import InputError
from archzoo.ops.backend import backend
from archzoo.ops.moe import Plan, align_blocks, capacity, expert_capacity, plan
from archzoo.parallel import dispatch_layout, expert_parallel_splits, regroup

NAMES = ("order", "inverse", "token", "counts", "offsets")


def random_ids(tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """[tokens, top_k], distinct in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous()


def assert_equal(a: Plan, b: Plan) -> None:
    for name in NAMES:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 4), (1, 1, 1), (1, 4, 4), (63, 3, 5), (1000, 8, 256), (9000, 8, 64), (3, 0, 4), (20_001, 2, 3)],
)
def test_equals_the_reference_also_with_ids_of_no_expert(tokens: int, top_k: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    for ids in (
        torch.randint(experts + 1, (tokens, top_k), generator=generator),
        torch.randint(experts + 1, (top_k, tokens), generator=generator).t(),
        torch.full((tokens, top_k), experts - 1),
        torch.full((tokens, top_k), experts),
    ):
        with backend("reference"):
            expected = plan(ids, experts)
        assert_equal(plan(ids, experts), expected)


def test_is_a_stable_sort_whose_inverse_undoes_it() -> None:
    ids = random_ids(5000, 8, 64)
    p = plan(ids, 64)
    assert torch.equal(p.order, ids.flatten().argsort(stable=True))
    assert torch.equal(p.order[p.inverse], torch.arange(ids.numel()))
    assert torch.equal(p.token, p.order // 8)
    assert torch.equal(p.counts.long(), ids.flatten().bincount(minlength=64))
    assert p.offsets[-1] == p.counts.sum() == ids.numel()
    flat = plan(ids.flatten(), 64)
    assert torch.equal(flat.order, p.order)
    assert torch.equal(flat.token, p.order)


def test_dispatch_and_combine_return_the_input() -> None:
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    p = plan(random_ids(700, 4, 32), 32)
    rows = x[p.token]
    torch.testing.assert_close(rows[p.inverse].view(700, 4, 16).mul(0.25).sum(1), x)


def test_compiles_in_one_graph_for_any_number_of_tokens() -> None:
    compiled = torch.compile(lambda i: plan(i, 16), fullgraph=True, backend="aot_eager")
    for tokens in (5, 300):
        ids = random_ids(tokens, 4, 16)
        assert_equal(compiled(ids), plan(ids, 16))


HUGE = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2)


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.tensor([[0, 1], [2, 5]]), 4, r"0\.\.=4 \(4 means no expert\), found 5 at token 1"),
        (torch.tensor([[0, -1]]), 4, "found -1 at token 0"),
        (torch.zeros(2, 2, dtype=torch.int32), 4, "ids must be int64"),
        (torch.zeros(2, 2), 4, "ids must be int64"),
        (torch.zeros(2, 2, 2).long(), 4, r"\[2, 2, 2\]"),
        (torch.zeros(2, 2).long(), 0, "found 0 experts"),
        (torch.zeros(2, 2).long(), 2**31, "below 2"),
        (HUGE, 4, r"below 2\*\*31.*\[1073741824, 2\]"),
    ],
)
def test_names_what_is_wrong(ids: Tensor, experts: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(ids, experts)


def test_names_a_bad_id_among_many() -> None:
    ids = torch.zeros(60_000, 2, dtype=torch.int64)
    ids[41_000, 1] = 9
    ids[50_000, 0] = -7
    with pytest.raises(InputError, match="found 9 at token 41000"):
        plan(ids, 4)


def test_align_blocks_golden() -> None:
    ids = torch.tensor([[1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2]])
    rows, experts, total = align_blocks(ids, 4, 4)
    assert rows[:total].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert experts.tolist() == [0, 1, 2, 3, 0, 0]
    assert total == 16
    rows, experts, total = align_blocks(torch.tensor([[3, 1], [3, 0], [3, 1], [3, 3]]), 4, 2)
    assert rows[:total].tolist() == [3, 8, 1, 5, 0, 2, 4, 6, 7, 8]
    assert experts[: total // 2].tolist() == [0, 1, 3, 3, 3]
    assert total == 10
    assert rows.dtype == experts.dtype == total.dtype == torch.int32


@pytest.mark.parametrize("block", [1, 3, 16])
def test_align_blocks_gives_each_block_one_expert(block: int) -> None:
    ids = torch.randint(9, (50, 3), generator=torch.Generator().manual_seed(block))  # 8 is no expert
    rows, experts, total = align_blocks(ids, 8, block)
    assert len(rows) == 150 + 8 * (block - 1)
    assert (rows[total:] == 150).all()
    flat = torch.cat([ids.flatten(), torch.tensor([-1])])
    for start in range(0, int(total), block):
        found = flat[rows[start : start + block]]
        assert set(found.tolist()) <= {int(experts[start // block]), -1}
    kept = rows[rows < 150]
    assert sorted(kept.tolist()) == (ids.flatten() < 8).nonzero().flatten().tolist()
    rows, experts, total = align_blocks(torch.zeros(0, 2, dtype=torch.int64), 8, block)
    assert total == 0


def test_align_blocks_names_what_is_wrong() -> None:
    with pytest.raises(InputError, match="block must be at least 1, found 0"):
        align_blocks(torch.zeros(1, 1).long(), 4, 0)
    with pytest.raises(InputError, match="need 4294967297 rows"):
        align_blocks(torch.zeros(1, 1).long(), 4, 2**30 + 1)


def _slots(ids: Tensor, order: list[tuple[int, int]], experts: int, limit: int) -> Tensor:
    """Serve assignments one by one: the definition."""
    out, used = torch.full_like(ids, experts), [0] * experts
    for token, choice in order:
        expert = int(ids[token, choice])
        if expert < experts and used[expert] < limit:
            used[expert] += 1
            out[token, choice] = expert
    return out


@pytest.mark.parametrize("policy", ["position", "probability", "random", "batch_prioritised"])
def test_capacity_serves_in_the_stated_order(policy: str) -> None:
    ids = random_ids(60, 3, 8)
    ids[7, 1] = 8
    weights = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
    out = capacity(ids, 8, 15, policy=policy, weights=weights, seed=4)  # type: ignore[arg-type]
    counts = ids.flatten().bincount(minlength=9)[:8]
    assert torch.equal(out.flatten().bincount(minlength=9)[:8], counts.clamp(max=15))
    assert ((out == ids) | (out == 8)).all()
    tokens = list(range(60))
    if policy == "batch_prioritised":
        tokens = weights.amax(1).argsort(descending=True, stable=True).tolist()
    order = [(t, k) for k in range(3) for t in tokens]
    if policy == "probability":
        order.sort(key=lambda at: -float(weights[at]))
    if policy == "random":
        assert torch.equal(out, capacity(ids, 8, 15, policy="random", seed=4))
        assert not torch.equal(out, capacity(ids, 8, 15, policy="random", seed=5))
    else:
        assert torch.equal(out, _slots(ids, order, 8, 15))
    assert (capacity(ids, 8, 0, policy=policy, weights=weights, seed=4) == 8).all()  # type: ignore[arg-type]


def test_random_capacity_is_fair() -> None:
    ids = torch.zeros(1000, 1, dtype=torch.int64)
    kept = sum((capacity(ids, 1, 500, policy="random", seed=seed) == 0).flatten() for seed in range(200))
    assert isinstance(kept, Tensor)
    assert kept.min() > 60
    assert kept.max() < 140


def test_expert_capacity() -> None:
    assert expert_capacity(1024, 8, 2, 1.25) == 320
    assert expert_capacity(100, 10, 1, 1.1) == 11
    assert expert_capacity(8, 128, 1, 1.0) == 4


def test_capacity_names_what_is_wrong() -> None:
    ids = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="needs a seed"):
        capacity(ids, 4, 1, policy="random")
    with pytest.raises(InputError, match=r"needs weights \[4, 2\], found None"):
        capacity(ids, 4, 1, policy="probability")
    with pytest.raises(InputError, match="policy must be one of"):
        capacity(ids, 4, 1, policy="first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 0, found -1"):
        capacity(ids, 4, -1)
    with pytest.raises(InputError, match=r"\[tokens, k\]"):
        capacity(ids.flatten(), 4, 1)
    for policy in ("position", "batch_prioritised"):
        assert capacity(ids[:0], 4, 1, policy=policy, weights=torch.zeros(0, 2)).shape == (0, 2)  # type: ignore[arg-type]


def test_an_all_to_all_of_four_ranks_arrives_and_returns() -> None:
    """Rows carry (rank, token, expert); each must reach the rank of its expert, grouped by expert."""
    ranks, experts = 4, 12
    plans = [plan(random_ids(30 + r, 3, experts, r), experts) for r in range(ranks)]
    rows = []
    for r, p in enumerate(plans):
        expert = torch.repeat_interleave(p.counts)
        rows.append(torch.stack([torch.full_like(p.token, r), p.token, expert], 1))
    counts = torch.stack([p.counts for p in plans])
    splits = expert_parallel_splits(counts, ranks)
    assert splits.sum() == sum(len(r) for r in rows)
    for destination in range(ranks):
        parts = [rows[r].split(splits[r].tolist())[destination] for r in range(ranks)]
        received = counts[:, destination * 3 : destination * 3 + 3]
        assert torch.equal(expert_parallel_splits(received.flatten(), ranks), splits[:, destination])
        arrived = torch.cat(parts)
        order, inverse = regroup(received)
        grouped = arrived[order]
        assert torch.equal(grouped[:, 2], grouped[:, 2].sort().values)
        assert (grouped[:, 2] // 3 == destination).all()
        for expert in range(3):
            source = grouped[grouped[:, 2] == destination * 3 + expert, 0]
            assert torch.equal(source, source.sort().values)
        assert torch.equal(grouped[inverse], arrived)


def test_a_token_goes_once_to_a_rank_and_once_to_a_node() -> None:
    ids = torch.tensor([[0, 1, 5], [2, 3, 8], [8, 8, 8]])  # 8 is no expert
    layout = dispatch_layout(ids, 8, ranks=4, nodes=2)
    assert layout.is_in_rank.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        [False] * 4,
    ]
    assert layout.tokens_per_rank.tolist() == [1, 1, 1, 0]
    assert layout.tokens_per_node.tolist() == [2, 1]
    assert layout.tokens_per_expert.tolist() == [1, 1, 1, 1, 0, 1, 0, 0]
    with pytest.raises(InputError, match="3 ranks"):
        dispatch_layout(ids, 8, ranks=3)
    with pytest.raises(InputError, match="3 ranks do not divide"):
        expert_parallel_splits(layout.tokens_per_expert, 3)
    with pytest.raises(InputError, match="local experts"):
        regroup(layout.tokens_per_expert)
