"""Packing end to end (read, encode, write, hash, sync) against the encoder alone on the same documents.

python benches/pack.py [--tokenizer tokenizer.json] [--file TEXT] [--megabytes 40] [--rounds 3]

Without --tokenizer a vocabulary is learnt from the text. The encoders are a tokenizer that sees the text for
the first time in every run, one that knows its words, and one that only copies bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
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


class Fast:
    """The least that an encoder can do: bytes as ids, so that everything else shows."""

    vocab_size, hash = 256, "bytes"
    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True, /) -> Ids:
        rows = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(rows), np.uint8).astype(np.uint32)
        return Ids(ids, np.cumsum([0, *map(len, rows)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--file")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = documents(options.megabytes, options.file)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = options.tokenizer or folder / "tokenizer.json"
        if options.tokenizer is None:
            archzoo.train_bpe(texts, 32_000, vocabulary)
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / "a.jsonl").write_text(lines, encoding="utf-8")
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 6))
        (folder / "text").mkdir()
        for i, text in enumerate(texts):
            (folder / "text" / f"{i:07d}.txt").write_text(text, encoding="utf-8", newline="")
        known = archzoo.Tokenizer.from_file(vocabulary)
        # Tokenizers are made before the clock runs, one for each run.
        encoders: dict[str, Callable[[], Callable[[], Any]]] = {
            "fresh text": lambda: (
                [archzoo.Tokenizer.from_file(vocabulary) for _ in range(options.rounds + 1)].pop
            ),
            "known words": lambda: lambda: known,
            "bytes": lambda: Fast,
        }

        def encode(next_encoder: Callable[[], Any]) -> None:
            next_encoder().encode_batch(texts)

        def pack(source: str, next_encoder: Callable[[], Any]) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            write_pack([folder / source], next_encoder(), folder / "out")

        inputs = ("a.jsonl", "a.jsonl.gz", "text")
        rows, notes = [], {"megabytes": size, "documents": float(len(texts))}
        for encoder, make in encoders.items():
            runs = {"alone": partial(encode, make())} | {s: partial(pack, s, make()) for s in inputs}
            seconds = interleaved(runs, options.rounds)
            alone = size / seconds["alone"]
            for source in inputs:
                rate = size / seconds[source]
                goal = 0.8 if encoder != "bytes" else 0.0
                case, what = f"pack {source}, {encoder}", "the encoder alone"
                rows.append(Row(case, "MB/s", rate, alone, what, rate / alone, goal, 0.0, ""))
    report("pack", rows, notes)


if __name__ == "__main__":
    main()
