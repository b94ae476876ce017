"""Mixtures of experts on a CPU against transformers' fastest backend: a layer, and a small DeepSeek-V3.

python benches/moe.py [layer | model ...]
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from functools import partial

from harness import Row, best, gemm_rate, hf_step, interleaved, read_bandwidth, report  # isort: skip
import torch
from torch import nn

import archzoo
from archzoo import ModelConfig
from archzoo.blocks.ffns.moe import MoE, MoEConfig
from archzoo.blocks.registry import Site
from archzoo.checkpoint.families import families

HIDDEN, EXPERTS, TOP_K, WIDTH = 1024, 64, 6, 512
BACKENDS = ("grouped_mm", "eager", "batched_mm")
MOST_COPIED = 16  # batched_mm copies an expert for every assignment


def layers(dtype: torch.dtype, tokens: int, hidden: int = HIDDEN, width: int = WIDTH) -> dict[str, nn.Module]:
    """Our layer and transformers' by backend, with random weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = MoEConfig(experts=EXPERTS, top_k=TOP_K, hidden=width, renormalize=True)
    found: dict[str, nn.Module] = {"ours": MoE(config, Site(0, 1, hidden, 1e-6))}
    for backend in BACKENDS:
        if backend == "batched_mm" and tokens > MOST_COPIED:
            continue
        hf = Qwen3MoeConfig(
            hidden_size=hidden,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            moe_intermediate_size=width,
            norm_topk_prob=True,
        )
        hf._experts_implementation = backend
        found[backend] = Qwen3MoeSparseMoeBlock(hf)
    for module in found.values():
        for param in module.parameters():
            nn.init.normal_(param, 0.0, 0.02)
        module.to(dtype)
    return found


def layer() -> list[Row]:
    """Forward, and forward with backward, of one layer."""
    rate, bandwidth, rows = gemm_rate(), read_bandwidth(), []
    expert = 3 * HIDDEN * WIDTH
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 16, 256, 4096):
            x = torch.randn(1, tokens, HIDDEN, dtype=dtype)
            modules = layers(dtype, tokens)
            rounds = {1: 31, 16: 11, 256: 5, 4096: 3}[tokens]
            with torch.inference_mode():
                times = interleaved({name: partial(m, x) for name, m in modules.items()}, rounds)
            read = min(tokens * TOP_K, EXPERTS) * expert * dtype.itemsize / bandwidth
            flops = 2 * tokens * TOP_K * expert / rate
            name = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
            what = "weights read" if read > flops else "fp32 GEMM rate"
            rows.append(best(f"forward, {name}", times, max(read, flops), what, 1.2))

            def step(module: nn.Module, x: torch.Tensor = x) -> None:
                module.zero_grad(set_to_none=True)
                module(x).float().square().mean().backward()

            # eager makes a gradient of all experts for every expert
            kept = {n: m for n, m in modules.items() if n in ("ours", "grouped_mm")}
            times = interleaved({n: partial(step, m) for n, m in kept.items()}, min(rounds, 5))
            rows.append(best(f"forward + backward, {name}", times, 3 * max(read, flops), what, 1.2))
            del modules, kept
            gc.collect()
    return rows


def deepseek() -> ModelConfig:
    """The small DeepSeek-V3 of which `peers` have published figures: 32 M active parameters."""
    moe = {"kind": "moe", "experts": 64, "top_k": 6, "hidden": 256, "shared": 1}
    moe |= {"score": "sigmoid", "renormalize": True, "scale": 2.5, "selection_bias": True}
    mixer = {"kind": "mla", "heads": 8, "kv_heads": 8, "q_rank": 256, "kv_rank": 128}
    mixer |= {"nope_dim": 64, "rope_dim": 32, "v_dim": 64}
    first = {"indices": [0], "ffn": {"kind": "swiglu", "hidden": 1024}}
    pattern = {"count": 8, "default": {"mixer": mixer, "ffn": moe}, "override": [first]}
    data = {"vocab_size": 8192, "hidden_size": 512, "max_positions": 4096, "family": "deepseek_v3"}
    return ModelConfig.from_dict({**data, "norm_eps": 1e-6, "layers": pattern}, "moe bench")


def model() -> list[Row]:
    """Prefill of 256 tokens and cached decode of the small DeepSeek-V3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    slow_bfloat16 = not archzoo._rust.has_bfloat16()
    rate, bandwidth, rows = gemm_rate(), read_bandwidth(), []
    config = deepseek()
    hf = families()["deepseek_v3"].write(config)["config.json"]
    for dtype in (torch.float32, torch.bfloat16):
        ours = archzoo.build(config, dtype=dtype).eval()
        hf_config = AutoConfig.for_model(**hf)
        peer = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
        name = str(dtype).removeprefix("torch.")
        ids = torch.randint(8192, (8, 256), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            prompt = ids[:1]
            runs = {"ours": partial(ours, prompt), "transformers": partial(peer, prompt)}
            times = interleaved(runs, 7)
            goal = 1.3 if dtype == torch.float32 else 3.0 if slow_bfloat16 else 1.5
            head = 2 * ours.head_weight.numel() * 255  # cost counts the last token's logits only
            floor = (archzoo.cost(config, 256).prefill_flops + head) / rate
            rows.append(best(f"prefill 256 tokens, {name}", times, floor, "fp32 GEMM rate", goal))
            for batch, goal in ((1, 2.5), (8, 1.5)):
                start = ids[:batch]
                runs = {"ours": decode(ours, start), "transformers": peer_decode(peer, start)}
                times = {k: v / STEPS for k, v in interleaved(runs, 7).items()}
                active = archzoo.cost(config, 256, dtype=name).active_params * dtype.itemsize / bandwidth
                rows.append(
                    best(f"decode, batch {batch}, {name}", times, active, "active weights read", goal)
                )
        del ours, peer
        gc.collect()
    return rows


STEPS = 8


def decode(module: archzoo.CausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """STEPS tokens after a prompt; the cache goes back to the prompt each time."""
    cache = module.new_cache(ids.shape[0], ids.shape[1] + STEPS)
    module(ids, cache=cache)

    def run() -> None:
        for _ in range(STEPS):
            module(ids[:, :1], cache=cache)
        cache.truncate(ids.shape[1])

    return run


def peer_decode(module: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    cache = hf_step(module, ids)[1]

    def run() -> None:
        for _ in range(STEPS):
            hf_step(module, ids[:, :1], cache)
        cache.crop(-STEPS)

    return run


CASES = {f.__name__: f for f in (layer, model)}


def main() -> None:
    warnings.filterwarnings("ignore")
    rows = []
    for name in sys.argv[1:] or list(CASES):
        rows += CASES[name]()
    notes = {"fp32 GEMM, GFLOP/s": gemm_rate() / 1e9, "read bandwidth, GB/s": read_bandwidth() / 1e9}
    report("moe", rows, notes)


if __name__ == "__main__":
    main()
