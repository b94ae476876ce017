"""Byte-level BPE vocabularies learnt from text; the work is done in Rust."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from archzoo import _rust
from archzoo.data.files import replace_text
from archzoo.errors import InputError

PATTERNS = _rust.split_patterns()
PATTERNS["cl100k"] = PATTERNS["llama3"]  # the same cuts; tiktoken's own spelling means others to `tokenizers`


def train_bpe(
    texts: Iterable[str | PathLike[str]],
    vocab_size: int,
    out: str | PathLike[str] | None = None,
    *,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = ("<|endoftext|>",),
    min_frequency: int = 0,
) -> str:
    """Learn a byte-level BPE vocabulary.

    Vocabulary and merges are those that Hugging Face's `BpeTrainer` learns from the same texts with the whole
    byte alphabet. Memory is bounded by the distinct words.

    Args:
        texts: texts, as `str`, or UTF-8 files, as `Path`, in any mixture. No word spans two texts; files are
            read in blocks that end with a line.
        vocab_size: tokens in all: special tokens, 256 bytes and what is learnt; fewer if the text is short.
        out: write `tokenizer.json` here: the file, or a folder that exists.
        pattern: "gpt2", "cl100k", "llama3", "qwen2", "o200k", "tekken", or a regular expression.
        special_tokens: they get the first ids.
        min_frequency: pairs that occur less often are not merged.

    Returns:
        The text of `tokenizer.json`.
    """
    if isinstance(texts, str | PathLike):
        raise InputError(f"texts must be several texts or paths, found one: {texts!r:.80}")
    try:
        trainer = _rust.BpeTrainer(PATTERNS.get(pattern, pattern))
        for batch in _batches(texts):
            trainer.feed([text for text in batch if isinstance(text, str)])
            for path in batch:
                if not isinstance(path, str):
                    trainer.feed_file(path)
        content = trainer.train(vocab_size, list(special_tokens), min_frequency)
    except ValueError as error:
        raise InputError(str(error)) from None
    if out is not None:
        path = Path(out)
        path = path / "tokenizer.json" if path.is_dir() else path
        replace_text(path, content)
    return content


def _batches(texts: Iterable[str | PathLike[str]]) -> Iterator[list[str | PathLike[str]]]:
    """Enough texts to keep all threads busy, few enough to hold."""
    batch: list[str | PathLike[str]] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) if isinstance(text, str) else 0
        if size >= 1 << 24 or len(batch) == 1 << 16:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
