"""The Rust gate against its definition in torch, and the stub of the native module."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archzoo import _rust

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN: dict[str, Any] = {
    "dtype": "float32",
    "top_k": 2,
    "score": "sigmoid",
    "bias": None,
    "groups": 4,
    "top_groups": 2,
    "group_score": "top2_sum",
    "renormalize": True,
    "scale": 2.5,
}
GOLDEN_LOGITS = np.array([[2, -2, 1, 1, 0, 0, -1, 3]], np.float32)


def gate(logits: Tensor, bias: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    raw = logits.numpy() if logits.dtype == torch.float32 else logits.view(torch.uint16).numpy()
    weights, ids = _rust.gate(
        logits=raw,
        dtype=str(logits.dtype).removeprefix("torch."),
        bias=None if bias is None else bias.numpy(),
        **kwargs,
    )
    assert weights.dtype == np.float32
    assert ids.dtype == np.int64
    return torch.from_numpy(weights), torch.from_numpy(ids)


def top(values: Tensor, k: int) -> Tensor:
    """The lowest index first among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and choice scores in float64."""
    logits = logits.double()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "softmax_topk": lambda x: x,
    }
    scores = functions[score](logits)
    choice = scores if bias is None else scores + bias.double()
    if groups > 1:
        grouped = choice.view(len(choice), groups, -1)
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values
        best = best.sum(-1) if group_score == "top2_sum" else best[..., 0]
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, top(best, top_groups), True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = top(choice, top_k)
    weights = scores.gather(1, ids)
    if score == "softmax_topk":
        weights = weights.softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids, choice


def assert_same_choice(ids: Tensor, expected: Tensor, choice: Tensor) -> None:
    """Equal but for experts whose scores differ by less than float32 rounding."""
    found, wanted = choice.gather(1, ids), choice.gather(1, expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (ids != expected).sum() <= 1e-3 * ids.numel()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups", "group_score"),
    [
        (64, 6, 1, 1, "max"),
        (160, 6, 8, 3, "top2_sum"),
        (256, 8, 8, 4, "top2_sum"),
        (160, 6, 8, 3, "max"),
        (256, 20, 8, 4, "max"),
        (128, 70, 4, 3, "top2_sum"),
        (60, 4, 1, 1, "max"),
        (7, 3, 7, 5, "top2_sum"),
        (5, 5, 1, 1, "max"),
        (1, 1, 1, 1, "max"),
    ],
)
@pytest.mark.parametrize(("renormalize", "biased"), [(True, True), (False, False)])
def test_equals_the_definition(
    dtype: torch.dtype,
    score: str,
    experts: int,
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    biased: bool,
) -> None:
    generator = torch.Generator().manual_seed(experts + top_k)
    logits = torch.randn(200, experts, generator=generator).to(dtype)
    bias = 0.1 * torch.randn(experts, generator=generator) if biased else None
    kwargs: dict[str, Any] = {
        "top_k": top_k,
        "score": score,
        "groups": groups,
        "top_groups": top_groups,
        "group_score": group_score,
        "renormalize": renormalize,
        "scale": 2.5,
    }
    weights, ids = gate(logits, bias, **kwargs)
    expected_weights, expected_ids, choice = reference(logits, bias, **kwargs)
    assert_same_choice(ids, expected_ids, choice)
    same = ids == expected_ids
    torch.testing.assert_close(weights[same], expected_weights[same].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype, score: str, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    logits = (torch.randint(levels, (300, 96), generator=generator) * 0.5).to(dtype)
    for groups, top_groups, group_score in [(1, 1, "max"), (8, 3, "max"), (8, 3, "top2_sum")]:
        kwargs: dict[str, Any] = {
            "top_k": 8,
            "score": score,
            "groups": groups,
            "top_groups": top_groups,
            "group_score": group_score,
            "renormalize": True,
            "scale": 1.0,
        }
        _, ids = gate(logits, None, **kwargs)
        assert torch.equal(ids, reference(logits, None, **kwargs)[1])


def test_golden() -> None:
    for bias, expected in [
        (None, {2: 1.085538, 7: 1.414462}),
        ([-2.0] * 8, {2: 1.085538, 7: 1.414462}),
        ([0, 0, 0.2, 0.2, 0, 0, 0, -0.9], {2: 1.25, 3: 1.25}),
    ]:
        array = None if bias is None else np.array(bias, np.float32)
        weights, ids = _rust.gate(**GOLDEN | {"logits": GOLDEN_LOGITS, "bias": array})
        assert dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
            expected, abs=2e-6
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 0}, ValueError, r"top_k must be in 1\.\.=8 .*found 0"),
        ({"top_k": -3}, ValueError, "top_k must be at least 1, found -3"),
        ({"top_k": 9}, ValueError, r"top_k must be in 1\.\.=8 .*found 9"),
        ({"top_k": 5}, ValueError, "top_k must be at most 4 .*2 of 4 groups.*found 5"),
        ({"groups": 3}, ValueError, "groups must divide the 8 experts, found 3"),
        ({"groups": 0}, ValueError, "groups must divide the 8 experts, found 0"),
        ({"top_groups": 5}, ValueError, r"top_groups must be in 1\.\.=4 .*found 5"),
        ({"top_groups": 0}, ValueError, r"top_groups must be in 1\.\.=4 .*found 0"),
        ({"bias": np.zeros(7, np.float32)}, ValueError, "bias must have 8 values .*found 7"),
        ({"bias": np.full(8, np.nan, np.float32)}, ValueError, "bias must be finite, found NaN at expert 0"),
        ({"bias": np.zeros(16, np.float32)[::2]}, ValueError, "bias must be C-contiguous"),
        ({"score": "relu"}, ValueError, 'score must be .*found "relu"'),
        ({"group_score": "mean"}, ValueError, 'group_score must be .*found "mean"'),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"dtype": "float64"}, ValueError, 'dtype must be .*found "float64"'),
        ({"dtype": "bfloat16"}, TypeError, "must be a 2-D numpy array of uint16"),
        ({"logits": GOLDEN_LOGITS[0]}, TypeError, "must be a 2-D numpy array of float32"),
        ({"logits": np.zeros((2, 16), np.float32)[:, ::2]}, ValueError, "logits must be C-contiguous"),
    ],
)
def test_names_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _rust.gate(**{"logits": GOLDEN_LOGITS} | GOLDEN | change)


@pytest.mark.parametrize("tokens", [5, 40_000])
def test_names_the_token_that_is_not_a_number(tokens: int) -> None:
    logits = np.zeros((tokens, 8), np.float32)
    logits[tokens - 2, 7] = np.nan
    with pytest.raises(ValueError, match=f"token {tokens - 2} are NaN"):
        _rust.gate(**GOLDEN | {"logits": logits})


def test_no_tokens() -> None:
    weights, ids = _rust.gate(**GOLDEN | {"logits": np.zeros((0, 8), np.float32)})
    assert weights.shape == ids.shape == (0, 2)


def test_many_threads_and_one_agree() -> None:
    logits = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    kwargs = GOLDEN | {"groups": 8}
    weights, ids = _rust.gate(**kwargs | {"logits": logits})
    rows = [_rust.gate(**kwargs | {"logits": logits[i : i + 500]}) for i in range(0, 5000, 500)]
    np.testing.assert_array_equal(weights, np.concatenate([w for w, _ in rows]))
    np.testing.assert_array_equal(ids, np.concatenate([i for _, i in rows]))


SCRIPT = """
import hashlib, os, sys
import numpy as np
from archzoo import _rust

x = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
options = ("float32", 6, "softmax", None, 8, 3, "max", True, 1.0)
route = lambda: b"".join(a.tobytes() for a in _rust.gate(x, *options))
before = route()
if os.fork() == 0:
    os._exit(0 if route() == before else 1)
assert os.wait()[1] == 0
print(_rust.instruction_set(), hashlib.sha256(before).hexdigest())
"""


def test_every_instruction_set_agrees_to_the_bit_also_in_a_forked_child() -> None:
    results = {}
    for name in ["", "baseline", "avx2", "avx512"]:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT],
            env=os.environ | {"ARCHZOO_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        used, digest = run.stdout.split()
        results[used] = digest
    assert "baseline" in results
    assert _rust.instruction_set() in results
    assert len(set(results.values())) == 1


def test_the_stub_matches_the_module(tmp_path: Path) -> None:
    package = tmp_path / "archzoo"  # alone: mypy need not read the whole project, and torch with it
    package.mkdir()
    (package / "__init__.py").touch()
    module = Path(_rust.__file__)
    for file in [module, module.with_name("_rust.pyi")]:
        shutil.copy(file, package)
    run = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "archzoo._rust"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
