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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import Row, interleaved, report  # isort: skip
import numpy as np
from corpus import documents

import archzoo
from archzoo.data import write_pack


@dataclass
class Ids:
    ids: Any
    offsets: Any


class Free:
    """An encoder that takes no time: the ids of a document are always the same."""

    vocab_size, hash = 256, "free"
    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def encode_batch(self, texts: Any, add_special_tokens: bool = True, /) -> Ids:
        n = len(texts)
        return Ids(np.zeros(n * self.tokens, np.uint32), np.arange(n + 1) * self.tokens)


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
    encoders: dict[str, Callable[[], Callable[[], Any]]] = {
        "fresh text": lambda: [archzoo.Tokenizer.from_file(vocabulary) for _ in range(rounds + 1)].pop,
        "known words": lambda: lambda: known,
    }

    def encode(next_encoder: Callable[[], Any]) -> None:
        next_encoder().encode_batch(texts)

    def pack(source: str, next_encoder: Callable[[], Any]) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        write_pack([folder / source], next_encoder(), folder / "out")

    inputs = ("a.jsonl", "a.jsonl.gz", "text")
    rows, alone = [], 0.0

    def add(source: str, encoder: str, seconds: float, goal: float) -> None:
        case, rate = f"pack {source}, {mean} bytes, {encoder}", size / 1e6 / seconds
        rows.append(Row(case, "MB/s", rate, alone, "the encoder alone", rate / alone, goal, 0.0, ""))

    for encoder, make in encoders.items():
        seconds = interleaved(
            {"alone": partial(encode, make())} | {s: partial(pack, s, make()) for s in inputs}, rounds
        )
        alone = size / 1e6 / seconds["alone"]
        for source in inputs:
            add(source, encoder, seconds[source], 0.8)
    seconds = interleaved({s: partial(pack, s, lambda: Free(mean // 4)) for s in inputs}, rounds)
    for source in inputs:
        add(source, "no encoding", seconds[source], 0.0)
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
