"""What `archzoo demo` leaves for a reader: report.md, its plots and metrics.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo.cli.plots import plot_lines

if TYPE_CHECKING:
    from archzoo.configuration import ModelConfig

Metrics = dict[str, Any]


def write_report(out: Path, metrics: Metrics, teacher: ModelConfig, student: ModelConfig) -> None:
    """metrics.json, four PNG files and report.md in the folder `out`."""
    from archzoo import costs

    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    losses = metrics["losses"]
    for name, chosen in (("ild", ("all-mla", "all-mamba2")), ("kd", ("hybrid",))):
        lines = {key: losses[key] for key in chosen if key in losses}
        steps = range(1, 1 + max(map(len, lines.values()), default=0))
        plot_lines(out / f"{name}.png", steps, lines, "step", "loss", x_log=False, y_log=False)
    contexts = [2**i for i in range(7, 18)]
    bytes_of = {
        name: [costs.cost(config, n).cache_bytes for n in contexts]
        for name, config in (("teacher", teacher), ("student", student))
    }
    plot_lines(
        out / "cache.png", contexts, bytes_of, "context (tokens)", "cache bytes of one sequence (bfloat16)"
    )
    timed, rates = metrics["settings"]["contexts"], metrics["decode_tokens_per_second"]
    plot_lines(out / "decode.png", timed, rates, "context (tokens)", "decode tokens/s", y_log=False)
    (out / "report.md").write_text(report(metrics, teacher.max_positions), encoding="utf-8")


def report_table(metrics: Metrics) -> str:
    """The comparison as a Markdown table."""
    teacher, student = (metrics["cost"][name] for name in ("teacher", "student"))
    perplexity, rates = metrics["perplexity"], metrics["decode_tokens_per_second"]
    rows = [("parameters", f"{teacher['params']:,}", f"{student['params']:,}")]
    rows.append(("held-out perplexity: teacher", f"{perplexity['teacher']:.2f}", ""))
    for name in ("initialised", "after ILD", "after KD"):
        rows.append((f"held-out perplexity: {name}", "", f"{perplexity[name]:.2f}"))
    for key, title in (
        ("cache_bytes_per_token", "KV bytes per token"),
        ("state_bytes", "constant state bytes"),
    ):
        rows.append((f"{title} (bfloat16)", f"{teacher[key]:,}", f"{student[key]:,}"))
    for i, context in enumerate(metrics["settings"]["contexts"]):
        of_teacher, of_student = rates["teacher"][i], rates["student"][i]
        rows.append((f"decode tokens/s at {context:,} tokens", f"{of_teacher:.1f}", f"{of_student:.1f}"))
    return "\n".join(
        ["| | teacher | student |", "|---|---:|---:|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )


def report(metrics: Metrics, max_positions: int) -> str:
    """report.md: what was done, the numbers as they came out, and what they do not show."""
    s, cost, layers = metrics["settings"], metrics["cost"], metrics["mla_layers"]
    tokens = metrics["tokens"]
    count = len(metrics["scores"])
    others, scored = count - len(layers), s["score_sequences"] * s["score_length"]
    ratio = cost["teacher"]["cache_bytes_per_token"] / cost["student"]["cache_bytes_per_token"]
    stages = "\n".join(
        f"| {stage['name']} | {stage['kind']} | {stage['steps']} "
        f"| {stage['seq_len'] * stage['batch_size'] * stage['accumulation']:,} "
        f"| {stage['train']} | {stage['lr']:g} |"
        for stage in s["stages"]
    )
    beyond = [f"{n:,}" for n in s["contexts"] if n + s["decode_steps"] > max_positions]
    note = (
        f"\nThe teacher was made for {max_positions:,} positions: at {', '.join(beyond)} only the time is "
        "measured, with that\nlimit lifted in both configs."
        if beyond
        else ""
    )
    seconds = "\n".join(f"| {name} | {value:.1f} |" for name, value in metrics["seconds"].items())
    samples = "\n\n".join(f"{name}:\n\n```text\n{text}\n```" for name, text in metrics["samples"].items())
    return f"""# A Zebra hybrid from a pretrained Llama

{report_table(metrics)}

The student has {len(layers)} MLA layers ({", ".join(map(str, layers))}) and {others} Mamba-2 layers;
its cache grows {ratio:.1f} times slower. `student/` holds it in the published Zebra layout; a fresh process
that loaded it computed identical logits.

## Steps

1. Convert every attention layer to MLA (SVD, latent width {s["kv_rank"]}) and, apart, to Mamba-2.
2. Align both with the teacher, layer by layer (ILD).
3. Score each layer by how much closer to the teacher it brings the Mamba-2 model as MLA (SMART's
   sensitivity, {scored:,} tokens); pick {len(layers)} evenly spread ones.
4. Assemble the hybrid from the aligned layers; distil it as a whole on the teacher's distributions (KD).

| stage | kind | steps | tokens a step | trains | peak learning rate |
|---|---|---:|---:|---|---:|
{stages}

![ILD losses](ild.png)
![KD loss](kd.png)

## Perplexity

On held-out text: {s["eval_tokens"]:,} of {tokens["held_out"]:,} tokens, {s["eval_length"]} at a time.
"initialised" is the hybrid of the same layers before any training. The training text has
{tokens["train"]:,} tokens, of which the steps above saw a part; the published models saw billions. Expect the
trend, not their quality.

## Cache

![cache](cache.png)

In bfloat16. The student's line starts at the constant state of its Mamba-2 layers.

## Decoding

![decode](decode.png)

One sequence in float32 on the CPU, median of {s["decode_steps"]} tokens. The cache has the size that a
prefill gives it but random content, which takes the same time.{note}

## Sample

Greedy continuation of "{s["prompt"]}".

{samples}

## Seconds

| step | seconds |
|---|---:|
{seconds}

A step that an earlier, interrupted run had finished shows only the time to read its result.
"""
