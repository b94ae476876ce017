"""`archzoo demo` on a tiny random Llama, and a save that is killed half-way."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import archzoo
from archzoo import distill
from archzoo.cli import demo as demo_module
from archzoo.cli.demo import Settings, decode_rate, demo

TEXT = "".join(f"Line {i}: the {word} follows.\n" for i in range(60) for word in ("loop", "test", "name"))


def write_tiny(folder: Path, **extra_files: bytes) -> Path:
    """A random Llama of 6 small layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = archzoo.config("smollm2-135m").tiny().override("layers.count=6")
    files = {"tokenizer.json": tokenizer.to_str().encode(), **extra_files}
    archzoo.save(archzoo.build(config), folder, extra_files=files)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("demo") / "teacher")


@pytest.fixture(scope="module")
def settings() -> Settings:
    common = {"seq_len": 32, "batch_size": 2, "steps": 3, "lr": 1e-3}
    stages = [
        {"kind": "ild", "name": "align", "train": "mixers", **common},
        {"kind": "ild", "name": "align-mamba2", **common},
        {"kind": "kd", "name": "sft", **common},
    ]
    return Settings(
        distill.Recipe.model_validate({"stages": stages}),
        mla_layers=2,
        kv_rank=16,
        score_sequences=1,
        score_length=32,
        eval_tokens=128,
        eval_length=32,
        contexts=(16, 1024),  # the second is beyond the model's 512 positions
        decode_steps=3,
        new_tokens=5,
    )


@pytest.fixture(scope="module")
def out(teacher: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    demo(teacher, TEXT, TEXT[::-1], folder, settings)
    return folder


def test_report_has_every_section(out: Path) -> None:
    report = (out / "report.md").read_text(encoding="utf-8")
    for title in ("Steps", "Perplexity", "Cache", "Decoding", "Sample", "Seconds"):
        assert f"\n## {title}\n" in report
    for row in (
        "initialised",
        "after ILD",
        "after KD",
        "decode tokens/s at 1,024 tokens",
        "KV bytes per token",
    ):
        assert row in report
    assert "limit lifted" in report
    for name in ("ild", "kd", "cache", "decode"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert f"({name}.png)" in report


def test_metrics_are_finite_and_complete(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["perplexity"]) == {"teacher", "initialised", "after ILD", "after KD"}
    numbers = [*metrics["perplexity"].values(), *metrics["scores"]]
    for name, steps in (("all-mla", 3), ("all-mamba2", 6), ("hybrid", 3)):
        assert len(metrics["losses"][name]) == steps
        numbers += metrics["losses"][name]
    assert all(math.isfinite(value) for value in numbers)
    assert len(metrics["mla_layers"]) == 2
    assert len(metrics["scores"]) == 6


def test_student_is_a_zebra_folder(out: Path) -> None:
    files = {path.name for path in (out / "student").iterdir()}
    assert {"config.json", "hybrid_config.json", "model.safetensors", "tokenizer.json"} <= files
    student = archzoo.load(out / "student")
    layers = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["mla_layers"]
    assert [i for i, spec in enumerate(student.config.specs) if spec.mixer.kind == "mla"] == layers


def test_second_run_takes_what_is_there(
    out: Path, teacher: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("archzoo.conversion.sensitivity", fail)
    monkeypatch.setattr("archzoo.distill.perplexity", fail)
    monkeypatch.setattr("archzoo.distill.trainer._Run._train_step", fail)
    first = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    again = demo(teacher, TEXT, TEXT[::-1], out, settings)
    for key in ("perplexity", "scores", "losses", "samples", "mla_layers"):
        assert again[key] == first[key]


def test_changed_student_is_noticed(out: Path, tmp_path: Path) -> None:
    student = archzoo.load(out / "student")
    with torch.no_grad():
        student.norm.weight[0] += 1e-3
    tokens = torch.arange(20).numpy().astype("uint32")
    with pytest.raises(archzoo.ArchzooError, match="does not compute the same logits: the values differ"):
        demo_module._check_reread(student, out / "student", tokens, tmp_path / "scratch")


def test_decode_rate_leaves_the_model_alone(teacher: Path) -> None:
    model = archzoo.load(teacher)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert decode_rate(model, 700, 2, 0) > 0
    assert model.config.max_positions == 512
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


KILLED = """
import sys, threading, time, os, signal, archzoo
from archzoo.checkpoint import shards
write = shards.write_shards
def slow(*arguments):
    write(*arguments)          # every byte of the new weights is there ...
    print("writing", flush=True)
    time.sleep(60)                     # ... and the process dies before the folder takes its place
shards.write_shards = slow
model = archzoo.load(sys.argv[1])
model.norm.weight.data.fill_(7.0)
archzoo.save(model, sys.argv[1])
"""


def test_kill_in_the_middle_of_a_save_keeps_the_earlier_folder(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    archzoo.save(archzoo.load(teacher), folder)
    before = archzoo.load(folder).state_dict()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    after = archzoo.load(folder).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    archzoo.save(archzoo.load(folder), folder)  # and the next save is not hindered by what was left
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
