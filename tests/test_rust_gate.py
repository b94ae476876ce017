"""The Rust gate against its definition in torch, and the stub of the native module."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import InputError
from archzoo.ops.backend import backend
from archzoo.ops.moe import gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN: dict[str, Any] = {
    "top_k": 2,
    "score": "sigmoid",
    "bias": None,
    "groups": 4,
    "top_groups": 2,
    "group_score": "top2_sum",
    "renormalize": True,
    "scale": 2.5,
}
GOLDEN_LOGITS = torch.tensor([[2.0, -2, 1, 1, 0, 0, -1, 3]])


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
    weights, ids = gate(logits, bias=bias, **kwargs)
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
        _, ids = gate(logits, **kwargs)
        assert torch.equal(ids, reference(logits, None, **kwargs)[1])


def test_golden() -> None:
    for bias, expected in [
        (None, {2: 1.085538, 7: 1.414462}),
        ([-2.0] * 8, {2: 1.085538, 7: 1.414462}),
        ([0, 0, 0.2, 0.2, 0, 0, 0, -0.9], {2: 1.25, 3: 1.25}),
    ]:
        tensor = None if bias is None else torch.tensor(bias)
        weights, ids = gate(GOLDEN_LOGITS, **GOLDEN | {"bias": tensor})
        assert dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
            expected, abs=2e-6
        )


@pytest.mark.parametrize("logits_need_gradients", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, r"top_k must be in 1\.\.=4 .*found 0"),
        ({"top_k": -3}, r"top_k must be in .*found -3"),
        ({"top_k": 5}, r"top_k must be in 1\.\.=4 .*2 of 4 groups.*found 5"),
        ({"groups": 3}, "groups must divide the 8 experts, found 3"),
        ({"groups": 0}, "groups must divide the 8 experts, found 0"),
        ({"top_groups": 5}, r"top_groups must be in 1\.\.=4 .*found 5"),
        ({"top_groups": 0}, r"top_groups must be in 1\.\.=4 .*found 0"),
        ({"bias": torch.zeros(7)}, r"bias must be \[8\] on cpu, found \[7\] on cpu"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias must be \[8\] on cpu, found \[8\] on meta"),
        ({"bias": torch.full((8,), torch.nan)}, "bias must be finite, found NaN at expert 0"),
        ({"score": "relu"}, 'score must be .*found "relu"'),
        ({"group_score": "mean"}, 'group_score must be .*found "mean"'),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"logits": torch.zeros(8)}, r"logits must be \[tokens, experts\], found \[8\]"),
        ({"logits": torch.zeros(2, 8).long()}, "logits must be floating point, found torch.int64"),
    ],
)
def test_names_what_is_wrong(change: dict[str, Any], message: str, logits_need_gradients: bool) -> None:
    kwargs = {"logits": GOLDEN_LOGITS} | GOLDEN | change
    if kwargs["logits"].is_floating_point() and logits_need_gradients:
        kwargs["logits"] = kwargs["logits"].clone().requires_grad_()
    with pytest.raises(InputError, match=message):
        gate(**kwargs)


@pytest.mark.parametrize("tokens", [5, 40_000])
def test_names_the_token_that_is_not_a_number(tokens: int) -> None:
    logits = torch.zeros(tokens, 8)
    logits[tokens - 2, 7] = torch.nan
    logits[tokens - 1] = torch.nan
    with pytest.raises(InputError, match=f"token {tokens - 2} are NaN"):
        gate(logits, **GOLDEN)


def test_no_tokens_and_strided_input() -> None:
    weights, ids = gate(torch.zeros(0, 8), **GOLDEN)
    assert weights.shape == ids.shape == (0, 2)
    strided = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))[:, ::2]
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1))[::2]
    kwargs = GOLDEN | {"bias": bias}
    expected = gate(strided.contiguous(), **kwargs | {"bias": bias.contiguous()})
    for a, b in zip(gate(strided, **kwargs), expected, strict=True):
        assert torch.equal(a, b)


def test_the_default_dtype_and_device_do_not_matter() -> None:
    expected = gate(GOLDEN_LOGITS, **GOLDEN)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = gate(GOLDEN_LOGITS, **GOLDEN)
    finally:
        torch.set_default_dtype(previous)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_many_threads_and_one_agree() -> None:
    logits = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    kwargs = GOLDEN | {"groups": 8}
    weights, ids = gate(logits, **kwargs)
    rows = [gate(logits[i : i + 500], **kwargs) for i in range(0, 5000, 500)]
    assert torch.equal(weights, torch.cat([w for w, _ in rows]))
    assert torch.equal(ids, torch.cat([i for _, i in rows]))


ROUTERS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"experts": 64, "biased": True} | GOLDEN | {"top_k": 6, "groups": 8, "top_groups": 4},
    "deepseek-v2": {
        "experts": 40, "top_k": 6, "groups": 8, "top_groups": 3, "group_score": "max", "scale": 16.0,
    },
    "mixtral": {"experts": 8, "top_k": 2, "renormalize": True},
    "qwen3-moe": {"experts": 128, "top_k": 8, "renormalize": True},
    "olmoe": {"experts": 64, "top_k": 8},
    "granite, gpt-oss": {"experts": 32, "top_k": 4, "score": "softmax_topk"},
    "minimax-m2": {"experts": 256, "top_k": 8, "score": "sigmoid", "biased": True, "renormalize": True},
    "ernie-4.5": {"experts": 64, "top_k": 6, "biased": True, "renormalize": True},
    "llama-4": {"experts": 16, "top_k": 1, "score": "sigmoid"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_thousand_draws_of_each_router_equal_the_reference(name: str) -> None:
    options = dict(ROUTERS[name])
    experts = options.pop("experts")
    biased = options.pop("biased", False)
    generator = torch.Generator().manual_seed(len(name))
    for draw in range(1000):
        logits = torch.randn(1 + draw % 7, experts, generator=generator) * (0.2 + draw % 5)
        if biased:
            options["bias"] = 0.1 * torch.randn(experts, generator=generator)
        weights, ids = gate(logits, **options)
        with backend("reference"):
            expected_weights, expected_ids = gate(logits, **options)
        if biased:  # float32 rounds the sums of score and bias; the choice is by those sums
            scores = logits.softmax(-1) if options.get("score", "softmax") == "softmax" else logits.sigmoid()
            order = (scores + options["bias"]).sort(-1, descending=True).values
            clear = (order[:, :-1] - order[:, 1:]).amin(-1) > 1e-6
            if not clear.all():
                weights, ids = weights[clear], ids[clear]
                expected_weights, expected_ids = expected_weights[clear], expected_ids[clear]
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_the_gradient_is_that_of_the_weights_and_the_fast_path_has_the_same_values() -> None:
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    for score in ("softmax", "sigmoid", "softmax_topk"):
        kwargs: dict[str, Any] = {"top_k": 4, "score": score, "renormalize": True, "scale": 2.0}
        leaf = logits.clone().requires_grad_()
        weights, ids = gate(leaf, **kwargs)
        assert weights.requires_grad
        fast, fast_ids = gate(logits, **kwargs)
        assert not fast.requires_grad
        assert torch.equal(ids, fast_ids)
        torch.testing.assert_close(weights.detach(), fast, rtol=2e-6, atol=1e-7)
        weights.square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


def _router(module: str, name: str, config: Any) -> torch.nn.Module:
    router = getattr(importlib.import_module(f"transformers.models.{module}"), name)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return router.eval()


@torch.no_grad()
def test_routers_of_transformers_choose_the_same_experts() -> None:
    transformers = pytest.importorskip("transformers")
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(1))
    v3 = transformers.DeepseekV3Config(
        hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    mixtral = transformers.MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    qwen = transformers.Qwen3MoeConfig(
        hidden_size=32, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True
    )
    oss = transformers.GptOssConfig(hidden_size=32, num_local_experts=32, num_experts_per_tok=4)
    for module, name, config, options in [
        ("deepseek_v3.modeling_deepseek_v3", "DeepseekV3TopkRouter", v3, ROUTERS["deepseek-v3"]),
        ("mixtral.modeling_mixtral", "MixtralTopKRouter", mixtral, ROUTERS["mixtral"]),
        ("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeTopKRouter", qwen, ROUTERS["qwen3-moe"]),
        ("gpt_oss.modeling_gpt_oss", "GptOssTopKRouter", oss, ROUTERS["granite, gpt-oss"]),
    ]:
        router = _router(module, name, config)
        logits, expected_weights, expected_ids = router(x)
        own = {k: v for k, v in options.items() if k not in ("experts", "biased")}
        if name == "DeepseekV3TopkRouter":
            own["bias"] = router.e_score_correction_bias
        elif name == "GptOssTopKRouter":
            logits = torch.nn.functional.linear(x, router.weight, router.bias)
        else:
            logits = torch.nn.functional.linear(x, router.weight)
        weights, ids = gate(logits, **own)
        order = logits.sort(-1, descending=True).values
        clear = (order[:, :-1] - order[:, 1:]).amin(-1) > 1e-6
        assert clear.sum() > 500
        dense = torch.zeros_like(logits).scatter(1, ids, weights)
        if expected_weights.shape == ids.shape:
            expected = torch.zeros_like(logits).scatter(1, expected_ids, expected_weights)
        else:
            expected = expected_weights
        torch.testing.assert_close(dense[clear], expected[clear], rtol=1e-5, atol=1e-6)


def test_compiles_in_one_graph() -> None:
    logits = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: gate(x, **GOLDEN), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits), gate(logits, **GOLDEN), strict=True):
        torch.testing.assert_close(a, b)


SCRIPT = """
import hashlib, os
import torch
from archzoo import _rust
from archzoo.ops.moe import gate

x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
options = dict(top_k=6, groups=8, top_groups=3, renormalize=True)
route = lambda: b"".join(a.numpy().tobytes() for a in gate(x, **options))
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
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"ARCHZOO_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        used, digest = run.stdout.split()
        results[used] = digest
    assert "baseline" in results
    assert _rust.instruction_set() in results
    assert len(set(results.values())) == 1
