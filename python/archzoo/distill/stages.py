"""Distillation recipes: a TOML file with a list of stages, and the two objectives that a stage can have."""

from __future__ import annotations

import tomllib
from math import ceil, cos, pi
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from archzoo.blocks.context import Aux
from archzoo.distill.losses import AnyDivergence, ForwardKL, HiddenLoss, hidden_loss, linear_distill_loss
from archzoo.errors import ConfigError, InputError
from archzoo.model import CausalLM

Train = Literal["mixers", "layers", "all"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class StageBase(BaseModel):
    """What the two kinds of stages share: data, optimiser, schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    train: Train = "layers"
    # Data. A step sees batch_size x accumulation sequences on every process.
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    data: tuple[Fraction, Fraction] = (0.0, 1.0)
    seq_len: PositiveInt
    batch_size: PositiveInt
    accumulation: PositiveInt = 1
    seed: int = 0
    # AdamW without weight decay on norms, biases and the parameters of a scan (A_log, D, dt_bias).
    lr: PositiveFloat
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: Fraction = 0.01
    decay: Fraction = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: PositiveFloat = 1.0
    router_bias_rate: float = Field(default=0.0, ge=0)  # of `CausalLM.update_router_bias`
    mixed_precision: Literal["no", "bf16"] = "no"
    # "token": mean over the tokens of a step. "batch": their sum divided by its sequences.
    reduction: Literal["token", "batch"] = "token"
    eval_every: int = Field(default=0, ge=0)
    save_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        if self.data[0] >= self.data[1]:
            raise ValueError("data must be [from, to], fractions of the tokens with from < to")
        return self

    def total_steps(self, world_size: int = 1) -> int:
        """Optimiser steps: as given, or as many as see `tokens` tokens."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return ceil(self.tokens / (self.seq_len * self.batch_size * self.accumulation * world_size))

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0 ... steps-1.

        A linear warm-up over the first `warmup` of the steps; then "constant", a "cosine" to 0, or "wsd":
        constant with a linear way to 0 over the last `decay` of the steps.
        """
        warm = ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + cos(pi * (step - warm) / max(1, steps - warm)))
        if self.schedule == "wsd":
            return self.lr * min(1.0, (steps - step) / max(1, ceil(self.decay * steps)))
        return self.lr


class ILD(StageBase):
    """Intermediate layer distillation from a dense teacher of the same depth and width [2505.17272].

    Student layer l reads the teacher's hidden state h_{l-1}. The loss is Σ_l |h_l - h_l^T| +
    mixer_weight · |mixer_l - mixer_l^T|, where the last h is taken after the final norm. Layers are
    independent of each other: memory stays one layer deep.
    """

    kind: Literal["ild"] = "ild"
    hidden: HiddenLoss = "l2"
    mixer_weight: float = Field(default=1.0, ge=0)


class KD(StageBase):
    """Distillation of the whole student on the teacher's next-token distributions."""

    kind: Literal["kd"] = "kd"
    train: Train = "all"
    loss: AnyDivergence = ForwardKL()
    temperature: PositiveFloat = 1.0
    kd_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=0.0, ge=0)
    gradient_checkpointing: bool = False


Stage = Annotated[ILD | KD, Field(discriminator="kind")]


class Recipe(BaseModel):
    """Stages in the order in which they run, and the folder of packed tokens to train on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    pack: str | None = None
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ: {', '.join(names)}")
        return self

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read one TOML file; an error names the file, the key and what is wrong with it.

        Its `pack` is relative to the file.
        """
        try:
            recipe = cls.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
            if recipe.pack is None:
                return recipe
            return recipe.model_copy(update={"pack": str(Path(path).parent / recipe.pack)})
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError("; ".join(f"{path}: {fault}" for fault in faults)) from None

    def stage(self, name: str) -> ILD | KD:
        """The stage of this name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(f"no stage '{name}'; the recipe has {', '.join(s.name for s in self.stages)}")


class Objective(nn.Module):
    """One micro-batch: loss and gradients. The teacher is no submodule, so nothing trains or shards it."""

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)

    @property
    def teacher(self) -> CausalLM:
        return self._teacher[0]

    def step(self, input_ids: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """Accumulate the gradients of scale · loss; return that value, detached.

        Args:
            input_ids: [B, T].
            labels: [B, T], shifted; -100 where a token does not count.
            scale: scalar; the loss is a sum over the tokens that count.
        """
        raise NotImplementedError


class KDObjective(Objective):
    """Divergence of the next-token distributions, with the head's logits chunk by chunk."""

    def __init__(self, student: CausalLM, teacher: CausalLM, stage: KD) -> None:
        super().__init__(student, teacher)
        self.stage = stage

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Loss summed over the tokens that count, with the student's auxiliary losses (means) for each."""
        aux = Aux()
        with torch.no_grad():
            hidden = self.teacher.backbone(input_ids)
        loss = linear_distill_loss(
            self.student.backbone(input_ids, aux=aux),
            self.student.head_weight,
            hidden,
            self.teacher.head_weight,
            labels,
            self.stage.loss,
            self.stage.temperature,
            self.stage.ce_weight,
            self.stage.kd_weight,
            reduction="sum",
        )
        for extra in aux.losses().values():
            loss = loss + extra * (labels != -100).sum()
        return loss

    def step(self, input_ids: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = self(input_ids, labels) * scale
        torch.autograd.backward(loss)
        return loss.detach()


class ILDObjective(Objective):
    """Teacher and student in lockstep, one layer at a time: forward, backward, next layer."""

    def __init__(self, student: CausalLM, teacher: CausalLM, stage: ILD) -> None:
        super().__init__(student, teacher)
        sizes = [(len(model.layers), model.embed.embedding_dim) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise InputError(
                "ild needs a teacher of the student's depth and width, but the student has {} layers of "
                "width {}, the teacher {} of {}".format(*sizes[0], *sizes[1])
            )
        self.stage = stage

    def step(self, input_ids: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        student, teacher, mask = self.student, self.teacher, labels != -100
        s_ctx, t_ctx = student.context(input_ids), teacher.context(input_ids)
        total = torch.zeros_like(scale)
        with torch.no_grad():
            x = teacher.embed(input_ids)
        last = len(student.layers) - 1
        s_layer: Any
        t_layer: Any
        for i, (s_layer, t_layer) in enumerate(zip(student.layers, teacher.layers, strict=True)):
            with torch.no_grad():
                t_out, t_mix = t_layer.parts(x, t_ctx)
            s_out, s_mix = s_layer.parts(x.to(student.embed.weight.dtype), s_ctx)
            x = t_out
            if i == last:
                s_out, t_out = student.norm(s_out), teacher.norm(t_out)
            loss = hidden_loss(s_out, t_out, mask, self.stage.hidden, "sum")
            if self.stage.mixer_weight:
                mixers = hidden_loss(s_mix, t_mix, mask, self.stage.hidden, "sum")
                loss = loss + self.stage.mixer_weight * mixers
            loss = loss * scale
            torch.autograd.backward(loss)
            total += loss.detach()
        return total


def objective(student: CausalLM, teacher: CausalLM, stage: ILD | KD) -> Objective:
    """The objective of a stage."""
    if isinstance(stage, ILD):
        return ILDObjective(student, teacher, stage)
    return KDObjective(student, teacher, stage)


def trains(name: str, what: Train) -> bool:
    """Whether a parameter of this name trains."""
    if what == "all":
        return True
    return name.startswith("layers.") and (what == "layers" or ".mixer." in name)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices, but not the parameters of a scan."""
    return parameter.ndim > 1 and name.rpartition(".")[-1] not in ("A_log", "D", "dt_bias")
