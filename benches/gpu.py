"""On a GPU: the Triton kernels against torch, eager and compiled; models and loading against transformers.

python benches/gpu.py [case ...]
"""

from __future__ import annotations

import gc
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from harness import Row, hf_step, report  # isort: skip
import harness
import torch
from models import llama_peer
from moe import EXPERTS, TOP_K, layers
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo
from archzoo.ops import conv, norm

DTYPE = torch.bfloat16
WARMUP, ROUNDS = 3, 15
FLUSH = 2**28  # bytes written between two runs of a kernel, so that its inputs are not in the L2 cache


def timed(
    runs: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, flush: bool = False
) -> dict[str, float]:
    """Median seconds by events of the device; rounds alternate between the runs."""
    block = torch.empty(FLUSH if flush else 0, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARMUP + rounds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            block.zero_()
            if flush:
                torch.cuda._sleep(4_000_000)  # 2 ms, in which the kernels are launched: only they are timed
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            if turn >= WARMUP:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidth() -> float:
    """Bytes/s, read and written, of a copy of 2 GB."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed({"copy": lambda: b.copy_(a)})["copy"]


def gemm_rate() -> float:
    """FLOP/s of a product of two 8192 x 8192 bfloat16 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    return 2 * 8192**3 / timed({"gemm": lambda: a @ b})["gemm"]


best = partial(harness.best, unit="us")


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=grad)


def backward(out: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> Callable[[], object]:
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def kernels() -> list[Row]:
    """Each kernel, forward and backward, against the compiled definition and what torch has."""
    rate, rows = bandwidth(), []

    def compare(
        case: str,
        ours: Callable[..., Tensor | tuple[Tensor, ...]],
        peers: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]],
        inputs: list[Tensor],
    ) -> None:
        runs = {"ours": ours} | peers
        with torch.no_grad():
            out = ours(*inputs)
            times = timed({name: partial(f, *inputs) for name, f in runs.items()}, flush=True)
        read = sum(t.nbytes for t in inputs)
        written = sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)))
        rows.append(best(f"{case}, forward", times, (read + written) / rate, "copy bandwidth"))
        steps = {name: backward(f(*inputs), inputs) for name, f in runs.items()}
        times = timed(steps, flush=True)
        rows.append(best(f"{case}, backward", times, (2 * read + written) / rate, "copy bandwidth"))

    for d in (2048, 4096, 8192):
        x, r, w = randn(16384, d, grad=True), randn(16384, d, grad=True), randn(d, grad=True)
        compare(
            f"RMSNorm [16384, {d}]",
            norm.rms_norm,
            {
                "compiled": torch.compile(norm.rms_norm_reference),
                "F.rms_norm": lambda x, w, d=d: F.rms_norm(x, (d,), w, 1e-5),
            },
            [x, w],
        )
        compare(
            f"sum and RMSNorm [16384, {d}]",
            norm.add_rms_norm,
            {"compiled": torch.compile(norm.add_rms_norm_reference)},
            [x, r, w],
        )
        torch._dynamo.reset()
    for size in (512, 4096):
        compare(
            f"gated RMSNorm [16384, 4096], groups of {size}",
            partial(norm.gated_rms_norm, group_size=size),
            {"compiled": torch.compile(partial(norm.gated_rms_norm_reference, group_size=size))},
            [randn(16384, 4096, grad=True), randn(16384, 4096, grad=True), randn(4096, grad=True)],
        )
        torch._dynamo.reset()
    x, w, b = randn(4, 4096, 4352, grad=True), randn(4352, 4, grad=True), randn(4352, grad=True)

    def torch_conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv1d(x.transpose(1, 2), w[:, None], b, padding=3, groups=w.shape[0])[..., : x.shape[1]]
        return F.silu(y).transpose(1, 2)

    compare(
        "causal convolution [4, 4096, 4352]",
        conv.causal_conv1d,
        {"F.conv1d": torch_conv, "compiled": torch.compile(conv.causal_conv1d_reference)},
        [x, w, b],
    )
    with torch.no_grad():
        x, state = randn(256, 4352), randn(256, 4, 4352)
        step = torch.compile(conv.causal_conv1d_step_reference)
        runs = {"ours": conv.causal_conv1d_step, "compiled": step}
        times = timed({name: partial(f, x, state, w, b) for name, f in runs.items()}, flush=True)
    floor = (2 * x.nbytes + 2 * state.nbytes) / rate
    return [*rows, best("convolution, a step of 256 sequences", times, floor, "copy bandwidth")]


def tokens(batch: int, length: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (batch, length), device="cuda")


def steps(model: archzoo.CausalLM, ids: Tensor, count: int) -> Callable[[], None]:
    cache = model.new_cache(len(ids), 8192)
    model(ids, cache=cache)

    def run() -> None:
        for _ in range(count):
            model(ids[:, :1], cache=cache)

    return run


def peer_steps(model: nn.Module, ids: Tensor, count: int) -> Callable[[], None]:
    past = hf_step(model, ids)[1]

    def run() -> None:
        for _ in range(count):
            hf_step(model, ids[:, :1], past)

    return run


def models() -> list[Row]:
    """Prefill, decode and a training step of whole models in bfloat16."""
    rate, copied, rows, count = gemm_rate(), bandwidth(), [], 8
    name = "llama-3.2-1b"
    ours = archzoo.build(name, device="cuda", dtype=DTYPE).eval()
    with torch.device("cuda"):
        peer = llama_peer(name, DTYPE)
    vocab, cost = ours.config.vocab_size, archzoo.cost(name, 2048)
    with torch.inference_mode():
        x = tokens(4, 2048, vocab)
        head = 2 * ours.head_weight.numel() * (2048 - 1)
        times = timed({"ours": partial(ours, x), "transformers": partial(peer, x)}, 7)
        floor = 4 * (cost.prefill_flops + head) / rate
        rows.append(best(f"{name}, prefill 4 x 2048", times, floor, "GEMM rate"))
        for batch in (1, 32):
            x = tokens(batch, 512, vocab)
            runs = {"ours": steps(ours, x, count), "transformers": peer_steps(peer, x, count)}
            times = {k: v / count for k, v in timed(runs, 7).items()}
            floor = cost.active_params * DTYPE.itemsize / copied if batch == 1 else 0.0
            rows.append(best(f"{name}, decode, batch {batch}", times, floor, "active weights read"))
    x = tokens(2, 2048, vocab)

    def train(model: nn.Module, x: Tensor = x) -> None:
        model(x, labels=x).loss.backward()
        model.zero_grad(set_to_none=True)

    runs = {"ours": partial(train, ours.train()), "transformers": partial(train, peer.train())}
    floor = 6 * cost.active_params * x.numel() / rate
    rows.append(best(f"{name}, forward + backward 2 x 2048", timed(runs, 5), floor, "GEMM rate"))
    return rows


def hybrid() -> list[Row]:
    """A Zebra hybrid against the Llama that it came from, decoding at a long context."""
    from archzoo.cli.demo import fill

    rows, copied, count = [], bandwidth(), 8
    names = {"ours": "zebra-llama-1b-4mla-12m2", "Llama in archzoo": "llama-3.2-1b"}
    for batch, length in ((1, 16384), (16, 16384)):
        runs = {}
        with torch.inference_mode():
            for label, name in names.items():
                model = archzoo.build(name, device="cuda", dtype=DTYPE).eval()
                cache = model.new_cache(batch, length + 512)
                fill(cache, length)

                def run(model: nn.Module = model, cache: object = cache, batch: int = batch) -> None:
                    for _ in range(count):
                        model(torch.zeros(batch, 1, dtype=torch.long, device="cuda"), cache=cache)

                runs[label] = run
            times = {k: v / count for k, v in timed(runs, 7).items()}
        cost = archzoo.cost(names["ours"], length, batch)
        floor = (cost.weight_bytes + cost.cache_bytes) / copied
        rows.append(best(f"Zebra 1B, decode, batch {batch} at {length}", times, floor, "weights, cache read"))
    return rows


def moe() -> list[Row]:
    """A layer of 64 experts, top 6, against transformers' backends."""
    rate, copied, rows = gemm_rate(), bandwidth(), []
    hidden, width = 2048, 1024
    expert = 3 * hidden * width
    for count in (1, 64, 1024, 16384):
        x = randn(1, count, hidden)
        with torch.device("cuda"):
            modules = layers(DTYPE, count, hidden, width)
        read = min(count * TOP_K, EXPERTS) * expert * DTYPE.itemsize / copied
        flops = 2 * count * TOP_K * expert / rate
        what = "weights read" if read > flops else "GEMM rate"
        with torch.inference_mode():
            times = timed({name: partial(m, x) for name, m in modules.items()})
        rows.append(best(f"64 experts, top 6, {count} tokens, forward", times, max(read, flops), what))

        def step(module: nn.Module, x: Tensor = x) -> None:
            module.zero_grad(set_to_none=True)
            module(x).float().square().mean().backward()

        kept = {name: partial(step, m) for name, m in modules.items() if name in ("ours", "grouped_mm")}
        floor = 3 * max(read, flops)
        rows.append(best(f"64 experts, top 6, {count} tokens, both", timed(kept), floor, what))
    return rows


def load() -> list[Row]:
    """llama-3.2-1b in bfloat16 from a warm file into a new model on the GPU."""
    from transformers import AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp())
    try:
        archzoo.save(archzoo.build("llama-3.2-1b", dtype=DTYPE), folder)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))

        def seconds(run: Callable[[], object]) -> float:
            start = time.perf_counter()
            kept = run()
            torch.cuda.synchronize()
            del kept
            return time.perf_counter() - start

        runs: dict[str, Callable[[], object]] = {
            "ours": lambda: archzoo.load(folder, device="cuda"),
            "transformers": lambda: AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPE, device_map="cuda"
            ),
        }
        times = {name: statistics.median(seconds(run) for _ in range(5)) for name, run in runs.items()}
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device="cuda")
        link = host.nbytes / timed({"copy": lambda: there.copy_(host)})["copy"]
        return [best("load llama-3.2-1b", times, size / link, "pinned copy to the GPU")]
    finally:
        shutil.rmtree(folder)


CASES = {f.__name__: f for f in (kernels, moe, models, hybrid, load)}


def main() -> None:
    warnings.filterwarnings("ignore")
    notes = {"bf16 GEMM, TFLOP/s": gemm_rate() / 1e12, "copy, GB/s read and written": bandwidth() / 1e9}
    for name in sys.argv[1:] or list(CASES):
        report(f"gpu-{name}", CASES[name](), notes)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
