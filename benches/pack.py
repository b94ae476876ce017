"""Packing end to end (read, encode, write, hash, sync) against the encoder alone on the same documents.

python benches/pack.py [--tokenizer tokenizer.json] [--file TEXT] [--megabytes 40] [--rounds 3]

Without --tokenizer a vocabulary is learnt from the text. Its documents are packed as they are, and joined to
2 KB each. The encoders are a tokenizer that sees the text for the first time in every run, one that knows its
words, and one that takes no time: what packing itself can do, beside the second one alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import Row, interleaved, report  # isort: skip
import numpy as np
from corpus import documents

import archzoo
from archzoo.data import write_pack


class Free:
    """An encoder that takes no time: the ids of a document are always the same."""

    vocab_size, hash = 256, "free"
    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def encode_documents(self, texts: Any, *_: Any) -> tuple[Any, Any]:
        n = len(texts)
        return np.zeros(n * self.tokens, np.uint16), np.arange(n + 1) * self.tokens


def joined(texts: list[str], size: int) -> list[str]:
    """Documents of at least that many characters."""
    found, held, length = [], [], 0
    for text in texts:
        held.append(text)
        length += len(text)
        if length >= size:
            found.append("\n\n".join(held))
            held, length = [], 0
    return [*found, "\n\n".join(held)] if held else found


def compare(texts: list[str], vocabulary: Path, folder: Path, rounds: int) -> list[Row]:
    """Rows of documents of one kind, whose files go into `folder`."""
    size = sum(len(text.encode()) for text in texts)
    mean = size // len(texts)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "text").mkdir(parents=True)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 6))
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:07d}.txt").write_text(text, encoding="utf-8", newline="")
    known = archzoo.Tokenizer.from_file(vocabulary)

    # Tokenizers are made before the clock runs, one for each run.
    def fresh() -> Callable[[], Any]:
        return [archzoo.Tokenizer.from_file(vocabulary) for _ in range(rounds + 1)].pop

    def encode(next_encoder: Callable[[], Any]) -> None:
        next_encoder().encode_batch(texts)

    def pack(source: str, next_encoder: Callable[[], Any]) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        write_pack([folder / source], next_encoder(), folder / "out")

    # The packing one, the one alone, and the goal.
    encoders: dict[str, tuple[Callable[[], Any], Callable[[], Any], float]] = {
        "fresh text": (fresh, fresh, 0.8),
        "known words": (lambda: lambda: known, lambda: lambda: known, 0.8),
        "no encoding": (lambda: lambda: Free(mean // 4), lambda: lambda: known, 0.0),
    }
    inputs, rows = ("a.jsonl", "a.jsonl.gz", "text"), []
    for encoder, (packing, alone, goal) in encoders.items():
        runs = {"alone": partial(encode, alone())} | {s: partial(pack, s, packing()) for s in inputs}
        seconds = interleaved(runs, rounds)
        rates = {run: size / 1e6 / time for run, time in seconds.items()}
        for source in inputs:
            case, ratio = f"pack {source}, {mean} bytes, {encoder}", rates[source] / rates["alone"]
            rows.append(
                Row(case, "MB/s", rates[source], rates["alone"], "the encoder alone", ratio, goal, 0.0, "")
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--file")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = documents(options.megabytes, options.file)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = options.tokenizer or folder / "tokenizer.json"
        if options.tokenizer is None:
            archzoo.train_bpe(texts, 32_000, vocabulary)
        rows = []
        for kind, chosen in {"short": texts, "long": joined(texts, 2000)}.items():
            rows += compare(chosen, vocabulary, folder / kind, options.rounds)
    notes = {"megabytes": sum(len(text.encode()) for text in texts) / 1e6, "documents": float(len(texts))}
    report("pack", rows, notes)


if __name__ == "__main__":
    main()
