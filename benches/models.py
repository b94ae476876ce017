"""Whole models on a CPU against transformers in the same process: training, prefill, decode, build, import.

python benches/models.py [case ...]
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

from harness import Row, batch1_linears, gemm_rate, hf_step, interleaved, read_bandwidth, report  # isort: skip
import torch
from torch import nn

import archzoo
from archzoo.cli.demo import fill
from archzoo.configuration import ModelConfig

PROMPT = 256
STEPS = 16


def llama_peer(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of a dense config of the zoo, random weights."""
    from transformers import AutoModelForCausalLM

    from archzoo.checkpoint.families import families

    cfg = archzoo.config(name)
    hf = families()[cfg.family].write(cfg)["config.json"]
    from transformers import AutoConfig

    config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ids(batch: int, length: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def train() -> list[Row]:
    """Forward + backward of SmolLM2-135M with the language-model loss."""
    ours, peer = archzoo.build("smollm2-135m").train(), llama_peer("smollm2-135m").train()
    x = ids(1, 512, ours.config.vocab_size)

    def run(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            model(x, labels=x).loss.backward()
            model.zero_grad(set_to_none=False)

        return step

    t = interleaved({"ours": run(ours), "peer": run(peer)}, 5)
    active = sum(p.numel() for p in ours.parameters())
    share = 6 * active * x.numel() / t["ours"] / gemm_rate()
    return [
        Row(
            "SmolLM2-135M forward + backward, 512 tokens",
            "tok/s",
            x.numel() / t["ours"],
            x.numel() / t["peer"],
            "transformers",
            t["peer"] / t["ours"],
            1.0,
            share,
            "fp32 GEMM rate",
        )
    ]


@torch.inference_mode()
def decode_times(name: str) -> tuple[dict[str, float], archzoo.CausalLM]:
    """Seconds per token of cached decode after a prompt."""
    ours, peer = archzoo.build(name).eval(), llama_peer(name)
    x = ids(1, PROMPT, ours.config.vocab_size)
    cache = ours.new_cache(1, PROMPT + 64 * STEPS)
    ours(x, cache=cache)
    past, token = hf_step(peer, x)[1], x[:, :1]

    def run_ours() -> None:
        for _ in range(STEPS):
            ours(token, cache=cache)

    def run_peer() -> None:
        for _ in range(STEPS):
            hf_step(peer, token, past)

    t = interleaved({"ours": run_ours, "peer": run_peer}, 9)
    return {k: v / STEPS for k, v in t.items()}, ours


def decode_row(name: str, label: str, goal: float) -> Row:
    t, ours = decode_times(name)
    weights = sum(p.nbytes for p in ours.parameters())
    matrices = [p.detach() for p in ours.parameters() if p.dim() == 2]
    print(f"{name}: torch's batch-1 linears alone {1e3 * batch1_linears(matrices):.1f} ms")
    share = weights / t["ours"] / read_bandwidth()
    return Row(
        f"{label} decode, batch 1",
        "tok/s",
        1 / t["ours"],
        1 / t["peer"],
        "transformers",
        t["peer"] / t["ours"],
        goal,
        share,
        "read bandwidth",
    )


def decode() -> list[Row]:
    """Cached decode of SmolLM2-135M."""
    return [decode_row("smollm2-135m", "SmolLM2-135M", 1.15)]


@torch.inference_mode()
def mamba() -> list[Row]:
    """mamba2-130m: prefill and decode."""
    ours, peer = archzoo.build("mamba2-130m").eval(), llama_peer("mamba2-130m")
    x = ids(1, PROMPT, ours.config.vocab_size)
    t = interleaved({"ours": partial(ours, x), "peer": partial(peer, x)}, 7)
    head = 2 * ours.head_weight.numel() * (PROMPT - 1)  # cost counts the last token's logits only
    share = (archzoo.cost("mamba2-130m", PROMPT).prefill_flops + head) / t["ours"] / gemm_rate()
    row = Row(
        f"mamba2-130m prefill, {PROMPT} tokens",
        "tok/s",
        PROMPT / t["ours"],
        PROMPT / t["peer"],
        "transformers",
        t["peer"] / t["ours"],
        1.7,
        share,
        "fp32 GEMM rate",
    )
    return [row, decode_row("mamba2-130m", "mamba2-130m", 1.5)]


def zebra_of_smollm2(max_positions: int) -> tuple[ModelConfig, ModelConfig]:
    """The demo's hybrid shape and its teacher, with room for long contexts."""
    teacher = archzoo.config("smollm2-135m").override(f"max_positions={max_positions}")
    mixer = teacher.layers.default.mixer.model_dump()
    heads, kv_heads, dim = mixer["heads"], mixer["kv_heads"], mixer["head_dim"]
    data = teacher.model_dump()
    mla = {
        "kind": "mla",
        "heads": heads,
        "kv_heads": kv_heads,
        "q_rank": 376,
        "kv_rank": 96,
        "nope_dim": dim // 2,
        "rope_dim": dim // 2,
        "v_dim": dim,
        "latent_norm": False,
        "rope": {"theta": 100000.0, "interleaved": True},
    }
    data["layers"]["default"]["mixer"] = {
        "kind": "mamba2",
        "heads": heads,
        "head_dim": dim,
        "state_size": dim,
        "groups": heads,
        "kv_heads": kv_heads,
    }
    data["layers"]["override"] = [{"indices": [1, 5, 9, 13, 17, 21, 25, 28], "mixer": mla}]
    return ModelConfig.from_dict(data | {"name": "zebra-smollm2-135m"}), teacher


@torch.inference_mode()
def hybrid() -> list[Row]:
    """The Zebra hybrid of SmolLM2-135M against its own teacher at 512, 4k and 16k tokens of context."""
    rows = []
    student_config, teacher_config = zebra_of_smollm2(32768)
    student, teacher = archzoo.build(student_config).eval(), archzoo.build(teacher_config).eval()
    token = torch.zeros(1, 1, dtype=torch.long)
    bandwidth = read_bandwidth()
    for length, goal in ((512, 0.0), (4096, 0.0), (16384, 1.7)):
        runs = {}
        for name, model in (("ours", student), ("peer", teacher)):
            cache = model.new_cache(1, length + 256)
            fill(cache, length)

            def run(model: nn.Module = model, cache: object = cache) -> None:
                for _ in range(STEPS // 2):
                    model(token, cache=cache)

            runs[name] = run
        t = {k: v / (STEPS // 2) for k, v in interleaved(runs, 7).items()}
        cost = archzoo.cost(student_config, length, dtype="float32")
        share = (cost.weight_bytes + cost.cache_bytes) / t["ours"] / bandwidth
        rows.append(
            Row(
                f"Zebra hybrid of SmolLM2-135M decode at {length}",
                "tok/s",
                1 / t["ours"],
                1 / t["peer"],
                "its teacher in archzoo",
                t["peer"] / t["ours"],
                goal,
                share,
                "read bandwidth",
            )
        )
    return rows


def build() -> list[Row]:
    """Building llama-3.2-1b with random weights."""

    def ours() -> None:
        archzoo.build("llama-3.2-1b")
        gc.collect()

    def peer() -> None:
        llama_peer("llama-3.2-1b")
        gc.collect()

    t = interleaved({"ours": ours, "peer": peer}, 3)
    return [
        Row(
            "build llama-3.2-1b",
            "s",
            t["ours"],
            t["peer"],
            "transformers",
            t["peer"] / t["ours"],
            1.0,
            0.0,
            "",
        )
    ]


def imports() -> list[Row]:
    """Seconds that `import archzoo` adds to `import torch` (ratio: 0.3 s over the addition)."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    runs = {"torch": "import torch", "both": "import torch, archzoo"}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, code in runs.items():
            times[name].append(seconds(code))
    base, both = (statistics.median(times[name]) for name in runs)
    added = max(both - base, 1e-3)
    return [
        Row("import torch, archzoo", "s", both, base, "import torch", 0.3 / added, 1.0, 0.0, "0.3 s allowed")
    ]


CASES = {f.__name__: f for f in (train, decode, mamba, hybrid, build, imports)}


def main() -> None:
    warnings.filterwarnings("ignore")
    chosen = sys.argv[1:] or list(CASES)
    rows = []
    for name in chosen:
        rows += CASES[name]()
        gc.collect()
    report(
        "models",
        rows,
        {"fp32 GEMM, GFLOP/s": gemm_rate() / 1e9, "read bandwidth, GB/s": read_bandwidth() / 1e9},
    )


if __name__ == "__main__":
    main()
