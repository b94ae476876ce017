"""Saving while training goes on, which saves are kept, training state, and torch.distributed.checkpoint."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import archzoo
from archzoo import CheckpointError, checkpoint
from archzoo.checkpoint import AsyncSaver, Retention
from archzoo.checkpoint.distributed import from_dcp, to_dcp
from archzoo.data import TokenBlocks
from archzoo.errors import InputError


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# --- in the background -----------------------------------------------------------------------------


def test_training_may_go_on_at_once(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("deepseek-moe-16b").tiny())
    archzoo.save(model, tmp_path / "expected")
    with AsyncSaver() as saver:
        for step in range(3):
            saver.save(model, tmp_path / f"step-{step}")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            if step == 0:
                expected = model.state_dict()
                expected = {name: tensor.clone() for name, tensor in expected.items()}
    assert files(tmp_path / "step-0") == files(tmp_path / "expected")
    again = archzoo.load(tmp_path / "step-1").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_save_returns_before_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archzoo.checkpoint import saver as module

    gate, running = threading.Event(), []
    real = module.write_contents

    def slow(*args: Any) -> None:
        running.append(args[1])
        assert gate.wait(30)
        real(*args)

    monkeypatch.setattr(module, "write_contents", slow)
    saver = AsyncSaver()
    saver.save({"a": torch.ones(3)}, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    second = threading.Thread(target=saver.save, args=({"a": torch.zeros(3)}, tmp_path / "b"))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # one at a time
    assert running == [tmp_path / "a"]
    gate.set()
    second.join()
    saver.wait()
    assert checkpoint.load(tmp_path / "a")["a"].tolist() == [1, 1, 1]
    assert checkpoint.load(tmp_path / "b")["a"].tolist() == [0, 0, 0]


def test_an_error_is_raised_by_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = AsyncSaver()
    saver.save({"a": torch.ones(3)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file: expected a folder"):
        saver.save({"a": torch.ones(3)}, tmp_path / "b")
    saver.save({"a": torch.ones(3)}, tmp_path / "b")
    saver.wait()
    saver.wait()
    saver.save({"a": torch.ones(3, dtype=torch.uint16)}, tmp_path / "c")
    with pytest.raises(InputError, match="'a': dtype"):
        saver.wait()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=2), [900, 1000]),
        (Retention(last=1, every=300), [0, 300, 600, 900, 1000]),
        (Retention(last=20), list(range(0, 1001, 100))),
    ],
)
def test_retention(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "other-5").mkdir()
    (tmp_path / ".step-7.removed").mkdir()  # a process died while it removed this
    with AsyncSaver(retention) as saver:
        for step in range(0, 1001, 100):
            saver.save({"a": torch.tensor(step)}, tmp_path / f"step-{step}")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"step-{step}" for step in kept} | {"step-notes", "other-5"}
    for step in kept:
        assert checkpoint.load(tmp_path / f"step-{step}")["a"] == step


def test_bad_retention(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        Retention(last=0)
    with pytest.raises(InputError, match="a step's number"):
        Retention(last=1).prune(tmp_path / "model")


# --- training state --------------------------------------------------------------------------------


class Run:
    """A small training loop with everything that has a state, dropout included."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 1))
        decay, plain = [p for p in self.model.parameters() if p.dim() > 1], [self.model[0].bias]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain}, {"params": [self.model[3].bias]}]
        self.optimizer: torch.optim.Optimizer = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2),
            "fused": lambda: torch.optim.AdamW(groups, lr=1e-2, fused=True),
            "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
            "adagrad": lambda: torch.optim.Adagrad(groups, lr=1e-2),
        }[kind]()
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 1e-2, total_steps=40, cycle_momentum=kind != "adagrad"
        )
        self.data = TokenBlocks(np.arange(900), 8, seed=2)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            ids, _ = self.data.next_batch(4)
            noise = float(torch.rand(())) + random.random() + float(np.random.rand())
            loss = (self.model(ids / 900) - noise).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self, **extra: Any) -> checkpoint.Contents:
        return checkpoint.training_state(
            self.model, self.optimizer, rng=True, extra=extra, scheduler=self.scheduler, data=self.data
        )

    def load(self, folder: Path) -> dict[str, Any]:
        return checkpoint.load_training(
            folder, self.model, self.optimizer, rng=True, scheduler=self.scheduler, data=self.data
        )


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "adagrad"])
def test_training_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    run = Run(kind)
    run.steps(5)
    with AsyncSaver() as saver:
        saver.save(run.state(step=5), tmp_path / "step-5")
        expected = run.steps(6)
    assert {path.suffix for path in (tmp_path / "step-5").iterdir()} == {".json", ".safetensors"}
    again = Run(kind)
    again.steps(2)
    assert again.load(tmp_path / "step-5") == {"step": 5}
    assert again.steps(6) == expected
    for group, other in zip(run.optimizer.param_groups, again.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


def test_nothing_is_changed_by_a_state_that_does_not_fit(tmp_path: Path) -> None:
    run = Run("adamw")
    run.steps(2)
    checkpoint.save(run.state(), tmp_path / "s")
    stored = checkpoint.load(tmp_path / "s")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.steps(1)
    after = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert not torch.equal(before["0.weight"], after["0.weight"])
    faults: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({"model.0.weight": torch.ones(2)}, {}, r"'model\.0\.weight': expected \[16, 8\], found \[2\]"),
        ({}, {"sampler": run.data}, "expected the state of 'sampler', found none"),
    ]
    for change, parts, message in faults:
        contents = checkpoint.Contents(
            stored | change, {"state.json": (tmp_path / "s/state.json").read_bytes()}
        )
        checkpoint.save(contents, tmp_path / "bad")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_training(tmp_path / "bad", run.model, run.optimizer, **parts)
    sgd = torch.optim.SGD(run.model.parameters())
    with pytest.raises(CheckpointError, match="groups hold other parameters"):
        checkpoint.load_training(tmp_path / "s", run.model, sgd)
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in after.items())
    checkpoint.save({"a": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds no training state"):
        run.load(tmp_path / "plain")


# --- torch.distributed.checkpoint ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_to_dcp_and_back(tmp_path: Path) -> None:
    run = Run("adamw")
    run.steps(3)
    checkpoint.save(run.state(step=3), tmp_path / "a", max_shard_size=500)
    to_dcp(tmp_path / "a", tmp_path / "dcp")
    expected = checkpoint.load(tmp_path / "a")
    theirs = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(theirs, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())
    assert from_dcp(tmp_path / "dcp", tmp_path / "b", max_shard_size=500) == {}
    for name, tensor in checkpoint.load(tmp_path / "b").items():
        assert torch.equal(tensor, expected[name])
    following = run.steps(2)
    again = Run("adamw")
    assert again.load(tmp_path / "b") == {"step": 3}
    assert again.steps(2) == following


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_dcp_wrote(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("smollm2-135m").tiny(), dtype=torch.bfloat16)
    state = {"model": model.state_dict(), "step": 7, "lr": [0.1, 0.2]}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    values = from_dcp(tmp_path / "dcp", tmp_path / "m")
    assert values == {"step": 7, "lr": [0.1, 0.2]}
    stored = checkpoint.load(tmp_path / "m")
    assert all(torch.equal(stored[f"model.{n}"], t) for n, t in model.state_dict().items())


def test_a_folder_that_is_not_of_dcp(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a torch\.distributed\.checkpoint folder"):
        from_dcp(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
