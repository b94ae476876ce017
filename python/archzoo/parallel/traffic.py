"""What a routing trace costs on a cluster: bytes on each kind of link, and how even the GPUs' work is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.errors import InputError
from archzoo.ops.moe import plan
from archzoo.parallel.dispatch import hits
from archzoo.parallel.placement import Placement


@dataclass(frozen=True)
class Link:
    """Bytes over one kind of link, of all tokens and layers."""

    dispatch: int
    combine: int


@dataclass(frozen=True)
class Traffic:
    """Of all layers; a copy is a token's hidden state on its way to a GPU or node."""

    between_nodes: Link
    """A token crosses once to each node (to the GPU with its own index there)."""
    inside_nodes: Link
    """And goes on from there, once to each GPU."""
    between_nodes_undeduplicated: Link
    """A copy for each expert instead."""
    inside_nodes_undeduplicated: Link
    tokens_per_gpu: Tensor
    """int64 [L, G]: assignments, the work of the GPU's experts."""
    imbalance: float
    """Most over mean of those, the mean of the layers."""
    plain_imbalance: float
    """The same if each expert were on one GPU, neighbours together."""
    nodes_hit: Tensor
    """int64 [nodes + 1]: tokens that need 0, 1, ... nodes."""

    @property
    def redundancy_gain(self) -> float:
        """How much shorter the slowest GPU's work is than in the plain layout."""
        return self.plain_imbalance / self.imbalance


def simulate(
    ids: Tensor | Sequence[Tensor],
    num_experts: int,
    *,
    nodes: int,
    gpus_per_node: int,
    hidden: int,
    placement: Placement | None = None,
) -> Traffic:
    """Replay ids [T, k] int64, or those of each layer, on nodes x GPUs.

    Tokens are dealt evenly to the GPUs, neighbours together; a replica is chosen by the token's number.
    Without a placement each GPU has E / GPUs neighbouring experts. Dispatch is FP8 with a 4-byte scale for
    each 128 channels, combine BF16. The id E means no expert.
    """
    layers = [ids] if isinstance(ids, Tensor) else list(ids)
    gpus = nodes * gpus_per_node
    if nodes < 1 or gpus_per_node < 1 or hidden < 1 or num_experts < 1 or not layers:
        raise InputError(
            f"simulate: nodes, gpus_per_node, hidden, experts and layers must be at least 1, found {nodes}, "
            f"{gpus_per_node}, {hidden}, {num_experts}, {len(layers)}"
        )
    if placement is not None:
        _check_placement(placement, len(layers), num_experts, gpus)
    elif num_experts % gpus:
        raise InputError(f"simulate: without a placement {gpus} GPUs must divide {num_experts} experts")
    copies = torch.zeros(4, dtype=torch.int64)
    nodes_hit = torch.zeros(nodes + 1, dtype=torch.int64)
    loads, plain_loads = [], []
    for layer, layer_ids in enumerate(layers):
        if layer_ids.dim() != 2:
            raise InputError(f"simulate: ids must be [tokens, k], found {list(layer_ids.shape)}")
        counts = plan(layer_ids, num_experts).counts.cpu()  # refuses ids that are no experts
        layer_ids = layer_ids.cpu()
        plain_loads.append(_fold(counts, gpus))
        at = _gpu_of_assignment(layer_ids, num_experts, gpus, placement, layer)
        loads.append(torch.bincount(at.flatten(), minlength=gpus + 1)[:gpus])
        layer_copies, layer_hits = _copies(at, nodes, gpus_per_node)
        copies += layer_copies
        nodes_hit += layer_hits
    dispatch_bytes, combine_bytes = hidden + 4 * -(-hidden // 128), 2 * hidden
    between, inside, every_between, every_inside = (
        Link(n * dispatch_bytes, n * combine_bytes) for n in copies.tolist()
    )
    load = torch.stack(loads)
    return Traffic(
        between_nodes=between,
        inside_nodes=inside,
        between_nodes_undeduplicated=every_between,
        inside_nodes_undeduplicated=every_inside,
        tokens_per_gpu=load,
        imbalance=_imbalance(load),
        plain_imbalance=_imbalance(torch.stack(plain_loads)),
        nodes_hit=nodes_hit,
    )


def decode_bound(
    *, batch: int = 32, copies: int = 9, hidden: int = 7000, bandwidth: float = 50e9, layers: int = 61
) -> tuple[float, float]:
    """Seconds of dispatch (FP8) and combine (BF16) of one layer, and of a token, which two batches share.

    The defaults are DeepSeek-V3's bound (2505.09343): 32 tokens a GPU, 8 routed and one shared expert.
    """
    layer = (1 + 2) * batch * copies * hidden / bandwidth
    return layer, 2 * layer * layers


def _check_placement(placement: Placement, layers: int, experts: int, gpus: int) -> None:
    slots = placement.physical_to_logical.shape
    if placement.replicas.shape != (layers, experts) or slots[1] % gpus:
        raise InputError(
            f"simulate: the placement must have {layers} layers, {experts} experts and slots that "
            f"{gpus} GPUs divide, found {list(placement.replicas.shape)} and {slots[1]} slots"
        )


def _gpu_of_assignment(
    ids: Tensor, num_experts: int, gpus: int, placement: Placement | None, layer: int
) -> Tensor:
    """[T, k]; the GPU `gpus` for the id E."""
    if placement is None:
        return ids // (num_experts // gpus)
    per_gpu = placement.physical_to_logical.shape[1] // gpus
    replicas = torch.cat([placement.replicas[layer], torch.ones(1, dtype=torch.int64)])
    table = placement.logical_to_physical[layer]
    table = torch.cat([table, torch.full_like(table[:1], gpus * per_gpu)])
    turn = torch.arange(len(ids))[:, None] % replicas[ids]
    return table[ids, turn] // per_gpu


def _copies(at: Tensor, nodes: int, gpus_per_node: int) -> tuple[Tensor, Tensor]:
    """Copies between and inside nodes, the same undeduplicated; and tokens by their number of nodes."""
    tokens, gpus = len(at), nodes * gpus_per_node
    token = torch.arange(tokens)
    source = token * gpus // max(tokens, 1)
    node = source // gpus_per_node
    hit = hits(at, gpus)
    hit_node = hit.unflatten(1, (nodes, gpus_per_node)).any(2)
    nodes_hit = hit_node.sum(1)
    between = nodes_hit.sum() - hit_node[token, node].sum()
    # A copy is there already on the GPUs with the source's index: that of its node, and where it arrived.
    own = hit.unflatten(1, (nodes, gpus_per_node))[token, :, source % gpus_per_node]
    inside = hit.sum() - own.sum()
    real = at < gpus
    same_node = (at // gpus_per_node == node[:, None]) & real
    every_inside = (same_node & (at != source[:, None])).sum()
    copies = torch.stack([between, inside, real.sum() - same_node.sum(), every_inside])
    return copies, torch.bincount(nodes_hit, minlength=nodes + 1)


def _fold(counts: Tensor, gpus: int) -> Tensor:
    """Load of each GPU if it has E / GPUs experts, rounded up."""
    return torch.zeros(gpus, dtype=torch.int64).index_add_(
        0, torch.arange(len(counts)) * gpus // len(counts), counts.long()
    )


def _imbalance(load: Tensor) -> float:
    mean = load.double().mean(1).clamp(min=1e-9)
    return float((load.amax(1) / mean).clamp(min=1.0).mean())
