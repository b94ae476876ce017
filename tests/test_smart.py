"""SMART: scores of single layers and the choice of evenly spread ones."""

from __future__ import annotations

import io
import itertools
import random

import pytest
import torch

import archzoo
from archzoo import CausalLM, InputError
from archzoo.conversion import assemble, progress, sensitivity, smart, smart_allows

# Published index sets and their model's number of layers (hybrid.md §2).
PUBLISHED = [
    ((0, 5, 10, 14), 16),
    ((0, 2, 5, 8, 11, 14), 16),
    (tuple(range(0, 16, 2)), 16),
    ((0, 5, 10, 16, 21, 26), 28),
    ((0, 3, 7, 10, 14, 18, 22, 26), 28),
    (tuple(range(0, 28, 2)), 28),
    ((0, 4, 8, 12, 16, 20, 25, 30), 32),
    (tuple(range(0, 32, 2)), 32),
]


@pytest.mark.parametrize(("indices", "layers"), PUBLISHED)
def test_published_sets_are_legal(indices: tuple[int, ...], layers: int) -> None:
    assert smart_allows(indices, layers)
    config = archzoo.config(f"zebra-llama-{ {16: '1b', 28: '3b', 32: '8b'}[layers] }-"
                            f"{len(indices)}mla-{layers - len(indices)}m2")  # fmt: skip
    assert tuple(i for i, s in enumerate(config.specs) if s.mixer.kind == "mla") == indices
    scores = [float(i in indices) for i in range(layers)]
    assert smart(scores, len(indices)) == indices  # and they are the choice of scores that ask for them


def test_published_gaps() -> None:
    gaps = {(n, len(i)): tuple(b - a - 1 for a, b in itertools.pairwise(i)) for i, n in PUBLISHED}
    assert gaps[16, 4] == (4, 4, 3)
    assert gaps[28, 6] == (4, 4, 5, 4, 4)
    assert gaps[32, 8] == (3, 3, 3, 3, 3, 4, 4)


@pytest.mark.parametrize("layers", [8, 16])
def test_half_leaves_one_set_between_the_ends(layers: int) -> None:
    half = layers // 2
    legal = [
        s for s in itertools.combinations(range(layers), half)
        if s[0] == 0 and s[-1] == layers - 2 and smart_allows(s, layers)
    ]  # fmt: skip
    assert legal == [tuple(range(0, layers, 2))]


@pytest.mark.parametrize("layers", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "negative"])
def test_smart_is_the_best_legal_set(layers: int, kind: str) -> None:
    rng = random.Random(layers)
    draw = {
        "random": rng.random, "ties": lambda: rng.randint(0, 2) / 10,
        "equal": lambda: 0.1, "negative": lambda: rng.random() - 1,
    }[kind]  # fmt: skip
    for count in range(1, layers + 1):
        scores = [draw() for _ in range(layers)]
        edge = layers // count
        first = max(range(edge), key=lambda i: scores[i])
        last = max(range(layers - edge, layers), key=lambda i: scores[i])
        ends = (first, first) if count == 1 else (first, last)
        legal = [
            s for s in itertools.combinations(range(layers), count)
            if (s[0], s[-1]) == ends and smart_allows(s, layers)
        ]  # fmt: skip
        best = max(legal, key=lambda s: round(sum(scores[i] for i in s), 9))  # the first: lowest indices
        assert smart(scores, count) == best


def test_smart_at_the_limits() -> None:
    scores = [0.1, 0.9, 0.3, 0.9]
    assert smart(scores, 1) == (1,)  # a tie: the lowest index
    assert smart(scores, 4) == (0, 1, 2, 3)
    assert smart(torch.tensor(scores), 2) == (1, 3)  # type: ignore[arg-type]
    for count in (0, 5):
        with pytest.raises(InputError, match=f"between 1 and the 4 layers, found {count}"):
            smart(scores, count)
    with pytest.raises(InputError, match="must be finite"):
        smart([0.0, float("nan")], 1)


def test_illegal_sets() -> None:
    assert not smart_allows((), 16)
    assert not smart_allows((0, 1, 2, 14), 16)  # gaps
    assert not smart_allows((4, 8, 11, 14), 16)  # first
    assert not smart_allows((0, 4, 8, 11), 16)  # last
    assert not smart_allows((0, 10, 5, 14), 16)  # order
    assert not smart_allows((0, 5, 10, 16), 16)  # range
    assert not smart_allows((0, 0), 1)
    assert smart_allows((7,), 16)


@pytest.fixture(scope="module")
def models() -> tuple[CausalLM, CausalLM, CausalLM]:
    """Teacher, all MLA and all Mamba-2 (both with changed feed-forwards, as after training)."""
    config = archzoo.config("llama-3.2-1b").tiny().override("layers.count=5", "init_std=0.15")
    teacher = archzoo.build(config, dtype=torch.float64, seed=3).eval().requires_grad_(False)
    mla, mamba2 = archzoo.convert(teacher, "mla"), archzoo.convert(teacher, "mamba2")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for model in (mla, mamba2):
            for layer in model.layers:
                for p in layer.ffn.parameters():
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.02)
    return teacher, mla, mamba2


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_sensitivity_equals_its_definition(models, tokens, batch_size: int, monkeypatch) -> None:
    teacher, mla, mamba2 = models
    ids = tokens(3, 12)

    def kl(student: CausalLM) -> torch.Tensor:
        p, q = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
        return (p.exp() * (p - q)).sum(-1).mean()

    with torch.no_grad():
        base = kl(mamba2)
        expected = [float(base - kl(assemble(mla, mamba2, [i]))) for i in range(5)]
    monkeypatch.setattr("archzoo.conversion.selection.chunk_rows", lambda *_: 5)  # several chunks, one ragged
    scores = sensitivity(teacher, mla, mamba2, ids, batch_size=batch_size)
    assert scores == pytest.approx(expected, rel=0, abs=1e-10)
    assert len(set(scores)) == 5
    assert all(p.grad is None for m in models for p in m.parameters())


def test_sensitivity_runs_only_the_changed_suffix(models, tokens, monkeypatch) -> None:
    teacher, mla, mamba2 = models
    calls = {"mla": 0, "mamba2": 0}
    for name, model in (("mla", mla), ("mamba2", mamba2)):
        for layer in model.layers:

            def count(*args, name=name, forward=layer.forward):  # type: ignore[no-untyped-def]
                calls[name] += 1
                return forward(*args)

            monkeypatch.setattr(layer, "forward", count)
    sensitivity(teacher, mla, mamba2, tokens(1, 4))
    assert calls == {"mla": 5, "mamba2": 5 + 4 + 3 + 2 + 1}


def test_useless_and_perfect_layers(models, tokens) -> None:
    """A layer equal to its stand-in scores 0; the teacher itself as the student leaves KL 0."""
    teacher, mla, mamba2 = models
    base = sensitivity(teacher, mla, mamba2, tokens(1, 8))
    shifted = sensitivity(mamba2, mla, mamba2, tokens(1, 8))
    assert all(s < 0 for s in shifted)  # the all-Mamba model is its own best student
    assert base != shifted


def test_sensitivity_errors(models, tokens) -> None:
    teacher, mla, mamba2 = models
    with pytest.raises(InputError, match="must be 'mla', found 'mamba2'"):
        sensitivity(teacher, mamba2, mamba2, tokens(1, 4))
    with pytest.raises(InputError, match="must be at least 1"):
        sensitivity(teacher, mla, mamba2, tokens(0, 4))
    other = archzoo.build(teacher.config.override("vocab_size=100"))
    with pytest.raises(InputError, match="share a vocabulary, found 100 and 256"):
        sensitivity(other, mla, mamba2, tokens(1, 4))


@pytest.mark.parametrize(("quiet", "shows"), [(0.0, True), (60.0, False)])
def test_bar_only_for_long_work(quiet: float, shows: bool, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr(progress, "QUIET", quiet)
    with progress.Progress("scoring layers", 3) as bar:
        for _ in range(3):
            bar.step()
    assert ("scoring layers" in out.getvalue()) is shows
