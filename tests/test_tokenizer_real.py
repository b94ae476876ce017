"""The Rust tokenizer on real vocabularies at full size: equal ids on much real text and hostile strings.

`ARCHZOO_TEXTS=FOLDER pytest -m nightly tests/test_tokenizer_real.py` compares every `*.txt` below the folder
(without it the Python sources of installed packages) and 100,000 hostile strings for each vocabulary of
installed packages; without the marker one megabyte and 500 strings are compared.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from archzoo import Tokenizer
from test_tokenizer import hostile

tokenizers = pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))
from vocabularies import Vocabulary, ranks, vocabularies  # noqa: E402

Reference = Callable[[list[str]], list[list[int]]]
SENTENCEPIECE = ("mistral v1", "mistral v3", "mistral v7")
PART = 5000
"""Characters of one text: long enough for many pieces, short enough for both ends to matter."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    return {v.name: v for v in vocabularies(tmp_path_factory.mktemp("vocabularies"))}


def real_texts(limit: int) -> Iterator[str]:
    """Texts of at most `limit` characters together, from the start of as many files as there are."""
    if folder := os.environ.get("ARCHZOO_TEXTS"):
        files = sorted(Path(folder).rglob("*.txt"))
    else:
        names = ("torch", "transformers", "numpy")
        found = (p for name in names for p in importlib.metadata.files(name) or [] if p.suffix == ".py")
        files = [Path(str(p.locate())) for p in found]
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, min(len(text), limit), PART):
            yield text[start : start + PART]
        limit -= len(text)
        if limit <= 0:
            break


def broken_bytes(count: int) -> Iterator[bytes]:
    """Hostile strings with unpaired surrogates and cut characters among them."""
    rng = random.Random(1)
    for text in hostile(count, seed=1):
        at = rng.randint(0, len(text))
        middle = rng.choice(["\ud800", "\udfff", "\ud83d\ude00"]).encode("utf-8", "surrogatepass")
        start, end = text[:at].encode(), text[at:].encode()
        yield start[: len(start) - rng.randint(0, 2)] + middle + end[rng.randint(0, 2) :]


def tekken_reference(path: Path) -> Reference:
    """tiktoken over the tokens that Mistral's own library uses, behind the special ones."""
    tiktoken = pytest.importorskip("tiktoken")
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content["config"]
    special = config["default_num_special_tokens"]
    tokens = content["vocab"][: config["default_vocab_size"] - special]
    table = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
    encoding = tiktoken.Encoding("x", pat_str=config["pattern"], mergeable_ranks=table, special_tokens={})
    return lambda texts: [[special + id for id in ids] for ids in encoding.encode_ordinary_batch(texts)]


def reference(vocabulary: Vocabulary) -> Reference:
    if vocabulary.name == "tekken":
        return tekken_reference(vocabulary.path)
    if vocabulary.name in SENTENCEPIECE:
        sentencepiece = pytest.importorskip("sentencepiece")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
        return lambda texts: processor.encode(texts)
    if vocabulary.pattern is None:
        theirs = tokenizers.Tokenizer.from_file(str(vocabulary.path))
        theirs.no_padding()
        theirs.no_truncation()
        return lambda texts: [e.ids for e in theirs.encode_batch_fast(texts)]
    tiktoken = pytest.importorskip("tiktoken")
    table = ranks(vocabulary.path)
    encoding = tiktoken.Encoding("x", pat_str=vocabulary.regex, mergeable_ranks=table, special_tokens={})
    return lambda texts: encoding.encode_ordinary_batch(texts)


def compare(vocabulary: Vocabulary, texts: Iterator[str], raw: Iterator[bytes], cache: Path) -> str:
    ours = Tokenizer.from_file(vocabulary.path, vocabulary.pattern, cache=cache)
    again = Tokenizer.from_file(vocabulary.path, vocabulary.pattern, cache=cache)
    theirs = reference(vocabulary)
    allowed = "all" if vocabulary.pattern is None else set[str]()
    compared = size = count = 0
    batch: list[str] = []

    def check() -> None:
        nonlocal compared, size, count
        ids, offsets = ours.encode_batch(batch, allowed_special=allowed)
        for i, (text, expected) in enumerate(zip(batch, theirs(batch), strict=True)):
            mine = ids[offsets[i] : offsets[i + 1]].tolist()
            assert mine == expected, (vocabulary.name, text[:300])
        assert again.encode(batch[0], allowed_special=allowed).tolist() == theirs(batch[:1])[0]
        compared += len(batch)
        size += sum(len(text.encode()) for text in batch)
        count += len(ids)
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == 1000:
            check()
    if batch:
        check()
    trips = 0
    if vocabulary.name not in ("minilm", "smollm2", *SENTENCEPIECE):  # not all bytes
        for value in raw:
            assert ours.decode_bytes(ours.encode(value, allowed_special=set())) == value
            trips += 1
    shown = f"{compared} texts, {size / 1e6:.1f} MB, {count} ids equal, {trips} round trips of bytes"
    return f"{vocabulary.name}: {shown}"


NAMES = [
    *["deepseek", "cl100k ranks", "cl100k", "o200k ranks", "o200k", "llama3 ranks", "llama3", "qwen ranks"],
    *["qwen", "gpt2 ranks", "gpt2", "gpt2 split", "minilm", "smollm2", *SENTENCEPIECE, "tekken"],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("limit", "count"), [(1_000_000, 500), pytest.param(10**9, 100_000, marks=pytest.mark.nightly)]
)
def test_ids_of_real_vocabularies(
    name: str,
    limit: int,
    count: int,
    known: dict[str, Vocabulary],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name not in known:
        pytest.skip("its package is not installed")

    def texts() -> Iterator[str]:
        yield from real_texts(limit)
        yield from hostile(count, seed=3)

    shown = compare(known[name], texts(), broken_bytes(count), tmp_path)
    with capsys.disabled():
        print(f"\n{shown}")
