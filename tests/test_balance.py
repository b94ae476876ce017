"""Load balancing: each loss against its formula, statistics, padding, bias updates, and a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import CausalLM, ConfigError, ModelConfig
from archzoo.blocks.context import Aux, Context
from archzoo.blocks.ffns.moe import MoE, MoEConfig
from archzoo.blocks.registry import Site
from archzoo.data import TokenBlocks, python_manual_text
from archzoo.ops import balance

Tokens = Callable[..., Tensor]
F64 = torch.float64
BIASED = "layers.default.ffn.selection_bias=true"
SIGMOID = 'layers.default.ffn.score="sigmoid"'


def rows(batch: int, length: int, valid: Tensor | None = None) -> balance.Sequences:
    return balance.Sequences.of((batch, length), torch.device("cpu"), valid, None)


def model_with(*changes: str, dtype: torch.dtype = F64, seed: int = 0) -> CausalLM:
    """Three routed layers of eight experts, top two."""
    config = archzoo.config("deepseek-moe-16b").tiny()
    config = config.override("layers.count=3", "layers.override=[]", "init_std=0.3")
    moe = {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 32, "shared": 1}
    data = config.model_dump()
    data["layers"]["default"]["ffn"] = moe | {"balance": {}, "selection_bias": False, "score": "softmax"}
    return archzoo.build(ModelConfig.from_dict(data).override(*changes), dtype=dtype, seed=seed)


def chosen(model: CausalLM, ids: Tensor, **kwargs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(router logits [B, T, E], choices [B, T, k]) of each layer in a forward call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: MoE, args: tuple[Tensor, ...], out: Tensor) -> None:
        with torch.no_grad():
            x = args[0]
            logits = module.logits(x.flatten(0, 1))
            seen.append((logits.view(*x.shape[:2], -1), module.choose(logits)[1].view(*x.shape[:2], -1)))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, MoE)]
    model(ids, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


# --- the losses against their formulas, written as loops --------------------------------------------


def expected_expert(p: Tensor, ids: Tensor) -> float:
    """moe.md 1.1 of one sequence p [T, E], ids [T, k]."""
    tokens, experts = p.shape
    total = 0.0
    for i in range(experts):
        f = experts / (ids.shape[1] * tokens) * int((ids == i).sum())
        total += f * float(p[:, i].mean())
    return total


def problem(batch: int = 3, length: int = 10, experts: int = 8, k: int = 2) -> tuple[Tensor, Tensor]:
    p = torch.randn(batch, length, experts, dtype=F64).softmax(-1)
    return p, p.topk(k, -1).indices


def test_expert_loss_is_the_mean_over_sequences() -> None:
    p, ids = problem()
    got = balance.expert_loss(ids.flatten(0, 1), p.flatten(0, 1), rows(3, 10))
    assert float(got) == pytest.approx(sum(map(expected_expert, p, ids)) / 3, rel=1e-6)


def test_device_and_communication_losses() -> None:
    p, ids = problem()
    devices, limit = 4, 3
    device = communication = 0.0
    for q, chosen_ids in zip(p, ids, strict=True):
        for j in range(devices):
            group = [2 * j, 2 * j + 1]
            f = sum(8 / (2 * 10) * int((chosen_ids == i).sum()) for i in group) / 2
            sent = int(((chosen_ids // 2) == j).any(-1).sum())
            mass = float(q[:, group].mean(0).sum())
            device += f * mass / 3
            communication += devices / (limit * 10) * sent * mass / 3
    args = ids.flatten(0, 1), p.flatten(0, 1), rows(3, 10), devices
    assert float(balance.device_loss(*args)) == pytest.approx(device, rel=1e-6)
    assert float(balance.communication_loss(*args, limit)) == pytest.approx(communication, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_losses_at_balance(k: int) -> None:
    """Check 10: 1 in DeepSeek's form, k in transformers'."""
    ids = (torch.arange(8)[:, None] + torch.arange(k)) % 8
    p = torch.full((8, 8), 1 / 8, dtype=F64)
    whole = rows(1, 8)
    assert float(balance.expert_loss(ids, p, whole)) == pytest.approx(1)
    assert float(balance.device_loss(ids, p, whole, 4)) == pytest.approx(1)
    loads, sums = whole.loads(ids, 8)[0], p.sum(0)
    assert float(balance.load_balancing(loads, sums, torch.tensor(8.0))) == pytest.approx(k)


def test_golden_values() -> None:
    """Check 10: softmax of randn(32, 8), seed 0, top two."""
    torch.manual_seed(0)
    p = torch.randn(32, 8).softmax(-1)
    ids = p.topk(2, -1).indices
    whole = rows(1, 32)
    loads = whole.loads(ids, 8)[0]
    hf = balance.load_balancing(loads, p.sum(0), torch.tensor(32.0))
    assert float(hf) == pytest.approx(2.076446, abs=1e-6)
    assert float(balance.expert_loss(ids, p, whole)) == pytest.approx(1.038223, abs=1e-6)


def test_z_loss() -> None:
    logits = torch.randn(6, 8, dtype=F64)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    expected = torch.stack([x.exp().sum().log() ** 2 for x in logits[valid.flatten()]]).mean()
    torch.testing.assert_close(balance.z_loss(logits, rows(2, 3, valid)), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_equals_transformers(masked: bool, tokens: Tokens) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = model_with("layers.default.ffn.balance={load_balancing=0.25}", dtype=torch.float32).train()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    positions = torch.arange(12).repeat(2, 1)
    if masked:
        mask[1, :5] = 0
        positions[1] = (positions[1] - 5).clamp(min=-1)
    seen = chosen(model, ids, positions=positions)
    logits = tuple(x[0].flatten(0, 1) for x in seen)
    expected = mixtral.load_balancing_loss_func(logits, 8, 2, mask)
    got = model(ids, labels=ids, positions=positions).aux["load_balancing_loss"]
    torch.testing.assert_close(got, 0.25 * expected, rtol=1e-5, atol=1e-6)


# --- the layer and the model ------------------------------------------------------------------------


def test_losses_of_a_model_follow_the_formulas(tokens: Tokens) -> None:
    """Padding is left out, every sequence counts alike, layers add up; V3's loss ignores the bias."""
    losses = {"expert": 0.5, "device": 0.25, "devices": 2, "sequence": 2.0, "switch": 0.1, "z": 0.01}
    table = ", ".join(f"{k}={v}" for k, v in losses.items())
    model = model_with(BIASED, SIGMOID, f"layers.default.ffn.balance={{{table}}}").train()
    for layer in model.layers:
        layer.ffn.selection_bias.copy_(torch.randn(8))
    ids, positions = tokens(2, 12), torch.arange(12).repeat(2, 1)
    positions[1] = (positions[1] - 4).clamp(min=-1)
    seen = chosen(model, ids, positions=positions)
    out = model(ids, labels=ids, positions=positions)
    expected = dict.fromkeys(("expert_loss", "device_loss", "sequence_loss", "switch_loss", "z_loss"), 0.0)
    for logits, choice in seen:
        real = [(logits[0], choice[0]), (logits[1, 4:], choice[1, 4:])]
        for x, picked in real:
            s = x.sigmoid()
            p = s / s.sum(-1, keepdim=True)
            expected["expert_loss"] += 0.5 * expected_expert(p, picked) / 2
            expected["sequence_loss"] += 2.0 * expected_expert(p, s.topk(2).indices) / 2
            f = [8 / (2 * len(x)) * int((picked // 4 == j).sum()) / 4 for j in range(2)]
            mass = p.mean(0).view(2, 4).sum(-1)
            expected["device_loss"] += 0.25 * float(f[0] * mass[0] + f[1] * mass[1]) / 2
        x, picked = (torch.cat(parts) for parts in zip(*real, strict=True))
        expected["switch_loss"] += 0.1 * expected_expert(x.softmax(-1), picked[:, :1])
        expected["z_loss"] += 0.01 * float(x.logsumexp(-1).square().mean())
    assert {k: out.aux[k].item() for k in expected} == pytest.approx(expected, rel=1e-5)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(plain.item() + sum(expected.values()), rel=1e-6)
    assert not any("loss" in key for key in model.eval()(ids, labels=ids).aux)


def test_packed_sequences_count_alike(tokens: Tokens) -> None:
    model = model_with("layers.default.ffn.balance={expert=1.0, sequence=0.5}").train()
    parts = [tokens(1, n, seed) for seed, n in enumerate((5, 9, 4))]
    ids = torch.cat(parts, 1)
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 14, 18])).aux
    alone = [model(part, labels=part).aux for part in parts]
    for name in ("expert_loss", "sequence_loss"):
        torch.testing.assert_close(packed[name], torch.stack([a[name] for a in alone]).mean())
    torch.testing.assert_close(packed["load"], sum(a["load"] for a in alone))


def test_statistics(tokens: Tokens) -> None:
    model = model_with().eval()
    ids, positions = tokens(2, 12), torch.arange(12).repeat(2, 1)
    positions[1] = (positions[1] - 4).clamp(min=-1)
    seen = chosen(model, ids, positions=positions)
    aux = model(ids, positions=positions).aux
    assert sorted(aux) == ["dropped", "entropy", "load", "max_violation"]
    assert aux["load"].shape == (3, 8)
    for i, (logits, choice) in enumerate(seen):
        logits, choice = (torch.cat((t[0], t[1, 4:])) for t in (logits, choice))
        load = choice.flatten().bincount(minlength=8)
        assert aux["load"][i].tolist() == load.tolist()
        p = logits.softmax(-1).mean(0)
        assert float(aux["entropy"][i]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
        assert float(aux["max_violation"][i]) == pytest.approx(float(load.max() / load.double().mean() - 1))
    assert not aux["dropped"].any()
    assert not any(t.requires_grad for t in model.train()(ids).aux.values())
    cache = model.eval().new_cache(2, 12)
    assert model(ids, cache=cache).aux == {}  # decoding pays for no statistics


def test_experts_under_mixture_of_depths_still_report(tokens: Tokens) -> None:
    changes = ("layers.default.ffn.balance={expert=1.0}", 'layers.default.depth={kind="mod", capacity=0.5}')
    out = model_with(*changes).train()(ids := tokens(2, 12), labels=ids)
    assert out.aux["load"].sum(-1).tolist() == [2 * 6 * 2] * 3
    assert {"depth_loss", "expert_loss"} <= set(out.aux)


def test_recomputed_layers_report_once(tokens: Tokens) -> None:
    model = model_with(BIASED, "layers.default.ffn.balance={expert=1.0, load_balancing=0.5, z=0.1}").train()
    ids = tokens(2, 12)
    seen = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        router = model.layers[0].ffn
        seen.append((out.aux, router.router.weight.grad.clone(), router.load.clone()))
        router.load = None
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)
    assert float(seen[0][2].sum()) == 2 * 12 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["layers.default.ffn.balance={devices=3}"], r"experts \(8\) must be a multiple of balance.devices"),
        (["layers.default.ffn.balance={devices=2, device_limit=3}"], "device_limit"),
        (
            ["layers.default.ffn.sample_second=true", "layers.default.ffn.top_k=3"],
            "sample_second needs top_k 2",
        ),
    ],
)
def test_wrong_settings(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_with(*changes)


# --- balancing without a loss ------------------------------------------------------------------------


def test_bias_update_follows_the_sign() -> None:
    """Check 12."""
    model = model_with(BIASED, "layers.default.ffn.experts=4")
    for layer in model.layers:
        layer.ffn.load = torch.tensor([10.0, 0, 5, 5])
    model.update_router_bias(0.001)
    for layer in model.layers:
        torch.testing.assert_close(layer.ffn.selection_bias, torch.tensor([-0.001, 0.001, 0, 0]))
        assert layer.ffn.load is None
    before = [layer.ffn.selection_bias.clone() for layer in model.layers]
    model.update_router_bias()  # nothing seen since: nothing moves
    for layer, bias in zip(model.layers, before, strict=True):
        assert torch.equal(layer.ffn.selection_bias, bias)
    model_with().update_router_bias()  # no bias anywhere: nothing to do


def test_loads_add_up_over_micro_batches(tokens: Tokens) -> None:
    model = model_with(BIASED).train()
    batches = [tokens(2, 10, seed) for seed in range(3)]
    total = sum(model(ids, labels=ids).aux["load"] for ids in batches)
    model.eval()(batches[0])  # evaluation does not count
    with torch.no_grad():
        model.train()(batches[0])
    for layer, load in zip(model.layers, total, strict=True):
        assert torch.equal(layer.ffn.load, load)
        bias = layer.ffn.selection_bias.clone()
        expected = bias + 0.01 * torch.sign(load.mean() - load)
        layer.expected = expected
    model.update_router_bias(0.01)
    for layer in model.layers:
        torch.testing.assert_close(layer.ffn.selection_bias, layer.expected)


def test_gradients_of_the_router(tokens: Tokens) -> None:
    """Check 11: the bias gets none, the router's weight gets one through the weights of the experts."""
    model = model_with(BIASED).train()
    ids = tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    for layer in model.layers:
        assert layer.ffn.selection_bias.grad is None
        assert not layer.ffn.selection_bias.requires_grad
        assert layer.ffn.router.weight.grad.abs().max() > 0
    assert "selection_bias" in "".join(model.state_dict())
    assert "load" not in {name.rpartition(".")[2] for name, _ in model.named_buffers()}


def test_compiled_training_counts_and_balances(tokens: Tokens) -> None:
    torch._dynamo.reset()
    table = "layers.default.ffn.balance={expert=1.0, sequence=0.5, switch=0.1, load_balancing=0.5, z=0.1}"
    model = model_with(BIASED, table, dtype=torch.float32).train()
    ids = tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        eager = model(ids, labels=ids)
        loads = [layer.ffn.load for layer in model.layers]
        for layer in model.layers:
            layer.ffn.load = None
        out = compiled(ids, labels=ids)
        torch.testing.assert_close(out.loss, eager.loss)
        torch.testing.assert_close(out.aux, eager.aux)
        for layer, load in zip(model.layers, loads, strict=True):
            assert torch.equal(layer.ffn.load, load)
            layer.ffn.load = None


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = model_with(BIASED).train()
    ids = torch.randint(256, (4, 10), generator=torch.Generator().manual_seed(7))
    for part in ids.chunk(world)[rank].split(1):  # micro-batches
        model(part, labels=part).loss.backward()
    model.update_router_bias(0.01)
    torch.save([layer.ffn.selection_bias for layer in model.layers], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_worker, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for job in jobs:
        job.start()
    model = model_with(BIASED).train()
    ids = torch.randint(256, (4, 10), generator=torch.Generator().manual_seed(7))
    model(ids, labels=ids).loss.backward()
    model.update_router_bias(0.01)
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    for rank in range(2):
        biases = torch.load(tmp_path / f"{rank}.pt")
        for layer, bias in zip(model.layers, biases, strict=True):
            assert torch.equal(bias, layer.ffn.selection_bias)
            assert bias.abs().max() > 0


def test_a_layer_alone_needs_no_context() -> None:
    config = MoEConfig(experts=4, top_k=2, hidden=8, balance={"expert": 1.0})
    layer = config.build(Site(index=0, count=1, hidden_size=16, norm_eps=1e-6)).train()
    for param in layer.parameters():
        torch.nn.init.normal_(param)
    x = torch.randn(2, 3, 16)
    aux = Aux()
    torch.testing.assert_close(layer(x), layer(x, Context((2, 3), x.device, aux=aux)))
    assert list(aux.losses()) == ["expert_loss"]


@pytest.mark.parametrize("tokens_", [0, 1])
def test_no_tokens_and_one_token(tokens_: int) -> None:
    """Check 18: nothing becomes NaN."""
    losses = {"expert": 1.0, "device": 1.0, "communication": 1.0, "sequence": 1.0, "switch": 1.0}
    config = MoEConfig(
        experts=4, top_k=2, hidden=8, balance=losses | {"load_balancing": 1.0, "z": 1.0, "devices": 2}
    )
    layer = config.build(Site(index=0, count=1, hidden_size=16, norm_eps=1e-6)).train()
    for param in layer.parameters():
        torch.nn.init.normal_(param)
    aux = Aux()
    x = torch.randn(1, tokens_, 16, requires_grad=True)
    out = layer(x, Context((1, tokens_), x.device, aux=aux))
    assert out.shape == x.shape
    total = torch.stack(list(aux.losses().values())).sum() + out.sum()
    total.backward()
    assert len(aux.losses()) == 7
    assert total.isfinite()
    assert all(value.isfinite().all() for value in aux.statistics().values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_distillation_adds_the_students_losses_and_moves_its_bias(tmp_path: Path, tokens: Tokens) -> None:
    from archzoo.distill import KD, distill
    from archzoo.distill.stages import objective

    teacher = model_with(dtype=torch.float32, seed=1)
    plain = model_with(BIASED, dtype=torch.float32)
    student = model_with(BIASED, "layers.default.ffn.balance={expert=0.5}", dtype=torch.float32).train()
    stage = KD(name="kd", steps=2, seq_len=12, batch_size=2, lr=1e-3, router_bias_rate=0.01)
    ids, labels = tokens(2, 12), tokens(2, 12, seed=1)
    labels[0, :5] = -100
    losses = [objective(m, teacher, stage)(ids, labels) for m in (plain.train(), student)]
    extra = student(ids, labels=ids).aux["expert_loss"] * 19
    torch.testing.assert_close(losses[1] - losses[0], extra, rtol=1e-4, atol=1e-4)
    data = torch.randint(256, (200,)).numpy()
    distill(student, teacher, data, stage, tmp_path, progress=False)
    for layer in student.layers:
        assert layer.ffn.load is None
        steps = layer.ffn.selection_bias / 0.01
        torch.testing.assert_close(steps, steps.round())
        assert steps.abs().max() > 0


def test_bias_updates_balance_a_model_that_trains_on_text() -> None:
    """A tiny DeepSeekMoE on the bytes of the Python manual, twice; benches/balance.py is longer."""
    text = np.frombuffer(python_manual_text("train").encode(), np.uint8)
    mixer = {"kind": "attention", "heads": 2, "kv_heads": 2, "head_dim": 32, "rope": {"theta": 10000.0}}
    ffn = {"kind": "moe", "experts": 15, "top_k": 3, "hidden": 32, "shared": 1, "renormalize": True}
    layers = {
        "count": 2,
        "default": {"mixer": mixer, "ffn": ffn | {"score": "sigmoid", "selection_bias": True}},
    }
    data = {"vocab_size": 256, "hidden_size": 64, "max_positions": 64, "init_std": 0.08, "layers": layers}
    worst, losses = [], []
    for rate in (0.0, 0.02):
        model = archzoo.build(ModelConfig.from_dict(data)).train()
        blocks = TokenBlocks(text, 64, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        violation = []
        for _ in range(60):
            ids = blocks.next_batch(8)[0]
            out = model(ids, labels=ids)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rate:
                model.update_router_bias(rate)
            violation.append(out.aux["max_violation"].max())
        worst.append(float(torch.stack(violation[-10:]).mean()))
        losses.append(out.loss.item())
    assert worst[1] < 0.6 * worst[0], worst
    assert all(loss < 3.5 for loss in losses)  # both learn: 5.5 at the start
