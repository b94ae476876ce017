"""Load balancing on real text: tiny mixtures of experts on the bytes of the Python manual.

python benches/balance.py [steps]

All variants have the same experts' parameters and use the same share of them for a token: eight experts of
width 128, top two (GShard), or DeepSeekMoE's cut of them into one shared and 31 routed experts of width 32,
top seven. Writes balance.json, balance.png (violation over the steps) and balance-load.png (loads on held-out
text) to benches/results/local.
"""

from __future__ import annotations

import math
import sys
import time

from harness import CONSOLE, write_results  # isort: skip
import numpy as np
import torch
from rich.table import Table

import archzoo
from archzoo.cli.plots import plot_lines, plot_loads
from archzoo.data import TokenBlocks, python_manual_text
from archzoo.distill import perplexity

D, LAYERS, SEQ_LEN, BATCH = 128, 4, 128, 8
FINE = {"kind": "moe", "experts": 31, "top_k": 7, "hidden": 32, "shared": 1}
BIASED = FINE | {"score": "sigmoid", "selection_bias": True, "renormalize": True}
GSHARD = {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 128, "renormalize": True, "sample_second": True}
VARIANTS = {
    "DeepSeekMoE, no balancing": (FINE, 0.0),
    "DeepSeekMoE, expert loss 0.01": (FINE | {"balance": {"expert": 0.01}}, 0.0),
    "DeepSeek-V3 router, no balancing": (BIASED, 0.0),
    "DeepSeek-V3 router, bias updates": (BIASED, 0.01),
    "GShard top 2, loss 0.01, capacity 1.25": (
        GSHARD | {"balance": {"switch": 0.01}, "capacity": {"factor": 1.25}},
        0.0,
    ),
}


def config(ffn: dict[str, object]) -> archzoo.ModelConfig:
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 4, "head_dim": 32, "rope": {"theta": 10000.0}}
    return archzoo.ModelConfig.from_dict(
        {
            "vocab_size": 256,
            "hidden_size": D,
            "max_positions": SEQ_LEN,
            "init_std": 0.05,
            "layers": {"count": LAYERS, "default": {"mixer": mixer, "ffn": ffn}},
        }
    )


def text(split: str) -> np.ndarray:
    return np.frombuffer(python_manual_text(split).encode(), np.uint8)


def train(ffn: dict[str, object], rate: float, steps: int) -> dict[str, object]:
    model = archzoo.build(config(ffn)).train()
    blocks = TokenBlocks(text("train"), SEQ_LEN - 1, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    violation, dropped = [], []
    start = time.perf_counter()
    for _ in range(steps):
        ids, following = blocks.next_batch(BATCH)
        ids = torch.cat((ids, following[:, -1:]), 1)
        out = model(ids, labels=ids)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if rate:
            model.update_router_bias(rate)
        violation.append(out.aux["max_violation"].mean().item())
        dropped.append(out.aux["dropped"].mean().item())
    seconds = time.perf_counter() - start
    valid = text("valid")
    held_out = math.log(perplexity(model.eval(), valid, SEQ_LEN - 1, 16384)[0])
    with torch.no_grad():
        rows = torch.stack([TokenBlocks(valid, SEQ_LEN - 1)[i] for i in range(64)])
        aux = model(rows).aux
    return {
        "params": archzoo.cost(model.config).params,
        "active": archzoo.cost(model.config).active_params,
        "held_out_nats_per_byte": held_out,
        "violation": violation,
        "dropped": sum(dropped) / steps,
        "held_out_violation": aux["max_violation"].tolist(),
        "held_out_load": aux["load"].tolist(),
        "seconds": seconds,
    }


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    results = {name: train(*variant, steps) for name, variant in VARIANTS.items()}
    table = Table(title=f"balance: {steps} steps of {BATCH * SEQ_LEN} bytes")
    for column in (
        "variant",
        "parameters",
        "held-out nats/byte",
        "violation, last tenth",
        "held out",
        "dropped",
        "s",
    ):
        table.add_column(column)
    for name, r in results.items():
        last = r["violation"][-max(1, steps // 10) :]
        table.add_row(
            name,
            f"{r['params']:,}",
            f"{r['held_out_nats_per_byte']:.4f}",
            f"{sum(last) / len(last):.2f}",
            f"{max(r['held_out_violation']):.2f}",
            f"{100 * r['dropped']:.1f}%",
            f"{r['seconds']:.0f}",
        )
    CONSOLE.print(table)
    folder = write_results("balance", {"steps": steps, "variants": results})
    smooth = {name: [float(np.mean(r["violation"][max(0, i - 9) : i + 1])) for i in range(steps)]
              for name, r in results.items()}  # fmt: skip
    plot_lines(
        folder / "balance.png",
        range(1, steps + 1),
        smooth,
        "step",
        "largest load / mean load - 1, mean of layers",
        x_log=False,
        y_log=False,
    )
    plot_loads(folder / "balance-load.png", {name: r["held_out_load"] for name, r in results.items()})


if __name__ == "__main__":
    main()
