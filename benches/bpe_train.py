"""Training of a byte-level BPE vocabulary against Hugging Face tokenizers, same texts, same merges.

python benches/bpe_train.py [--file TEXT] [--megabytes 20] [--vocab-size 32000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json

from harness import Row, interleaved, report  # isort: skip
import tokenizers
from corpus import documents
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

import archzoo
from archzoo.data.bpe import PATTERNS


def peer(texts: list[str], vocab_size: int, pattern: str) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer.to_str()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--file")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = documents(options.megabytes, options.file)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows, notes = [], {"documents": float(len(texts)), "megabytes": megabytes}
    for pattern in ("llama3", "gpt2"):
        results: dict[str, str] = {}

        def ours(pattern: str = pattern, results: dict[str, str] = results) -> None:
            results["ours"] = archzoo.train_bpe(texts, options.vocab_size, pattern=pattern)

        def theirs(pattern: str = pattern, results: dict[str, str] = results) -> None:
            results["peer"] = peer(texts, options.vocab_size, pattern)

        seconds = interleaved({"ours": ours, "peer": theirs}, options.rounds, 0)
        if json.loads(results["ours"]) != json.loads(results["peer"]):
            raise SystemExit(f"{pattern}: the two tokenizers differ")
        a, b = seconds["ours"], seconds["peer"]
        case = f"{options.vocab_size // 1000}k on {megabytes:.0f} MB, {pattern}"
        rows.append(Row(case, "s", a, b, f"tokenizers {tokenizers.__version__}", b / a, 1.0, 0.0, ""))
    report("bpe_train", rows, notes)


if __name__ == "__main__":
    main()
