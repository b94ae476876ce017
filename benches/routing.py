"""Routing on the CPU: gate and plan against the torch operations that transformers runs.

The floor is reading the logits and writing weights and ids at this machine's memory bandwidth. The notes give
what a whole layer of experts (hidden 1024, intermediate 512, fp32) would take longer with torch's routing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from harness import Row, interleaved, read_bandwidth, report
from torch import Tensor

from archzoo.blocks.ffns.moe import MoE, MoEConfig
from archzoo.blocks.registry import Site
from archzoo.ops.moe import gate, plan

# experts, k, groups, groups kept
SHAPES = ((64, 6, 1, 1), (160, 6, 8, 3), (256, 8, 8, 4))
GOALS = {64: 6.0, 160: 6.0, 256: 10.0}


def softmax_route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Qwen3-MoE, OLMoE."""
    return torch.topk(logits.softmax(-1, dtype=torch.float32), top_k, dim=-1)


def v2_route(logits: Tensor, top_k: int, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2: groups by their best expert, others masked with 0, weights times 16."""
    scores = logits.softmax(-1, dtype=torch.float32)
    best = scores.view(len(scores), groups, -1).max(-1).values
    masked = scores.masked_fill(~_mask(scores, best, groups, top_groups), 0.0)
    weights, ids = torch.topk(masked, top_k, dim=-1, sorted=False)
    return weights * 16.0, ids


def v3_route(logits: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: groups by their two best biased scores, unbiased weights, normalised, times 2.5."""
    scores = logits.sigmoid()
    choice = scores + bias
    best = choice.view(len(scores), groups, -1).topk(2, -1)[0].sum(-1)
    choice = choice.masked_fill(~_mask(scores, best, groups, top_groups), float("-inf"))
    ids = torch.topk(choice, top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def _mask(scores: Tensor, best: Tensor, groups: int, top_groups: int) -> Tensor:
    kept = torch.topk(best, top_groups, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, kept, 1)
    size = scores.shape[1] // groups
    return mask.unsqueeze(-1).expand(-1, groups, size).reshape(-1, scores.shape[1]).bool()


def sorted_plan(ids: Tensor, experts: int) -> tuple[Tensor, ...]:
    """What transformers' grouped_mm experts do, and the inverse order that combining needs."""
    expert, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(expert.float(), bins=experts, min=0, max=experts - 1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return order // ids.shape[1], inverse, torch.cumsum(counts, 0, dtype=torch.int32)


def _cases(
    logits: Tensor, top_k: int, groups: int, top_groups: int
) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], tuple[Tensor, Tensor]]]:
    experts = logits.shape[1]
    if groups == 1:
        return lambda: gate(logits, top_k=top_k), lambda: softmax_route(logits, top_k)
    if experts == 160:
        return (
            lambda: gate(
                logits, top_k=top_k, groups=groups, top_groups=top_groups, group_score="max", scale=16.0
            ),
            lambda: v2_route(logits, top_k, groups, top_groups),
        )
    bias = 0.1 * torch.randn(experts, generator=torch.Generator().manual_seed(1))
    return (
        lambda: gate(
            logits, top_k=top_k, score="sigmoid", bias=bias, groups=groups, top_groups=top_groups,
            renormalize=True, scale=2.5,
        ),
        lambda: v3_route(logits, bias, top_k, groups, top_groups),
    )  # fmt: skip


def _row(case: str, t: dict[str, float], goal: float, floor: float) -> Row:
    ms = {name: 1e3 * seconds for name, seconds in t.items()}
    ratio = t["peer"] / t["ours"]
    return Row(
        case, "ms", ms["ours"], ms["peer"], "torch", ratio, goal, floor / t["ours"], "memory bandwidth"
    )


def layer_seconds(experts: int, top_k: int, tokens: int) -> float:
    """A forward pass of our layer."""
    layer = MoE(MoEConfig(experts=experts, top_k=top_k, hidden=512), Site(0, 1, 1024, 1e-6))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    x = torch.randn(1, tokens, 1024)
    with torch.inference_mode():
        return interleaved({"layer": lambda: layer(x)}, 3)["layer"]


def main() -> None:
    rows, notes = [], {}
    cores = os.cpu_count() or 1
    for threads in (1, 2) if cores > 1 else (1,):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        for tokens in (64, 4096, 65536):
            rounds = {64: 201, 4096: 21, 65536: 5}[tokens]
            for experts, top_k, groups, top_groups in SHAPES:
                generator = torch.Generator().manual_seed(0)
                logits = torch.randn(tokens, experts, generator=generator)
                ours, peer = _cases(logits, top_k, groups, top_groups)
                (weights, ids), (expected, expected_ids) = ours(), peer()
                same = torch.zeros_like(logits).scatter(1, ids, weights)
                torch.testing.assert_close(
                    same, torch.zeros_like(logits).scatter(1, expected_ids, expected), rtol=1e-5, atol=1e-5
                )
                name = (
                    f"{tokens} tokens, {experts} experts, top {top_k}, {threads} thread{'s'[: threads - 1]}"
                )
                t = interleaved({"ours": ours, "peer": peer}, rounds, 2)
                floor = (logits.nbytes + weights.nbytes + ids.nbytes) / bandwidth
                saved = t["peer"] - t["ours"]
                rows.append(_row(f"gate: {name}", t, 3.0 if tokens == 64 else GOALS[experts], floor))
                runs: dict[str, Callable[[], object]] = {
                    "ours": lambda ids=ids, n=experts: plan(ids, n),
                    "peer": lambda ids=ids, n=experts: sorted_plan(ids, n),
                }
                t = interleaved(runs, rounds, 2)
                rows.append(
                    _row(f"plan: {name}", t, 3.0 if tokens == 64 else 12.0, 4 * ids.nbytes / bandwidth)
                )
                saved += t["peer"] - t["ours"]
                if tokens < 65536:
                    whole = layer_seconds(experts, top_k, tokens)
                    notes[f"% of a layer saved: {name}"] = 100 * saved / (whole + saved)
    report("routing", rows, notes)


if __name__ == "__main__":
    main()
