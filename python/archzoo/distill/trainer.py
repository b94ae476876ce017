"""The training loop of distillation: any number of processes, exact resume, no pickle."""

from __future__ import annotations

import atexit
import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import exp, isfinite, log
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from archzoo import checkpoint
from archzoo.checkpoint.training import whole
from archzoo.data import Pack, PackedDataset, TokenBlocks
from archzoo.distill.stages import ILD, KD, Recipe, decays, objective, trains
from archzoo.errors import ArchzooError, CheckpointError, InputError
from archzoo.model import CausalLM
from archzoo.ops.linear_loss import linear_cross_entropy

logger = logging.getLogger(__name__)
Metrics = dict[str, Any]
EVAL_TOKENS = 8192


@runtime_checkable
class Blocks(Protocol):
    """A source of training sequences, such as `archzoo.data.TokenBlocks`."""

    seq_len: int

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def distill(
    student: CausalLM,
    teacher: CausalLM,
    data: npt.ArrayLike | Blocks | Pack | None,
    recipe: Recipe | ILD | KD,
    out_dir: str | Path,
    *,
    eval_tokens: npt.ArrayLike | None = None,
    resume: bool = True,
    progress: bool = True,
    tensorboard: bool = False,
) -> list[Metrics]:
    """Train `student` in place on `teacher`, stage by stage.

    Each stage writes `out_dir/<stage>/metrics.jsonl` (one line a step) and, with `save_every`, a folder
    `checkpoint`. Started again it goes on from there; on a CPU the losses are then the same to the bit.

    Args:
        student: any zoo model; trained in its own dtype.
        teacher: a model with the same vocabulary; for "ild" also of the same depth and width.
        data: token ids [N] or a pack, cut into the stages' sequence lengths, or blocks of the stage's length.
            None: the pack that the recipe names.
        recipe: all stages of a recipe, or one stage.
        out_dir: created if missing.
        eval_tokens: held-out token ids for `eval_every`.
        resume: False ignores checkpoints and starts anew.
        progress: show a progress bar.
        tensorboard: also write TensorBoard events (needs the package) into the stage's folder.

    Returns:
        One entry a step: step, stage, loss, lr, tokens, tokens_per_second, grad_norm and, where it was
        evaluated, eval_ce (nats per token).
    """
    stages = recipe.stages if isinstance(recipe, Recipe) else (recipe,)
    if data is None:
        if not isinstance(recipe, Recipe) or recipe.pack is None:
            raise InputError("no data: give token ids or a pack, or a recipe that names one")
        data = Pack(recipe.pack)
    metrics: list[Metrics] = []
    for stage in stages:
        run = _Run(student, teacher, data, stage, Path(out_dir) / stage.name, eval_tokens)
        metrics += run(resume, progress, tensorboard)
    return metrics


@torch.no_grad()
def perplexity(
    model: CausalLM, tokens: npt.ArrayLike, seq_len: int, max_tokens: int = EVAL_TOKENS
) -> tuple[float, float]:
    """(perplexity, bits per token) over the first `max_tokens` of `tokens`, in windows of `seq_len`."""
    blocks = TokenBlocks(tokens, seq_len)
    device, training = model.embed.weight.device, model.training
    count = max(1, min(len(blocks), max_tokens // seq_len))
    total = 0.0
    model.eval()
    for i in range(count):
        row = blocks[i].to(device)[None]
        total += linear_cross_entropy(model.backbone(row[:, :-1]), model.head_weight, row[:, 1:]).item()
    model.train(training)
    return exp(total / count), total / count / log(2)


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _close_process_group() -> None:
    """One of gloo left open aborts the process now and then: its threads outlive the interpreter."""
    # NCCL would wait for the other processes, also where this one has failed.
    if _has_process_group() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


class _Run:
    """One stage of one student."""

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        data: npt.ArrayLike | Blocks | Pack,
        stage: ILD | KD,
        folder: Path,
        eval_tokens: npt.ArrayLike | None,
    ) -> None:
        from accelerate import Accelerator

        opened_by_caller = _has_process_group()
        self.accelerator = Accelerator()
        if not opened_by_caller and _has_process_group():
            atexit.register(_close_process_group)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sharded: bool = self.accelerator.is_fsdp2
        if self.sharded and isinstance(stage, ILD):
            raise InputError("ild works layer by layer and cannot be sharded; use plain data parallelism")
        self.stage, self.folder, self.eval_tokens = stage, folder, eval_tokens
        self.steps = stage.total_steps(self.world)
        if isinstance(data, Pack) and data.vocab_size > student.config.vocab_size:
            raise InputError(
                f"{data.folder} has {data.vocab_size} token ids, the student {student.config.vocab_size}"
            )
        self.blocks = _blocks(data, stage, self.rank, self.world)
        self.step = 0
        device = self.accelerator.device
        self.student, self.teacher = student.to(device), teacher.to(device)
        if {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}:
            raise InputError("student and teacher share parameters: training would change the teacher")

    def __call__(self, resume: bool, progress: bool, tensorboard: bool) -> list[Metrics]:
        with _prepared(self.student, self.teacher, self.stage):
            self._build()
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume:
                self._load()
            metrics = self._past_metrics()
            with self._log(metrics, progress, tensorboard) as log_step:
                while self.step < self.steps:
                    metrics.append(self._train_step())
                    self._evaluate(metrics)
                    log_step(metrics[-1])
                    every = self.stage.save_every
                    if every and (self.step % every == 0 or self.step == self.steps):
                        self._save()
        return metrics

    def _build(self) -> None:
        """The objective, and the optimizer of its trainable parameters in two groups."""
        stage = self.stage
        self.objective: Any = objective(self.student, self.teacher, stage)
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                groups[decays(name, parameter)].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": stage.weight_decay if decay else 0.0}
                for decay, params in groups.items()
                if params
            ],
            lr=stage.lr,
            betas=stage.betas,
            fused=True,
        )
        if self.sharded:
            self.objective, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
            self.student = self.objective.student

    def _train_step(self) -> Metrics:
        stage, start = self.stage, time.perf_counter()
        torch.manual_seed(_seed(stage.seed, self.step, self.rank))  # so there is no generator state to save
        device = self.accelerator.device
        batches = [self.blocks.next_batch(stage.batch_size) for _ in range(stage.accumulation)]
        moved = [(ids.to(device), labels.to(device)) for ids, labels in batches]
        scale = self._scale([labels for _, labels in moved])
        loss = torch.zeros((), device=device)
        for i, (ids, labels) in enumerate(moved):
            with self._sync(i == len(moved) - 1), self._autocast():
                loss += self.objective.step(ids, labels, scale)
        if self.world > 1:
            loss = self._reduce_gradients(loss)
        lr = stage.lr_at(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(params, stage.clip)).item()
        value = loss.item()
        if not isfinite(value + norm):  # before the weights take it in
            raise ArchzooError(
                f"stage '{stage.name}', step {self.step + 1}: the loss is {value}, the gradient norm {norm}"
            )
        self.optimizer.step()
        if stage.router_bias_rate:
            self.student.update_router_bias(stage.router_bias_rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = stage.batch_size * stage.seq_len * stage.accumulation * self.world
        return {
            "step": self.step,
            "stage": stage.name,
            "loss": value,
            "lr": lr,
            "tokens": tokens * self.step,
            "tokens_per_second": tokens / (time.perf_counter() - start),
            "grad_norm": norm,
        }

    def _scale(self, labels: list[Tensor]) -> Tensor:
        """What a summed loss is multiplied by: the normaliser of the whole step, over all processes."""
        if self.stage.reduction == "batch":
            count = torch.tensor(float(sum(len(y) for y in labels)), device=labels[0].device)
        else:
            count = torch.stack([(y != -100).sum() for y in labels]).sum().float()
        if self.world > 1:
            count = self.accelerator.reduce(count, "sum")
        return 1 / count.clamp_min(1)

    def _reduce_gradients(self, loss: Tensor) -> Tensor:
        """Sum gradients over processes. FSDP has averaged its own."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.sharded:
                    p.grad.mul_(self.world)
                else:
                    p.grad = self.accelerator.reduce(p.grad, "sum")
        total: Tensor = self.accelerator.reduce(loss, "sum")
        return total

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if self.sharded and not last:
            context: AbstractContextManager[Any] = self.accelerator.no_sync(self.objective)
            return context
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.stage.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    # Evaluation

    def _evaluate(self, metrics: list[Metrics]) -> None:
        """Add the held-out cross-entropy to the last entry; warn when it rises while the loss falls."""
        every = self.stage.eval_every
        if self.eval_tokens is None or not every or (self.step % every and self.step != self.steps):
            return
        if self.sharded:
            self.objective.unshard()  # embedding and head; the layers gather themselves
        with self._autocast():
            metrics[-1]["eval_ce"] = log(perplexity(self.student, self.eval_tokens, self.stage.seq_len)[0])
        if self.sharded:
            self.objective.reshard()
        marks = [i for i, entry in enumerate(metrics) if "eval_ce" in entry]
        if len(marks) > 2 and isinstance(self.stage, KD):
            a, b, c = marks[-3:]
            before, after = (
                sum(entry["loss"] for entry in metrics[lo + 1 : hi + 1]) / (hi - lo)
                for lo, hi in ((a, b), (b, c))
            )
            if after < before and metrics[c]["eval_ce"] > metrics[b]["eval_ce"]:
                logger.warning(
                    "stage '%s', step %d: the distillation loss falls (%.4f to %.4f) while the held-out "
                    "cross-entropy rises (%.4f to %.4f); stop here, or use more or fresh data [2502.02671]",
                    self.stage.name, self.step, before, after, metrics[b]["eval_ce"], metrics[c]["eval_ce"],
                )  # fmt: skip

    # Checkpoints

    def _save(self) -> None:
        """Everything that the next step depends on; a finished stage keeps only the weights."""
        optimizer = None if self.step == self.steps else self.optimizer
        extra = {"step": self.step, "stage": self._identity()}
        contents = checkpoint.training_state(self.student, optimizer, extra=extra, data=self.blocks)
        if self.accelerator.is_main_process:
            checkpoint.save(contents, self.folder / "checkpoint")
        self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        folder = self.folder / "checkpoint"
        if not folder.is_dir():
            return
        extra = checkpoint.read_state(folder)["extra"]
        if extra["stage"] != (mine := self._identity()):
            keys = [key for key in mine if mine[key] != extra["stage"].get(key)]
            changes = "; ".join(f"{key} was {extra['stage'].get(key)}, is {mine[key]}" for key in keys)
            raise CheckpointError(f"{folder}: made by another recipe: {changes}")
        optimizer = None if extra["step"] == self.steps else self.optimizer
        checkpoint.load_training(folder, self.student, optimizer, data=self.blocks)
        self.step = extra["step"]

    def _identity(self) -> Metrics:
        """What must not change between a checkpoint and its continuation, as JSON holds it."""
        stage = self.stage.model_dump(mode="json", exclude={"eval_every", "save_every"})
        return stage | {"processes": self.world}

    # Logs

    def _past_metrics(self) -> list[Metrics]:
        """The lines up to the checkpoint; what a killed run wrote after it is dropped."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[: self.step] if path.exists() else []
        return [json.loads(line) for line in lines]

    @contextmanager
    def _log(self, past: list[Metrics], progress: bool, tensorboard: bool) -> Iterator[Any]:
        """A function that writes one entry to the file, the progress bar and TensorBoard."""
        if not self.accelerator.is_main_process:
            yield lambda entry: None
            return
        writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder), purge_step=self.step)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} tokens/s"),
            TimeRemainingColumn(),
            disable=not progress,
        )
        task = bar.add_task(self.stage.name, total=self.steps, completed=self.step, loss=0.0, rate=0.0)
        with bar, open(self.folder / "metrics.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in past)

            def write(entry: Metrics) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                bar.update(task, advance=1, loss=entry["loss"], rate=entry["tokens_per_second"])
                for key in ("loss", "lr", "tokens_per_second", "grad_norm", "eval_ce"):
                    if writer is not None and key in entry:
                        writer.add_scalar(key, entry[key], entry["step"])

            try:
                yield write
            finally:
                if writer is not None:
                    writer.close()


@contextmanager
def _prepared(student: CausalLM, teacher: CausalLM, stage: ILD | KD) -> Iterator[None]:
    """Student in training mode with only the stage's parameters trainable, teacher in eval; undone after."""
    modes, checkpointing = (student.training, teacher.training), student.gradient_checkpointing
    required = [(p, p.requires_grad) for p in student.parameters()]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains(name, stage.train))
    student.gradient_checkpointing = isinstance(stage, KD) and stage.gradient_checkpointing
    student.train()
    teacher.eval()
    try:
        yield
    finally:
        student.train(modes[0])
        teacher.train(modes[1])
        student.gradient_checkpointing = checkpointing
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def _blocks(data: npt.ArrayLike | Blocks | Pack, stage: ILD | KD, rank: int, world: int) -> Blocks:
    if isinstance(data, Blocks):
        if data.seq_len != stage.seq_len or stage.data != (0.0, 1.0):
            raise InputError(
                f"stage '{stage.name}' wants sequences of {stage.seq_len} tokens from {list(stage.data)} of "
                f"the data, but the given blocks have {data.seq_len}: pass the token array instead"
            )
        return data
    if isinstance(data, Pack):
        return PackedDataset(data, stage.seq_len, stage.seed, rank, world, part=stage.data)
    tokens: Any = data
    first, last = (round(f * len(tokens)) for f in stage.data)
    return TokenBlocks(tokens[first:last], stage.seq_len, stage.seed, rank, world)


def _seed(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) % (1 << 63)
