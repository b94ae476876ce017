"""Losses on top of a linear head, computed chunk by chunk so that the logits [N, V] never exist as a whole.

Shapes: N tokens, d hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
#: (fp32 logits [C, V], slice of the N tokens) -> (loss summed over the chunk, its gradient [C, V]).
#: The logits may be overwritten; rows that do not count must get a gradient of exactly zero.
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunk_rows(rows: int, vocab: int, device: torch.device, itemsize: int = 4) -> int:
    """Tokens per chunk: as many as fill a fixed number of logits bytes, 64 MiB (CPU) or 512 MiB (elsewhere).

    The bound does not depend on N or V (one row is the least). A CPU gains nothing beyond 64 MiB; an
    accelerator needs larger chunks because every chunk reads and writes the weight gradient [V, d] once.
    """
    budget = 1 << (26 if device.type == "cpu" else 29)
    return max(1, min(rows, budget // (vocab * itemsize)))


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a result in fp32 (fp64 for fp64 inputs) that was never rounded to half precision."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's when autocast is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off: inside, dtypes are exactly those written down."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _ChunkedLinearLoss(torch.autograd.Function):
    """Forms both gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        chunk_loss: ChunkLoss,
        dtype: torch.dtype,
        chunk: int,
        train: bool,
    ) -> Tensor:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        need_hidden, need_weight = (train and need for need in ctx.needs_input_grad[:2])
        x, w = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=acc, device=x.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.empty(weight.shape, dtype=acc, device=x.device) if need_weight else None
        if grad_weight is not None and not x.shape[0]:
            grad_weight.zero_()
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, min(start + chunk, x.shape[0]))
            value, grad = chunk_loss(matmul_fp32(x[rows], w.T), rows)
            loss += value
            if grad_hidden is None and grad_weight is None:
                continue
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul_fp32(grad, w)
            if grad_weight is None:
                continue
            if dtype != acc:
                added = matmul_fp32(grad.T, x[rows])
                grad_weight = added if start == 0 else grad_weight.add_(added)
            elif start == 0:
                torch.mm(grad.T, x[rows], out=grad_weight)
            else:
                grad_weight.addmm_(grad.T, x[rows])
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here only under create_graph=True, where once_differentiable would return constants.
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked head loss has no second derivative (create_graph=True)")
        grads = ctx.saved_tensors
        unseen = (
            grad_loss.device.type != "cpu" or torch.compiler.is_compiling()
        )  # looking would wait, or break
        if unseen or grad_loss != 1:
            grads = tuple(None if g is None else g * grad_loss.to(g.dtype) for g in grads)
        return (*grads, None, None, None, None)


def chunked_linear_loss(
    hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int | None = None
) -> Tensor:
    """Sum of `chunk_loss` over the chunks of `hidden @ weight.T`: the engine of every loss on a head.

    Args:
        hidden: [N, d], any float dtype.
        weight: [V, d]; its gradient is accumulated in fp32 (fp64 for fp64) and skipped if not required.
        chunk_loss: value and gradient of one chunk; called without autograd.
        chunk: tokens per chunk; default `chunk_rows`.

    Returns:
        Scalar in fp32 (fp64 for fp64). Differentiable once; a second derivative raises.
    """
    rows = chunk_rows(hidden.shape[0], weight.shape[0], hidden.device) if chunk is None else chunk
    dtype = compute_dtype(hidden, weight)
    with no_autocast(hidden.device):
        loss: Tensor = _ChunkedLinearLoss.apply(
            hidden, weight, chunk_loss, dtype, rows, torch.is_grad_enabled()
        )
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against labels that are already shifted, without stored logits.

    Args:
        hidden: [..., d], any float dtype; logits and loss are fp32 (fp64 for fp64).
        weight: [V, d].
        labels: [...], int64; `ignore_index` where a token does not count. If none counts, the loss is 0.
        reduction: "mean" over the labels that count, or "sum".
        chunk: tokens per chunk; default `chunk_rows`.

    Returns:
        Scalar loss.
    """
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = y != ignore_index
    index = torch.where(valid, y, 0)[:, None]
    count = valid.sum().clamp_min(1) if reduction == "mean" else 1

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits, -1)
        ids, weights = index[rows], valid[rows, None].to(log_q.dtype) / count
        value = -(log_q.gather(-1, ids) * weights).sum()
        return value, log_q.exp_().mul_(weights).scatter_add_(-1, ids, -weights)

    return chunked_linear_loss(x, weight, chunk_loss, chunk)
