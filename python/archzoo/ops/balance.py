"""Keeping the experts of a mixture of experts evenly used: auxiliary losses.

Shapes: N tokens, k experts a token, E experts, S sequences, D devices. `ids` [N, k] are the router's choices,
the id E means no expert. A loss is 1 (`load_balancing`: k) when every expert gets the same share.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """Which of `count` sequences each of N tokens belongs to; `valid` [N] is False at padding."""

    def __init__(self, index: Tensor, count: int, valid: Tensor | None = None) -> None:
        self.index, self.count = index, count
        self.real = torch.ones_like(index, dtype=torch.float32) if valid is None else valid.float()
        self.lengths = self.real.new_zeros(count).scatter_add(0, index, self.real)

    @classmethod
    def of(
        cls, shape: tuple[int, int], device: torch.device, valid: Tensor | None, seq_idx: Tensor | None
    ) -> Sequences:
        """Of a batch [B, T]: its rows or, packed by seq_idx [1, T], up to T sequences of one row."""
        batch, length = shape
        if seq_idx is None:
            index = torch.arange(batch, device=device).repeat_interleave(length)
            return cls(index, batch, None if valid is None else valid.flatten())
        starts = seq_idx[0, 1:] != seq_idx[0, :-1]
        index = torch.cat((starts.new_zeros(min(length, 1)), starts)).long().cumsum(0)
        return cls(index, length, None if valid is None else valid.flatten())

    def loads(self, ids: Tensor, experts: int) -> Tensor:
        """[S, E] fp32: how many assignments each expert got."""
        slot = self.index[:, None] * (experts + 1) + ids
        loads = self.real.new_zeros(self.count * (experts + 1))
        loads = loads.scatter_add(0, slot.flatten(), self.real[:, None].expand_as(ids).flatten())
        return loads.view(self.count, -1)[:, :experts]

    def means(self, values: Tensor) -> Tensor:
        """[S, F] means of values [N, F] over the tokens of each sequence."""
        sums = values.new_zeros(self.count, values.shape[1])
        sums = sums.index_add(0, self.index, values * self.real[:, None].to(values.dtype))
        return sums / self.lengths.clamp_min(1)[:, None].to(values.dtype)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of one loss [S] per sequence over those that hold a token."""
        held = (self.lengths > 0).to(losses.dtype)
        return (losses * held).sum() / held.sum().clamp_min(1)

    def whole(self) -> Sequences:
        """All tokens of the batch as one sequence."""
        return Sequences(torch.zeros_like(self.index), 1, self.real)


def frequencies(ids: Tensor, experts: int, seqs: Sequences) -> Tensor:
    """f [S, E] = E / (k T) times the tokens that chose expert i: 1 at balance."""
    expected = (seqs.lengths * ids.shape[1]).clamp_min(1)
    return seqs.loads(ids, experts) * experts / expected[:, None]


def expert_loss(ids: Tensor, probabilities: Tensor, seqs: Sequences) -> Tensor:
    """Mean over sequences of sum_i f_i P_i (2401.06066 eq. 12; 2412.19437 eq. 17); probabilities [N, E]."""
    f = frequencies(ids, probabilities.shape[1], seqs)
    return seqs.mean((f * seqs.means(probabilities)).sum(-1))


def device_loss(ids: Tensor, probabilities: Tensor, seqs: Sequences, devices: int) -> Tensor:
    """The same over D groups of neighbouring experts: mean f and summed P of a group (2401.06066 eq. 15)."""
    f = frequencies(ids, probabilities.shape[1], seqs).unflatten(-1, (devices, -1)).mean(-1)
    p = seqs.means(probabilities).unflatten(-1, (devices, -1)).sum(-1)
    return seqs.mean((f * p).sum(-1))


def communication_loss(
    ids: Tensor, probabilities: Tensor, seqs: Sequences, devices: int, limit: int
) -> Tensor:
    """f = D / (M T) times the tokens sent to a device, P summed over its experts; M = limit (2405.04434)."""
    size = probabilities.shape[1] // devices
    sent = probabilities.new_zeros(ids.shape[0], devices).scatter(1, ids // size, 1.0)
    f = seqs.means(sent) * (devices / limit)
    p = seqs.means(probabilities).unflatten(-1, (devices, -1)).sum(-1)
    return seqs.mean((f * p).sum(-1))


def load_balancing(loads: Tensor, sums: Tensor, tokens: Tensor) -> Tensor:
    """E sum_i (loads_i / N)(sums_i / N), loads and summed probabilities [E] of N tokens; k at balance."""
    count = tokens.clamp_min(1)
    return loads.shape[0] * (loads / count * sums / count).sum()


def z_loss(logits: Tensor, seqs: Sequences) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (2202.08906)."""
    return seqs.whole().means(logits.logsumexp(-1, keepdim=True).square()).sum()
