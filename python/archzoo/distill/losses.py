"""Distillation losses: divergences between token distributions, and distances between hidden states.

P is the teacher, Q the student, both softmax(logits / temperature). Shapes: B sequences, T tokens,
V vocabulary, d hidden size. Divergences are computed in fp32 (fp64 for fp64 inputs), summed over V and
multiplied by temperature², which keeps the size of the gradient independent of the temperature. Logits
must be finite. A position counts when its label is not -100.
"""

from __future__ import annotations

from abc import abstractmethod
from math import log
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from archzoo.errors import InputError
from archzoo.ops.linear_loss import (
    chunked_linear_loss,
    compute_dtype,
    linear_cross_entropy,
    matmul_fp32,
)

#: "token": mean over the tokens that count. "batch": their sum divided by B, as some papers train
#: (`batchmean`; it grows with T). "sum": their sum.
Reduction = Literal["token", "batch", "sum"]


class Divergence(BaseModel):
    """Base of the divergences D(P, Q) of one token: config and formula in one place."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope from log-probabilities [..., V].

        Returns:
            D [...], differentiable by autograd, and G = ∂D/∂log Q [..., V] up to a multiple of Q, which the
            softmax removes: ∂D/∂logits = G - Q·ΣG.
        """


class ForwardKL(Divergence):
    """KL(P ‖ Q) = Σ P (log P - log Q)."""

    kind: Literal["forward_kl"] = "forward_kl"

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return _dot(p, log_p - log_q), -p


class ReverseKL(Divergence):
    """KL(Q ‖ P) = Σ Q (log Q - log P)."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        slope = log_q.exp() * (log_q - log_p)
        return slope.sum(-1), slope


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence β·KL(P ‖ M) + (1-β)·KL(Q ‖ M) with M = βP + (1-β)Q [2306.13649].

    As in the libraries that popularised it, β = 0 *is* the forward KL and β = 1 the reverse KL, not the
    limit of the formula (which is 0): the size of the loss jumps there.
    """

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, ge=0, le=1)

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta in (0, 1):
            return (ReverseKL() if self.beta else ForwardKL()).terms(log_p, log_q)
        log_m = torch.logaddexp(log_p + log(self.beta), log_q + log(1 - self.beta))
        slope = (1 - self.beta) * log_q.exp() * (log_q - log_m)
        return self.beta * _dot(log_p.exp(), log_p - log_m) + slope.sum(-1), slope


class TVD(Divergence):
    """Total variation distance ½ Σ |P - Q|."""

    kind: Literal["tvd"] = "tvd"

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        excess = log_p.exp() - q
        return 0.5 * excess.abs().sum(-1), -q * (excess > 0)


class TVDPlusPlus(TVD):
    """TVD whose reward r = 1{P > Q} is standardised over the batch, (r - μ)/σ [2403.00858].

    μ and σ are taken over all tokens that count, with x ~ Q at each of them: μ = mean_t Σ_x Q r and
    σ² = μ(1-μ), the expectation of what sampling from the student would give (the paper's axes were not
    available). Since ΣQ = 1, μ drops out of the gradient and the loss is TVD / σ with σ held constant.
    """

    kind: Literal["tvd++"] = "tvd++"  # type: ignore[assignment]


class SkewedForwardKL(Divergence):
    """KL(P ‖ αP + (1-α)Q) [2402.03898]."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1)

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log(self.alpha), log_q + log(1 - self.alpha))
        return _dot(log_p.exp(), log_p - log_m), (self.alpha - 1) * (log_p + log_q - log_m).exp()


class SkewedReverseKL(Divergence):
    """KL(Q ‖ (1-α)P + αQ) [2402.03898]."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1)

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log(1 - self.alpha), log_q + log(self.alpha))
        q, gap = log_q.exp(), log_q - log_m
        return _dot(q, gap), q * (gap - self.alpha * gap.exp())


AnyDivergence = Annotated[
    ForwardKL | ReverseKL | JSD | TVD | TVDPlusPlus | SkewedForwardKL | SkewedReverseKL,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Divergence] = TypeAdapter(AnyDivergence)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _spec(loss: str | Divergence) -> Divergence:
    return loss if isinstance(loss, Divergence) else _ADAPTER.validate_python({"kind": loss})


def common_vocab(student: int, teacher: int) -> int:
    """The smaller of two vocabulary sizes that differ at most by padding (1 %); both sides are cut to it."""
    if abs(student - teacher) > 0.01 * max(student, teacher):
        raise InputError(
            f"student and teacher must share a vocabulary, but {student} and {teacher} tokens differ by more "
            "than padding (1 %)"
        )
    return min(student, teacher)


def token_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    loss: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    reduction: Reduction = "token",
) -> Tensor:
    """A divergence of whole logits, by autograd: the definition that `linear_distill_loss` is tested against.

    Args:
        student_logits: [B, T, V], any float dtype.
        teacher_logits: [B, T, V]; no gradient flows into it.
        labels: [B, T]; only -100 (does not count) is read. None: every position counts.
        loss: a kind ("forward_kl", "jsd", ...) or a configured divergence.
        temperature: of both sides; the loss is multiplied by its square.
        reduction: see `Reduction`.

    Returns:
        Scalar in fp32 (fp64 for fp64).
    """
    spec = _spec(loss)
    vocab = common_vocab(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q, log_p = (
        torch.log_softmax(_wide(z[..., :vocab]) / temperature, -1)
        for z in (student_logits, teacher_logits.detach())
    )
    valid = torch.ones_like(log_q[..., 0], dtype=torch.bool) if labels is None else labels != -100
    value, slope = spec.terms(log_p, log_q)
    if isinstance(spec, TVDPlusPlus):
        value = value / _reward_std(-_masked_sum(slope.detach().sum(-1), valid), valid.sum())
    return _reduce(_masked_sum(value, valid) * temperature**2, valid, reduction)


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    loss: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    reduction: Reduction = "token",
    chunk: int | None = None,
) -> Tensor:
    """kd_weight · divergence + ce_weight · cross-entropy on two linear heads, without stored logits.

    Args:
        student_hidden: [B, T, d_s] or [N, d_s], any float dtype.
        student_weight: [V, d_s].
        teacher_hidden: [B, T, d_t] or [N, d_t]; no gradient.
        teacher_weight: [V, d_t]; no gradient. The two V may differ by padding (`common_vocab`).
        labels: [B, T] or [N], already shifted; -100 where a position does not count. The cross-entropy
            reads the ids (at temperature 1).
        loss: a kind ("forward_kl", "jsd", ...) or a configured divergence.
        temperature: of both sides; the divergence is multiplied by its square.
        reduction: see `Reduction`; "batch" needs [B, T, d] inputs.
        chunk: tokens per chunk; default `archzoo.ops.linear_loss.chunk_rows`.

    Returns:
        Scalar in fp32 (fp64 for fp64), differentiable once in the student's hidden states and weight.
    """
    spec = _spec(loss)
    if isinstance(spec, TVDPlusPlus) and ce_weight:  # the two parts are scaled differently after the loop
        kd = linear_distill_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
            spec, temperature, 0.0, kd_weight, reduction, chunk,
        )  # fmt: skip
        ce = linear_cross_entropy(student_hidden, student_weight, labels, reduction="sum", chunk=chunk)
        return kd + ce_weight * _reduce(ce, labels != -100, reduction)

    vocab = common_vocab(student_weight.shape[0], teacher_weight.shape[0])
    x = student_hidden.reshape(-1, student_hidden.shape[-1])
    t_dtype = compute_dtype(teacher_hidden, teacher_weight)
    t_x = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).to(t_dtype)
    t_w = teacher_weight.detach()[:vocab].to(t_dtype)
    y = labels.reshape(-1)
    valid = y != -100
    index = torch.where(valid, y, 0)[:, None]
    scale = kd_weight * temperature**2
    reward = torch.zeros((), dtype=torch.float64, device=x.device)

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        counts, ids = valid[rows], index[rows]
        teacher_logits = matmul_fp32(t_x[rows], t_w.T).to(logits.dtype)
        log_q, log_p = (
            torch.log_softmax(z if temperature == 1 else z / temperature, -1)
            for z in (logits, teacher_logits)
        )
        value, slope = spec.terms(log_p, log_q)
        total = slope.sum(-1, keepdim=True)
        if isinstance(spec, TVDPlusPlus):
            reward.sub_(_masked_sum(total[:, 0], counts))
        value = value * scale
        grad = slope.addcmul_(log_q.exp(), total, value=-1).mul_(scale / temperature)
        if ce_weight:
            hard = log_q if temperature == 1 else torch.log_softmax(logits, -1)
            value = value - ce_weight * hard.gather(-1, ids)[:, 0]
            grad.add_(hard.exp(), alpha=ce_weight)
            grad.scatter_add_(-1, ids, grad.new_full(ids.shape, -ce_weight))
        return _masked_sum(value, counts), grad.masked_fill_(~counts[:, None], 0)

    result = chunked_linear_loss(x, student_weight[:vocab], chunk_loss, chunk)
    if isinstance(spec, TVDPlusPlus):
        result = result / _reward_std(reward, valid.sum()).to(result.dtype)
    return _reduce(result, labels != -100, reduction)


HiddenLoss = Literal["l2", "mse", "cosine"]


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    kind: HiddenLoss = "l2",
    reduction: Reduction = "token",
) -> Tensor:
    """Distance of hidden states.

    Args:
        student: [B, T, d], any float dtype; computed in fp32 (fp64 for fp64).
        teacher: [B, T, d]; no gradient.
        mask: [B, T], true where a token counts. None: everywhere.
        kind: per token, "l2" the norm of the difference (not squared), as Zebra-Llama's released code trains
            [2505.17272]; "mse" the mean of the squared difference; "cosine" 1 - cosine.
        reduction: see `Reduction`.

    Returns:
        Scalar.
    """
    s, t = _wide(student), _wide(teacher.detach())
    if kind == "l2":
        value = torch.linalg.vector_norm(s - t, dim=-1)
    elif kind == "mse":
        value = (s - t).square().mean(-1)
    else:
        value = 1 - F.cosine_similarity(s, t, dim=-1)
    valid = torch.ones_like(value, dtype=torch.bool) if mask is None else mask.bool()
    return _reduce(_masked_sum(value, valid), valid, reduction)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _masked_sum(value: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, value, 0).sum()


def _reward_std(total: Tensor, count: Tensor) -> Tensor:
    """σ of the reward r under Q from Σ_t Σ_x Q r; bounded away from 0, where TVD is 0 too."""
    mean = (total / count.clamp_min(1)).clamp(0, 1)
    return (mean * (1 - mean)).sqrt().clamp_min(1e-6)


def _reduce(total: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "token":
        return total / valid.sum().clamp_min(1)
    if reduction == "batch":
        if valid.ndim != 2:
            raise InputError(
                f"reduction 'batch' needs inputs with a batch axis [B, T], got {tuple(valid.shape)}"
            )
        return total / valid.shape[0]
    return total
