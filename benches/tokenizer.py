"""Tokenizers on the same text in the same run: speed and ids.

`python tokenizer.py [FILE ...]` uses the text files given (one kind of text each, named by the folder) beside
what the interpreter ships. Compared are those of tokenizers, tiktoken, gigatoken, fastokens and rs-bpe that
are installed; one whose ids differ is dropped, with the first difference. Vocabularies: those of installed
packages that `vocabularies.py` finds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from vocabularies import Vocabulary, ranks, vocabularies

from archzoo import _rust
from archzoo.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "local"
Encode = Callable[[list[str]], object]
SLOW = ("tokenizers", "tiktoken", "rs-bpe")
"""Peers that are timed in one round only."""
DEFAULT = ("deepseek", "cl100k", "llama3", "qwen", "gpt2", "smollm2")


@dataclass
class Cell:
    """MB/s of one tokenizer on one text."""

    vocabulary: str
    text: str
    threads: int
    tokenizer: str
    fresh: float
    repeated: float


def makers(
    vocabulary: Vocabulary, rank_file: Vocabulary | None, threads: int
) -> dict[str, Callable[[], Encode]]:
    """Functions that load a fresh tokenizer and return its batch call."""
    path = str(vocabulary.path)
    out: dict[str, Callable[[], Encode]] = {}

    def archzoo() -> Encode:
        tokenizer = Tokenizer.from_file(path)
        return lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False).ids

    def hugging_face() -> Encode:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(path)
        return lambda texts: [
            i for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False) for i in e.ids
        ]

    def gigatoken() -> Encode:
        tokenizer = importlib.import_module("gigatoken").Tokenizer(path)
        return lambda texts: tokenizer.encode_batch(texts, parallel=threads > 1)

    def fastokens() -> Encode:
        tokenizer = importlib.import_module("fastokens._native").Tokenizer.from_file(path)
        return lambda texts: np.frombuffer(tokenizer.encode_batch_flat(texts)[0], np.uint32)

    def open_ai() -> Encode:
        assert rank_file is not None
        encoding = importlib.import_module("tiktoken").Encoding(
            "x", pat_str=rank_file.regex, mergeable_ranks=ranks(rank_file.path), special_tokens={}
        )
        return lambda texts: [
            i for ids in encoding.encode_ordinary_batch(texts, num_threads=threads) for i in ids
        ]

    def rs_bpe() -> Encode:
        openai = importlib.import_module("rs_bpe.bpe").openai
        tokenizer = getattr(openai, f"{vocabulary.name}_base")()
        return lambda texts: [i for text in texts for i in tokenizer.encode(text)]

    peers = {"tokenizers": hugging_face, "gigatoken": gigatoken, "fastokens": fastokens}
    if rank_file is not None:
        peers["tiktoken"] = open_ai
        if vocabulary.name in ("cl100k", "o200k") and threads == 1:
            peers["rs_bpe"] = rs_bpe
    out["archzoo"] = archzoo
    out |= {name.replace("_", "-"): make for name, make in peers.items() if importlib.util.find_spec(name)}
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
        "code": "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)[:2_000_000],
    }
    kinds |= {path.parent.name: path.read_text(encoding="utf-8")[:2_000_000] for path in files}
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


def run(
    vocabulary: Vocabulary,
    rank_file: Vocabulary | None,
    texts: dict[str, list[str]],
    threads: int,
    rounds: int,
) -> list[Cell]:
    cells: list[Cell] = []
    dropped: set[str] = set()
    for kind, documents in texts.items():
        size = sum(len(text.encode()) for text in documents) / 1e6
        times: dict[str, tuple[list[float], list[float]]] = {}
        expected: list[int] = []
        failed: set[str] = set()
        for turn in range(rounds):
            # The reference first, then the others in an order that changes.
            named = sorted(
                makers(vocabulary, rank_file, threads).items(), key=lambda item: item[0] != "tokenizers"
            )
            for name, make in named if turn % 2 == 0 else reversed(named):
                if name in dropped | failed or (turn > 0 and name in SLOW):
                    continue
                try:
                    encode = make()
                    kept: list[object] = []
                    fresh = timed(lambda: kept.append(encode(documents)), cpu=threads == 1)  # noqa: B023
                    again = timed(lambda: encode(documents), cpu=threads == 1)  # noqa: B023
                except BaseException as error:  # a panic of a peer is no Exception
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    print(
                        f"  {name} fails on {vocabulary.name}, {kind}: {type(error).__name__}: {error}"[:200]
                    )
                    failed.add(name)
                    continue
                if turn == 0:
                    ids = flat(kept[0])
                    expected = expected or ids
                    if ids != expected:
                        pairs = enumerate(zip(ids, expected, strict=False))
                        at = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(expected)))
                        print(
                            f"  {name} is dropped for {vocabulary.name}: on {kind} ids {ids[at : at + 4]}, "
                            f"expected {expected[at : at + 4]} at {at}"
                        )
                        dropped.add(name)
                        continue
                pair = times.setdefault(name, ([], []))
                pair[0].append(size / max(fresh, 1e-9))
                pair[1].append(size / max(again, 1e-9))
        cells += [
            Cell(vocabulary.name, kind, threads, name, statistics.median(fresh), statistics.median(again))
            for name, (fresh, again) in times.items()
        ]
        cells = [c for c in cells if c.tokenizer not in dropped]
        here = [c for c in cells if c.text == kind]
        print(f"{vocabulary.name:9} {threads} thread(s)  {kind:18} {size:5.1f} MB  {row(here)}", flush=True)
    return cells


def row(cells: list[Cell]) -> str:
    """The cells of one text, and the best peer's share of ours."""
    own = next((c for c in cells if c.tokenizer == "archzoo"), None)
    peers = [c for c in cells if c.tokenizer != "archzoo"]
    shown = "  ".join(f"{c.tokenizer} {c.fresh:.1f}/{c.repeated:.1f}" for c in cells)
    if own is None or not peers:
        return shown
    fresh, again = max(c.fresh for c in peers), max(c.repeated for c in peers)
    return f"{shown}  | {own.fresh / fresh:.2f}x/{own.repeated / again:.2f}x the best"


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
    parser.add_argument(
        "--vocabularies", default=",".join(DEFAULT), help="names of vocabularies.py, comma separated"
    )
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.threads:
        # Thread pools are sized once a process.
        counts = sorted({1, min(2, os.cpu_count() or 1)})
        for threads in counts:
            os.environ |= {
                "RAYON_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
            }
            inner = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)]
            os.spawnv(os.P_WAIT, sys.executable, inner)
        if len(counts) > 1:
            print_scaling(args.vocabularies.split(","), args.files, 3 * args.rounds)
        return
    print(f"instruction set {_rust.instruction_set()}, load {os.getloadavg()[0]:.1f}")
    print("MB/s fresh/repeated; CPU time for one thread, else wall")
    texts = texts_of(args.files)
    known = {v.name: v for v in vocabularies(RESULTS)}
    known |= {path.stem: Vocabulary(path.stem, path) for path in args.json}
    wanted = [*args.vocabularies.split(","), *(path.stem for path in args.json)]
    cells = []
    for name in wanted:
        if name in known:
            cells += run(known[name], known.get(f"{name} ranks"), texts, args.threads, args.rounds)
    stem = f"tokenizer-{args.threads}"
    (RESULTS / f"{stem}.json").write_text(json.dumps([asdict(c) for c in cells], indent=2) + "\n")
    plot(cells, RESULTS / f"{stem}.png")


@cache
def short_documents(files: tuple[Path, ...]) -> list[str]:
    """Once in a process."""
    return texts_of(list(files))["2 KB documents"]


def batch_times(path: Path, files: tuple[Path, ...]) -> tuple[float, float]:
    """Wall time of fresh and of repeated text in 2 KB documents."""
    documents = short_documents(files)
    tokenizer = Tokenizer.from_file(path)
    batch = partial(tokenizer.encode_batch, documents, add_special_tokens=False)
    return timed(batch, cpu=False), timed(batch, cpu=False)


def print_scaling(names: list[str], files: list[Path], rounds: int) -> None:
    """What a second thread gives for 2 KB documents: processes of one and of two, in turn."""
    processes = []
    for threads in (1, 2):
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        processes.append(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        processes[-1].submit(_rust.threads).result()
    known = {v.name: v for v in vocabularies(RESULTS)}
    for name in names:
        if name in known:
            ratios = []
            for _ in range(rounds):
                one, two = (p.submit(batch_times, known[name].path, tuple(files)).result() for p in processes)
                ratios.append([a / b for a, b in zip(one, two, strict=True)])
            shown = [f"{statistics.median(kind):.2f}x" for kind in zip(*ratios, strict=True)]
            print(f"2 threads, {name:9} fresh/repeated {'/'.join(shown)} of one thread", flush=True)


if __name__ == "__main__":
    main()
