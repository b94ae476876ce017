"""The training loop: objectives, normalisation, resume to the bit, recipes."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from archzoo import ops, zoo
from archzoo.data import TokenBlocks
from archzoo.distill import ILD, KD, Recipe, distill, hidden_loss, perplexity, token_loss, trainer
from archzoo.distill.stages import decays, objective, trains
from archzoo.errors import ArchzooError, CheckpointError, ConfigError, InputError
from archzoo.model import CausalLM

DENSE = zoo.config("smollm2-135m").tiny()
MAMBA = zoo.config("mamba2-130m")
TOKENS = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16)
SHORT: dict[str, Any] = {"steps": 8, "seq_len": 16, "batch_size": 2, "lr": 1e-3}


def model(seed: int, layers: int = 2) -> CausalLM:
    built = zoo.build(DENSE.override(f"layers.count={layers}"), seed=seed)
    with (
        torch.no_grad()
    ):  # logits of a fresh model are nearly uniform: sharpen them, so that losses are not tiny
        built.embed.weight *= 5
    return built


def ild(**changes: Any) -> ILD:
    return ILD(**{"name": "ild", **SHORT, **changes})


def kd(**changes: Any) -> KD:
    return KD(**{"name": "kd", **SHORT, **changes})


def losses(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in entries]


def run(student: CausalLM, stage: Any, out: Path, data: Any = TOKENS, **kwargs: Any) -> list[dict[str, Any]]:
    return distill(student, model(1), data, stage, out, progress=False, **kwargs)


def gradients(
    student: CausalLM, teacher: CausalLM, stage: Any, rows: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """One objective step by hand: loss and gradients, mean over tokens."""
    ids, labels = TokenBlocks(TOKENS, 16).next_batch(rows)
    student.zero_grad(set_to_none=True)
    loss = objective(student, teacher, stage).step(ids, labels, torch.tensor(1 / labels.numel()))
    return loss, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


# Objectives (hybrid sheet, check 14)


@pytest.mark.parametrize("hidden", ["l2", "mse"])
def test_ild_follows_the_formula(hidden: Any) -> None:
    """Loss and gradients equal those of one sum over layers, each on the teacher's hidden state."""
    student, teacher = model(2), model(1)
    loss, grads = gradients(student, teacher, ild(hidden=hidden, mixer_weight=0.7))
    ids, _ = TokenBlocks(TOKENS, 16).next_batch(3)
    with torch.no_grad():
        states, mixers, ctx = [teacher.embed(ids)], [], teacher.context(ids)
        for layer in teacher.layers:
            out, mixed = layer.parts(states[-1], ctx)  # type: ignore[operator]
            states.append(out)
            mixers.append(mixed)
        targets = [*states[1:-1], teacher.norm(states[-1])]
    want = torch.zeros(())
    for i, layer in enumerate(student.layers):
        out, mixed = layer.parts(states[i], student.context(ids))  # type: ignore[operator]
        out = student.norm(out) if i == len(student.layers) - 1 else out
        want = want + hidden_loss(out, targets[i], kind=hidden)
        want = want + 0.7 * hidden_loss(mixed, mixers[i], kind=hidden)
    torch.testing.assert_close(loss, want)
    assert want > 1e-3
    names = list(grads)
    assert "norm.weight" in names
    assert "embed.weight" not in names
    parameters = dict(student.named_parameters())
    for name, grad in zip(names, torch.autograd.grad(want, [parameters[n] for n in names]), strict=True):
        torch.testing.assert_close(grads[name], grad)


def test_ild_layers_do_not_see_each_other() -> None:
    student, teacher = model(2), model(1)
    before = gradients(student, teacher, ild())[1]
    with torch.no_grad():
        for parameter in student.layers[0].parameters():
            parameter.mul_(1.5)
    after = gradients(student, teacher, ild())[1]
    for name, grad in before.items():
        assert torch.equal(grad, after[name]) == (not name.startswith("layers.0.")), name


def test_equal_models_have_nothing_to_learn() -> None:
    teacher = model(1)
    student = copy.deepcopy(teacher)
    with ops.backend("reference"):  # other backends may round differently with and without gradients
        loss, grads = gradients(student, teacher, ild())
    assert loss == 0
    assert all(grad.abs().max() == 0 for grad in grads.values())
    assert gradients(student, teacher, ild())[0] < 1e-5
    loss, grads = gradients(student, teacher, kd())
    assert abs(loss) < 1e-6
    assert max(grad.abs().max() for grad in grads.values()) < 1e-6


def test_ild_keeps_one_layer_in_memory() -> None:
    """The bytes saved for backward at any time do not grow with depth."""

    def peak(layers: int) -> int:
        live, highest = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal live, highest
                self.tensor, self.bytes = tensor, tensor.nelement() * tensor.element_size()
                live += self.bytes
                highest = max(highest, live)

            def __del__(self) -> None:
                nonlocal live
                live -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            gradients(model(2, layers), model(1, layers), ild())
        return highest

    two = peak(2)
    assert two > 0
    assert peak(5) <= two


def test_kd_is_the_model_level_loss() -> None:
    student, teacher = model(2), model(1)
    loss, grads = gradients(student, teacher, kd(temperature=2.0, ce_weight=0.5))
    ids, labels = TokenBlocks(TOKENS, 16).next_batch(3)
    logits = student(ids).logits
    want = token_loss(logits, teacher(ids).logits, labels, temperature=2.0)
    want = want + 0.5 * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, want)
    parameters = dict(student.named_parameters())
    for name, grad in zip(parameters, torch.autograd.grad(want, list(parameters.values())), strict=True):
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["mamba2"])
def test_ild_teaches_another_mixer(mixer: str, tmp_path: Path) -> None:
    """A state-space student comes closer to an attention teacher, and only its mixers move."""
    spec = MAMBA.tiny().specs[0].mixer.model_dump()
    data = DENSE.model_dump()
    data["layers"]["default"]["mixer"] = spec
    data["layers"]["override"] = []
    student = zoo.build(type(DENSE).from_dict(data), seed=2)
    assert student.config.specs[0].mixer.kind == mixer
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    stage = ild(train="mixers", steps=30, lr=5e-3, seq_len=32)
    found = losses(run(student, stage, tmp_path))
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:2])
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) == (".mixer." not in name), name
        assert p.requires_grad


# Normalisation


class Masked(TokenBlocks):
    """Blocks in which sequences have very different numbers of labels."""

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        ids, labels = super().next_batch(batch_size)
        cut = labels[:, :1] % 16
        return ids, torch.where(torch.arange(labels.shape[1]) < cut, -100, labels)


@pytest.mark.parametrize("make", [ild, kd])
@pytest.mark.parametrize("reduction", ["token", "batch"])
def test_accumulation_equals_a_larger_batch(make: Any, reduction: Any, tmp_path: Path) -> None:
    """Also with masks: the normaliser is that of the whole step, not a mean of means."""
    whole, parts = model(2), model(2)
    blocks = [Masked(TOKENS, 16) for _ in range(2)]
    want = run(whole, make(batch_size=4, reduction=reduction), tmp_path / "a", blocks[0])
    got = run(parts, make(batch_size=1, accumulation=4, reduction=reduction), tmp_path / "b", blocks[1])
    assert losses(got) == pytest.approx(losses(want), rel=1e-4)
    assert got[0]["loss"] == pytest.approx(want[0]["loss"], rel=1e-6)
    assert [e["tokens"] for e in got] == [64 * (i + 1) for i in range(8)]
    if make is kd:
        ids, labels = Masked(TOKENS, 16).next_batch(4)
        first = token_loss(model(2)(ids).logits, model(1)(ids).logits, labels, reduction=reduction)
        assert want[0]["loss"] == pytest.approx(first.item(), rel=1e-5)
    with pytest.raises(InputError, match="have 16"):
        run(model(2), make(seq_len=32), tmp_path, blocks[0])


def test_gradient_checkpointing_and_bf16(tmp_path: Path) -> None:
    plain = losses(run(model(2), kd(), tmp_path / "a"))
    assert losses(run(model(2), kd(gradient_checkpointing=True), tmp_path / "b")) == pytest.approx(
        plain, rel=1e-5
    )
    half = losses(run(model(2), kd(mixed_precision="bf16"), tmp_path / "c"))
    assert half != plain
    assert half == pytest.approx(plain, rel=0.05)


# Resume


class KilledError(Exception):
    pass


class Mortal(TokenBlocks):
    """Dies when it is asked for its n-th batch."""

    left = 1000

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise KilledError
        return super().next_batch(batch_size)


def noisy(seed: int) -> CausalLM:
    """A model with dropout, so that the random generator matters."""
    built = model(seed)
    for layer in built.layers:
        layer.register_forward_hook(lambda m, _, out: F.dropout(out, 0.2, m.training))
        layer.mixer.register_forward_hook(lambda m, _, out: F.dropout(out, 0.2, m.training))  # type: ignore[union-attr]
    return built


@pytest.mark.parametrize("make", [ild, kd])
def test_resume_is_exact(make: Any, tmp_path: Path) -> None:
    """Killed in step 6 after a checkpoint at step 4: as if it had never stopped."""
    stage = make(accumulation=2, save_every=2, weight_decay=0.1, clip=0.5)
    whole = noisy(2)
    want = run(whole, stage, tmp_path / "a")
    mortal = Mortal(TOKENS, 16)
    mortal.left = 2 * 5 + 1
    torch.manual_seed(123)
    with pytest.raises(KilledError):
        run(noisy(2), stage, tmp_path / "b", mortal)
    with open(tmp_path / "b" / stage.name / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "los')  # a line cut short by the kill
    torch.manual_seed(456)
    again = noisy(3)
    got = run(again, stage, tmp_path / "b")
    assert losses(got) == losses(want)
    assert [e["grad_norm"] for e in got] == [e["grad_norm"] for e in want]
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        if name != "embed.weight" or make is kd:
            assert torch.equal(a, b), name
    lines = (tmp_path / "b" / stage.name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == got
    # A finished stage only loads its weights.
    third = noisy(4)
    assert run(third, stage, tmp_path / "b") == got
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    run(model(2), kd(save_every=3, steps=4), tmp_path)
    files = [p for p in (tmp_path / "kd").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl"}
    assert json.loads((tmp_path / "kd/checkpoint/state.json").read_text())["extra"]["step"] == 4
    with pytest.raises(CheckpointError, match=r"lr was 0.001, is 0.002"):
        run(model(2), kd(save_every=3, steps=4, lr=2e-3), tmp_path)
    entries = run(model(2), kd(save_every=3, steps=4, lr=2e-3), tmp_path, resume=False)
    assert len(entries) == 4
    other = zoo.build(DENSE.override("vocab_size=255"), seed=0)
    with pytest.raises(CheckpointError, match=r"embed.weight"):
        distill(other, model(1), TOKENS % 255, kd(save_every=3, steps=4, lr=2e-3), tmp_path, progress=False)


# The loop around the objectives


def test_perplexity() -> None:
    net = model(2).train()
    ppl, bits = perplexity(net, TOKENS, 32, max_tokens=96)
    rows = torch.from_numpy(TOKENS[: 96 + 1].astype(np.int64))
    logits = net(rows[:-1].view(3, 32)).logits
    want = F.cross_entropy(logits.flatten(0, 1), rows[1:]).item()
    assert bits == pytest.approx(want / math.log(2), rel=1e-5)
    assert ppl == pytest.approx(math.exp(want), rel=1e-4)
    assert net.training


@pytest.mark.parametrize(("last", "lr", "warns"), [(3, 1e-3, True), (1, 1e-3, False), (3, 1e-30, False)])
def test_teacher_hacking_is_reported(
    last: float,
    lr: float,
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only a KD loss that falls (the same sequence again and again) with a held-out loss that rises."""
    held_out: Iterator[float] = iter(np.linspace(2, last, 9))
    monkeypatch.setattr(trainer, "perplexity", lambda *_: (math.exp(next(held_out)), 0.0))
    stage = kd(steps=12, eval_every=3, lr=lr)
    with caplog.at_level(logging.WARNING):
        entries = run(model(2), stage, tmp_path, TOKENS[:17], eval_tokens=TOKENS)
    assert [e["step"] for e in entries if "eval_ce" in e] == [3, 6, 9, 12]
    assert (losses(entries)[-1] < 0.8 * losses(entries)[0]) == (lr > 1e-9)
    assert ("held-out cross-entropy rises" in caplog.text) == warns


def test_a_recipe_runs_its_stages_in_order(tmp_path: Path) -> None:
    recipe = Recipe(stages=(ild(steps=2, data=(0, 0.5)), kd(steps=3, data=(0.5, 1))))
    entries = run(model(2), recipe, tmp_path, tensorboard=True)
    assert [(e["stage"], e["step"]) for e in entries] == [
        ("ild", 1),
        ("ild", 2),
        ("kd", 1),
        ("kd", 2),
        ("kd", 3),
    ]
    assert list((tmp_path / "kd").glob("events.out.tfevents*"))
    assert set(entries[0]) == {"step", "stage", "loss", "lr", "tokens", "tokens_per_second", "grad_norm"}
    assert recipe.stage("kd") is recipe.stages[1]
    with pytest.raises(InputError, match="ild, kd"):
        recipe.stage("sft")


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    student = model(2)
    before = copy.deepcopy(student.state_dict())
    teacher = model(1)
    torch.nn.init.constant_(teacher.norm.weight, float("nan"))
    with pytest.raises(ArchzooError, match="step 1: the loss is nan"):
        distill(student, teacher, TOKENS, kd(), tmp_path, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


def test_bad_models_are_refused(tmp_path: Path) -> None:
    teacher = model(1)
    with pytest.raises(InputError, match="3 layers of width 64, the teacher 2"):
        run(model(2, layers=3), ild(), tmp_path)
    student = model(2)
    student.layers[0] = teacher.layers[0]
    with pytest.raises(InputError, match="share parameters"):
        distill(student, teacher, TOKENS, kd(), tmp_path, progress=False)


WORKER = """
import atexit, sys, json, torch, numpy as np
atexit.register(lambda: print(json.dumps(torch.distributed.is_initialized())))  # the last to run
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import TOKENS, Masked, ild, kd, losses, model, run
import os
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
found = []
for make in (ild, kd):
    blocks = Masked(TOKENS, 16, rank=rank, world_size=world)
    found.append(losses(run(model(2), make(batch_size=1, accumulation=2), Path({out!r}), blocks)))
print(json.dumps(found))
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Data parallelism with masks: the same losses as one process with the whole batch."""
    want = [losses(run(model(2), make(batch_size=4), tmp_path, Masked(TOKENS, 16))) for make in (ild, kd)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path / "two"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    for output in outputs:
        found, group_open = map(json.loads, output.splitlines()[-2:])
        assert not group_open, "a group left open now and then aborts the exit"
        for got, expected in zip(found, want, strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


# Recipes


def test_schedules() -> None:
    def curve(**changes: Any) -> list[float]:
        stage = kd(lr=1.0, steps=100, **changes)
        return [stage.lr_at(i, 100) for i in range(100)]

    cosine = curve(schedule="cosine", warmup=0.1)
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[99] < 1e-3
    assert curve(schedule="constant", warmup=0) == [1] * 100
    wsd = curve(schedule="wsd", warmup=0.05, decay=0.2)
    assert wsd[5:81] == [1] * 76
    assert wsd[81:] == pytest.approx([i / 20 for i in range(19, 0, -1)])


def test_parameter_rules() -> None:
    names = {
        "embed.weight": ("all", True),
        "layers.3.mixer.in_proj.weight": ("mixers", True),
        "layers.3.mixer.A_log": ("mixers", False),
        "layers.3.mixer.dt_bias": ("mixers", False),
        "layers.3.mixer_norm.weight": ("layers", False),
        "layers.3.ffn.down.weight": ("layers", True),
        "norm.weight": ("all", False),
    }
    order = ("mixers", "layers", "all")
    for name, (first, decay) in names.items():
        assert [trains(name, what) for what in order] == [i >= order.index(first) for i in range(3)], name  # type: ignore[arg-type]
        matrix = name.endswith(
            ("proj.weight", "down.weight", "embed.weight", "A_log")
        )  # Mamba-1's A_log is one
        assert decays(name, torch.empty(2, 2) if matrix else torch.empty(2)) == decay, name


def test_recipe_files_and_errors(tmp_path: Path) -> None:
    for path in sorted((zoo.CONFIGS / "recipes").glob("*.toml")):
        assert Recipe.from_toml(path).stages
    path = tmp_path / "bad.toml"
    good = '[[stages]]\nkind = "kd"\nname = "a"\nsteps = 1\nseq_len = 8\nbatch_size = 1\nlr = 1e-3\n'
    path.write_text(good)
    assert Recipe.from_toml(path).stages == (KD(name="a", steps=1, seq_len=8, batch_size=1, lr=1e-3),)
    for text, message in [
        (good + "learning_rate = 1\n", r"bad.toml: stages.0.kd.learning_rate"),
        (good + "tokens = 8\n", "either steps or tokens"),
        (good + good, "names must differ: a, a"),
        (good.replace('"kd"', '"sft"'), "'ild', 'kd'"),
        (good + "data = [0.5, 0.5]\n", "from < to"),
        (good + "[stages.loss]\nkind = 'jsd'\nbeta = 2\n", r"stages.0.kd.loss.jsd.beta"),
        (good + "lr", "not valid TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Recipe.from_toml(path)
    with pytest.raises(ConfigError, match="no such file"):
        Recipe.from_toml(tmp_path / "none.toml")
    assert ild(tokens=100, steps=None).total_steps() == 4
    assert ild(tokens=100, steps=None, accumulation=2).total_steps(world_size=2) == 1
    with pytest.raises(ValidationError, match="loss"):
        ild(loss="jsd")
