"""Multi-token prediction: the training loss against a loop, packing, and drafting without changing tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import CausalLM, InputError, ModelConfig

Tokens = Callable[..., Tensor]
F64 = torch.float64
NAMES = ["llama-3.2-1b", "deepseek-v2-lite", "step-3"]


def build(
    name: str = "llama-3.2-1b", depth: int = 2, dtype: torch.dtype = F64, **changes: object
) -> CausalLM:
    data = archzoo.config(name).tiny().model_dump()
    data |= {"mtp": {"depth": depth, "weight": 0.3}, "init_std": 0.15, **changes}
    return archzoo.build(ModelConfig.from_dict(data), dtype=dtype, seed=3)


def expected_loss(model: CausalLM, ids: Tensor) -> Tensor:
    """2412.19437 2.2.2 of one sequence ids [T], written out."""
    hidden, losses = model.backbone(ids[None]), []
    for k, module in enumerate(model.mtp, 1):
        x = torch.cat((module.enorm(model.embed(ids[k:])[None]), module.hnorm(hidden[:, :-1])), -1)
        x = F.linear(x, module.eh_proj.weight)
        hidden = module.norm(module.layer(x, model.context(ids[None, :-k])))
        logits = model.head(hidden)[0]
        losses.append(F.cross_entropy(logits[:-1], ids[k + 1 :]))
    return 0.3 * torch.stack(losses).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 3])
def test_loss_follows_the_formula(name: str, depth: int, tokens: Tokens) -> None:
    model = build(name, depth).train()
    ids = tokens(1, 12)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.aux["mtp_loss"], expected_loss(model, ids[0]))
    plain = F.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, plain + out.aux["mtp_loss"])
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert "mtp_loss" not in model.eval()(ids, labels=ids).aux


def test_module_equals_that_of_transformers(tokens: Tokens) -> None:
    """Its order of embedding and hidden state is that of the checkpoints; its positions are one further."""
    layers = pytest.importorskip("transformers.modeling_layers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from archzoo.checkpoint.families import families

    model, ids = build("llama-130m", 1), tokens(2, 9)
    family = families()["llama"]
    settings = family.write(model.config)["config.json"]
    config = llama.LlamaConfig(**{k: v for k, v in settings.items() if k != "model_type"})
    config._attn_implementation = "eager"
    theirs = layers.MtpLayer(config, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, 0).double()
    ours = model.mtp[0]
    state = {}
    for name, tensor in ours.state_dict().items():
        if name.startswith("layer."):
            for key, part, *_ in family.regions(f"layers.0.{name.removeprefix('layer.')}", tensor):
                state[key.replace("model.layers.0.", "mtp_block.")] = part
        else:
            state["post_norm.weight" if name == "norm.weight" else name] = tensor
    theirs.load_state_dict(state)
    with torch.no_grad():
        hidden, embedded = model.backbone(ids)[:, :-1], model.embed(ids[:, 1:])
        at = torch.arange(1, 9)[None]
        rotary = llama.LlamaRotaryEmbedding(config)(hidden, at)
        mask = torch.full((8, 8), -torch.inf, dtype=F64).triu(1)[None, None]
        expected = theirs(embedded, hidden, rotary, mask, at, None)
        got = ours(embedded, hidden, model.context(ids[:, :-1]))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # their tables are fp32


def test_packed_sequences_do_not_see_each_other(tokens: Tokens) -> None:
    model = build().train()
    parts = [tokens(1, n, seed) for seed, n in enumerate((5, 9, 4))]
    ids = torch.cat(parts, 1)
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 14, 18])).aux["mtp_loss"]
    sums = torch.zeros(2, dtype=F64)
    for part in parts:
        hidden = model.backbone(part)
        for k, module in enumerate(model.mtp, 1):
            hidden = module(model.embed(part[:, k:]), hidden[:, :-1], model.context(part[:, :-k]))
            logits = model.head(hidden)[0, :-1]
            sums[k - 1] += F.cross_entropy(logits, part[0, k + 1 :], reduction="sum")
    counts = torch.tensor([sum(p.shape[1] - k - 1 for p in parts) for k in (1, 2)])
    torch.testing.assert_close(packed, 0.3 * (sums / counts).mean())


def test_ignored_labels_and_short_sequences(tokens: Tokens) -> None:
    model = build(depth=3).train()
    ids = tokens(2, 10)
    labels = ids.clone()
    labels[:, 4:] = -100
    shorter = ids[:, :4]
    got = model(ids, labels=labels).aux["mtp_loss"]
    torch.testing.assert_close(got, model(shorter, labels=shorter).aux["mtp_loss"])
    for length in (1, 2):
        assert model(ids[:, :length], labels=ids[:, :length]).loss.isfinite()


def test_checkpointing_and_compile(tokens: Tokens) -> None:
    torch._dynamo.reset()
    model = build(dtype=torch.float32).train()
    ids = tokens(2, 12)
    eager = model(ids, labels=ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids)
    torch.testing.assert_close(compiled.aux["mtp_loss"], eager.aux["mtp_loss"])
    grads = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_cost_and_native_folder(name: str, tmp_path: object, tokens: Tokens) -> None:
    model = build(name, dtype=torch.float32, family="archzoo").eval()
    plain = archzoo.build(model.config.model_copy(update={"mtp": None}))
    total = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert archzoo.cost(model.config).params == total
    assert archzoo.cost(plain.config).params == total - sum(p.numel() for p in model.mtp.parameters())
    assert archzoo.cost(plain.config).active_params == archzoo.cost(model.config).active_params
    archzoo.save(model, tmp_path / "m")
    again = archzoo.load(tmp_path / "m")
    assert again.config.mtp == model.config.mtp
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_loads_of_mtp_layers_count(tokens: Tokens) -> None:
    data = archzoo.config("deepseek-moe-16b").tiny().override("layers.override.0.ffn.selection_bias=true")
    model = archzoo.build(ModelConfig.from_dict(data.model_dump() | {"mtp": {}})).train()
    ids = tokens(2, 10)
    out = model(ids, labels=ids)
    assert out.aux["load"].sum(-1).tolist() == [2 * 10 * 2, 2 * 9 * 2]
    for router, load in zip((model.layers[1].ffn, model.mtp[0].layer.ffn), out.aux["load"], strict=True):
        assert torch.equal(router.load, load)


# --- drafting ----------------------------------------------------------------------------------------


def agreeing(model: CausalLM) -> CausalLM:
    """Make drafts right most of the time: modules that pass the embedding on, layers that do little."""
    with torch.no_grad():
        for layer in (*model.layers, *(module.layer for module in model.mtp)):
            for name, param in layer.named_parameters():
                if "norm" not in name:
                    param.mul_(0.2)
        for module in model.mtp:
            d = model.config.hidden_size
            module.eh_proj.weight.copy_(torch.cat((torch.eye(d), 0.02 * torch.eye(d)), 1))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("good", [False, True])
def test_tokens_are_those_of_plain_greedy_decoding(name: str, depth: int, good: bool) -> None:
    model = build(name, depth).eval()
    if good:
        model = agreeing(model)
    for prompts in ([[5, 9, 200, 31, 7]], [[1], [2, 3, 4, 5, 6, 7], [9, 9, 8]]):
        for new in (1, 2, 3, 20):
            plain = archzoo.generate(model, prompts, new)
            assert torch.equal(archzoo.generate(model, prompts, new, use_mtp=True), plain)
        chunked = archzoo.generate(model, prompts, 20, use_mtp=True, prefill_chunk=2)
        assert torch.equal(chunked, plain)


def test_good_drafts_save_passes_and_stops_end_rows() -> None:
    model = agreeing(build(depth=2)).eval()
    passes = 0

    def count(module: torch.nn.Module, args: object, out: object) -> None:
        nonlocal passes
        passes += 1

    model.layers[0].register_forward_hook(count)
    prompts = [[5, 9], [7, 1]]
    plain = archzoo.generate(model, prompts, 16)
    assert passes == 16
    passes, seen = 0, []
    got = archzoo.generate(model, prompts[:1], 16, use_mtp=True, callback=lambda t: seen.append(t.tolist()))
    assert passes < 12
    assert [t for (t,) in seen] == got[0, 2:].tolist()
    for stop in plain[:, 6].tolist():
        options = {"stop_tokens": [stop], "pad_token_id": 255}
        expected = archzoo.generate(model, prompts, 16, **options)
        assert torch.equal(archzoo.generate(model, prompts, 16, use_mtp=True, **options), expected)


def test_what_cannot_draft_is_refused() -> None:
    with pytest.raises(InputError, match="has no MTP modules"):
        archzoo.generate(archzoo.build(archzoo.config("llama-3.2-1b").tiny()), [[1]], 2, use_mtp=True)
    with pytest.raises(InputError, match=r"use_mtp decodes greedily, found temperature 0\.5"):
        archzoo.generate(build(), [[1]], 2, use_mtp=True, temperature=0.5)
    with pytest.raises(InputError, match="needs a cache that can be truncated"):
        archzoo.generate(build("mamba2-130m", 1, torch.float32), [[1]], 2, use_mtp=True)


@pytest.mark.parametrize("target", ["mla", "moe"])
def test_conversion_leaves_the_modules_out(target: str) -> None:
    new = archzoo.convert(build(depth=1), target)
    assert new.config.mtp is None
    assert len(new.mtp) == 0
