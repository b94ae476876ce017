"""SMART (2505.17272): which layers of a Mamba-2 model gain most from being latent attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.conversion.progress import Progress
from archzoo.conversion.surgery import check_pair
from archzoo.errors import InputError
from archzoo.model import CausalLM
from archzoo.ops.linear_loss import chunk_rows, matmul_fp32


@torch.no_grad()
def sensitivity(
    teacher: CausalLM, mla_model: CausalLM, mamba2_model: CausalLM, tokens: Tensor, *, batch_size: int = 1
) -> tuple[float, ...]:
    """How much closer to the teacher each single MLA layer brings the all-Mamba-2 model: a score per layer.

    score i = KL(teacher || all Mamba-2) - KL(teacher || the same with layer i of mla_model), mean per token
    of tokens [N, T] (real text). The layers before i do not change, so their result is reused: half the cost
    of running every variant. Memory: 2 hidden states per layer of batch_size sequences.
    """
    check_pair(mla_model, mamba2_model)
    if teacher.config.vocab_size != mamba2_model.config.vocab_size:
        raise InputError(
            f"teacher and models must share a vocabulary, found {teacher.config.vocab_size} "
            f"and {mamba2_model.config.vocab_size} tokens"
        )
    if tokens.numel() == 0 or batch_size < 1:
        raise InputError(f"tokens {list(tokens.shape)} in batches of {batch_size}: both must be at least 1")
    layers, norm = list(mamba2_model.layers), mamba2_model.norm
    batches = torch.split(tokens, batch_size)
    sums = torch.zeros(1 + len(layers), dtype=torch.float64)
    with Progress("scoring layers", len(batches) * len(sums)) as progress:
        for ids in batches:
            ctx = mamba2_model.context(ids)
            x = mamba2_model.embed(ids)
            inputs = []
            for layer in layers:
                inputs.append(x)
                x = layer(x, ctx)
            finals = [norm(x)]
            progress.step()
            for i, x in enumerate(inputs):
                x = mla_model.layers[i](x, ctx)
                for layer in layers[i + 1 :]:
                    x = layer(x, ctx)
                finals.append(norm(x))
                progress.step()
            sums += _kl(teacher.backbone(ids), teacher.head_weight, finals, mamba2_model.head_weight)
    kl = sums / tokens.numel()
    return tuple((kl[0] - kl[1:]).tolist())


def _kl(p_hidden: Tensor, p_head: Tensor, q_hiddens: list[Tensor], q_head: Tensor) -> Tensor:
    """Σ over tokens of KL(P || Q) for each Q, fp64; hidden states [B, T, d]; logits exist chunk by chunk."""
    p_hidden, q_hiddens = p_hidden.flatten(0, 1), [q.flatten(0, 1) for q in q_hiddens]
    sums = torch.zeros(len(q_hiddens), dtype=torch.float64, device=p_hidden.device)
    step = chunk_rows(len(p_hidden), len(p_head), p_hidden.device)
    for start in range(0, len(p_hidden), step):
        rows = slice(start, start + step)
        log_p = torch.log_softmax(matmul_fp32(p_hidden[rows], p_head.T), -1)
        for i, q in enumerate(q_hiddens):
            log_q = torch.log_softmax(matmul_fp32(q[rows], q_head.T), -1)
            sums[i] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return sums.cpu()


def smart(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers to make MLA: highest total score among evenly spread sets (2505.17272).

    The first is the best of the leading L // count layers, the last the best of the trailing ones; the gaps
    between neighbours differ by at most one layer. Of equal choices the one with the lowest indices wins.
    """
    total = len(scores)
    if not 1 <= count <= total:
        raise InputError(f"count must be between 1 and the {total} layers, found {count}")
    if not all(math.isfinite(s) for s in scores):
        raise InputError(f"scores must be finite, found {list(scores)}")
    exact = [Fraction(float(s)) for s in scores]  # sums without rounding: ties are ties
    edge = total // count
    first = max(range(edge), key=exact.__getitem__)
    last = max(range(total - edge, total), key=exact.__getitem__)
    if count == 1:
        return (first,)
    # `wide` of the gaps hold narrow + 1 layers, the others narrow.
    narrow, wide = divmod(last - first - count + 1, count - 1)
    # Best picks behind a layer that has `used` wide gaps before it, built from the last layer backwards.
    behind: dict[int, tuple[Fraction, tuple[int, ...]]] = {wide: (Fraction(0), ())}
    for k in reversed(range(1, count)):
        here = {}
        for used in range(min(k - 1, wide) + 1):
            options = []
            for then in (used, used + 1):  # the narrow gap first: max keeps it when both are as good
                if then in behind:
                    at, (score, picks) = first + k * (narrow + 1) + then, behind[then]
                    options.append((exact[at] + score, (at, *picks)))
            if options:
                here[used] = max(options, key=lambda option: option[0])
        behind = here
    return (first, *behind[0][1])


def smart_allows(indices: Sequence[int], num_layers: int) -> bool:
    """Whether SMART's bounds on the ends and gaps admit these layers, whatever the scores."""
    count = len(indices)
    if not 1 <= count <= num_layers or not all(0 <= i < num_layers for i in indices):
        return False
    first, last, edge = indices[0], indices[-1], num_layers // count
    if first >= edge or last < num_layers - edge:
        return False
    if count == 1:
        return True
    gaps = [b - a - 1 for a, b in pairwise(indices)]
    spread = last - first - count + 1
    low, high = spread // (count - 1), -(-spread // (count - 1))
    return all(low <= gap <= high for gap in gaps)
