"""Load balancing of a routed feed-forward: its config, and what it reports to the context."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from archzoo.blocks.context import Aux, Pool, Routing
from archzoo.ops.balance import (
    Sequences,
    communication_loss,
    device_loss,
    expert_loss,
    z_loss,
)
from archzoo.ops.moe import Policy, Score, expert_capacity, gate


class Balance(BaseModel):
    """Weights of the losses that training adds; 0 leaves one out.

    expert, device, communication: DeepSeek's alpha1, alpha2, alpha3, per sequence, over `devices` groups of
    neighbouring experts of which a token reaches `device_limit` (2401.06066, 2405.04434). sequence: V3's, of
    the choice without its bias (2412.19437). switch: all tokens of the batch as one group, first choices only
    (2101.03961). load_balancing: the same pooled over layers with all choices, top_k at balance (Mixtral).
    z: mean squared logsumexp of the logits (2202.08906).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    expert: NonNegativeFloat = 0.0
    device: NonNegativeFloat = 0.0
    communication: NonNegativeFloat = 0.0
    devices: PositiveInt = 1
    device_limit: PositiveInt = 1
    sequence: NonNegativeFloat = 0.0
    switch: NonNegativeFloat = 0.0
    load_balancing: NonNegativeFloat = 0.0
    z: NonNegativeFloat = 0.0


class Capacity(BaseModel):
    """An expert takes at most max(minimum, ceil(factor * top_k * tokens / experts)) of a call's assignments.

    `factor` holds in training, `eval_factor` in evaluation (None drops nothing there: what a token becomes
    then does not depend on later tokens). `drop` says who comes first, see `ops.moe.capacity`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    factor: PositiveFloat
    eval_factor: PositiveFloat | None = None
    minimum: NonNegativeInt = 4
    drop: Policy = "position"

    def slots(self, tokens: int, top_k: int, experts: int, training: bool) -> int | None:
        """Assignments that one expert takes; None for all."""
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return None
        return expert_capacity(tokens, experts, top_k, factor, self.minimum)


def report(
    aux: Aux,
    seqs: Sequences,
    layer: int,
    logits: Tensor,
    ids: Tensor,
    kept: Tensor,
    score: Score,
    balance: Balance | None,
) -> None:
    """Statistics of logits [N, E] and choices ids, kept [N, k] (after dropping), and the losses asked for."""
    experts, whole = logits.shape[1], seqs.whole()
    p = logits.softmax(-1)
    affinity = p if score != "sigmoid" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    with torch.no_grad():
        loads = whole.loads(ids, experts)[0]
        taken = loads if kept is ids else whole.loads(kept, experts)[0]
        dropped = 1 - taken.sum() / loads.sum().clamp_min(1)
        aux.routings[layer] = Routing(loads, whole.means(affinity.detach())[0], dropped)
    if balance is None:
        return
    b = balance
    if b.expert:
        aux.report("expert_loss", layer, b.expert * expert_loss(ids, affinity, seqs))
    if b.device:
        aux.report("device_loss", layer, b.device * device_loss(ids, affinity, seqs, b.devices))
    if b.communication:
        loss = communication_loss(ids, affinity, seqs, b.devices, b.device_limit)
        aux.report("communication_loss", layer, b.communication * loss)
    if b.sequence:
        unbiased = gate(logits.detach(), top_k=ids.shape[1], score=score)[1]
        aux.report("sequence_loss", layer, b.sequence * expert_loss(unbiased, affinity, seqs))
    if b.switch:
        aux.report("switch_loss", layer, b.switch * expert_loss(ids[:, :1], p, whole))
    if b.load_balancing:
        tokens = whole.lengths[0]
        aux.pools[layer] = Pool(loads, whole.means(p)[0] * tokens, tokens, b.load_balancing)
    if b.z:
        aux.report("z_loss", layer, b.z * z_loss(logits, seqs))
