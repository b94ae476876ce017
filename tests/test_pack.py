"""Packs: what they hold, resume after a kill, damage, and the sequences that are read from them."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import archzoo
from archzoo import _rust, cli
from archzoo.data import Pack, PackedDataset, collate, documents, verify_pack, write_pack
from archzoo.data import packed as packed_module
from archzoo.distill import KD, Recipe, distill
from archzoo.errors import InputError, PackError

pack_module = importlib.import_module("archzoo.data.pack")
EOS = 256


def ragged(rows: list[Any], dtype: str, eos: int | None, ends: bool) -> tuple[npt.NDArray[Any], Any]:
    """Rows as `encode_documents` gives them."""
    if eos is not None:
        rows = [[*row, eos] if ends or i + 1 < len(rows) else row for i, row in enumerate(rows)]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.concatenate([np.asarray(row, dtype) for row in rows]), offsets


class Bytes:
    """Bytes as ids."""

    vocab_size = 257
    special_tokens = {"<|endoftext|>": EOS}  # noqa: RUF012
    hash = "bytes"

    def encode_documents(self, texts: Iterable[str], *how: Any) -> tuple[npt.NDArray[Any], Any]:
        return ragged([np.frombuffer(text.encode(), np.uint8) for text in texts], *how)


class HuggingFace:
    """A `tokenizers` object behind the surface that packing needs."""

    special_tokens = {"<|endoftext|>": 0}  # noqa: RUF012

    def __init__(self, content: str) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.hash = hashlib.sha256(content.encode()).hexdigest()

    def encode_documents(self, texts: Iterable[str], *how: Any) -> tuple[npt.NDArray[Any], Any]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return ragged([e.ids for e in encoded], *how)


def words(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + "x" * rng.randint(0, 30) + "é" for i in range(count)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(pack: Pack) -> list[str]:
    """The documents of a pack of bytes, from its files."""
    found = []
    for shard in pack.manifest.shards:
        ids = np.fromfile(pack.folder / f"{shard.name}.tokens", "<u2")
        starts = np.fromfile(pack.folder / f"{shard.name}.documents", "<i8")
        assert (starts[0], starts[-1], len(starts)) == (0, shard.tokens, shard.documents + 1)
        parts = [ids[a:b] for a, b in pairwise(starts)]
        found += [bytes(part[part != EOS].astype(np.uint8)).decode() for part in parts]
    return found


# What a pack holds


def test_documents_keep_their_order_over_shards(tmp_path: Path) -> None:
    texts = words(500)
    texts[7] = ""
    jsonl(tmp_path / "b.jsonl", texts[:300])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "x", texts[300:499]).read_bytes()))
    (tmp_path / "d.txt").write_bytes(texts[499].encode())
    manifest = write_pack([tmp_path], Bytes(), tmp_path / "out", shard_tokens=1000, append_eos=True)
    pack = Pack(tmp_path / "out")
    assert texts_of(pack) == texts
    assert manifest == pack.manifest == verify_pack(tmp_path / "out")
    assert [entry.name for entry in manifest.inputs] == ["b.jsonl", "c.jsonl.gz", "d.txt"]
    assert all(entry.xxh3 == documents.file_xxh3(tmp_path / entry.name) for entry in manifest.inputs)
    assert manifest.tokens == len(pack) == sum(len(t.encode()) + 1 for t in texts)
    assert manifest.documents == 500
    assert all(1000 <= shard.tokens < 1050 for shard in manifest.shards[:-1])
    assert (pack.read(0, len(pack)) == EOS).sum() == 500
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", *(name for name, _, _ in manifest.files())]
    )


def test_the_files_of_a_folder_are_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    for name in ("b/c.txt", "b.txt", "b-c.txt", "b/a/d.txt", "b/a.txt", "B.txt", "é.txt"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(name, encoding="utf-8")
    outside.write_text("outside", encoding="utf-8")
    (inside / "b/b.txt").symlink_to(outside)
    (inside / "b/folder.txt").mkdir()
    (inside / "b/gone.txt").symlink_to(tmp_path / "gone")
    (inside / "b/itself.txt").symlink_to("itself.txt")
    (inside / "b/other.bin").write_bytes(b"")
    paths = sorted(path for path in inside.rglob("*.txt") if path.is_file())
    write_pack([inside, outside], Bytes(), tmp_path / "pack", append_eos=True)
    assert len(paths) == 8
    monkeypatch.chdir(inside)
    here = write_pack(["."], Bytes(), tmp_path / "here")
    assert here == write_pack([inside], Bytes(), tmp_path / "there")
    assert here.inputs[0].name == "B.txt"
    assert texts_of(Pack(tmp_path / "pack")) == [path.read_text("utf-8") for path in [*paths, outside]]


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_the_result_does_not_depend_on_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    source = jsonl(tmp_path / "a.jsonl", words(300))
    write_pack([source], Bytes(), tmp_path / "want", shard_tokens=700)
    monkeypatch.setattr(documents, "BLOCK", size)
    write_pack([source], Bytes(), tmp_path / "have", shard_tokens=700)
    assert contents(tmp_path / "have") == contents(tmp_path / "want")


def test_a_large_text_file_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 100)
    text = "line\n\n  indented é\nnext\r\n" * 50 + "z" * 500
    (tmp_path / "a.txt").write_bytes(text.encode())
    blocks = list(documents.Documents(tmp_path / "a.txt"))
    pieces = ["".join(block.texts) for block in blocks]
    assert len(pieces) > 10
    assert "".join(pieces) == text
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    for before, after in pairwise(pieces):
        if "z" in after:
            break
        assert before.endswith("\n")
        assert not after[0].isspace()
    monkeypatch.setattr(pack_module, "_SMALL", 0)
    manifest = write_pack([tmp_path / "a.txt"], Bytes(), tmp_path / "out", shard_tokens=300)
    assert (manifest.documents, len(manifest.shards)) == (1, 1)
    assert texts_of(Pack(tmp_path / "out")) == [text]


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "99aa06d3014798d86001c324468d497f"),
        (17, "685bc458b37d057fc06e233df7729217"),
        (512_000, "7467d0a77655fc0e5d90bc7b3dfdf1cb"),
    ],
)
def test_inputs_are_told_apart_by_xxh3(tmp_path: Path, size: int, digest: str) -> None:
    """The values are those of the xxhash package."""
    path = tmp_path / "a"
    path.write_bytes((bytes(range(256)) * 2000)[:size])
    assert documents.file_xxh3(path) == digest


def test_files_may_have_changed_in_size(tmp_path: Path) -> None:
    contents = ["", "a", "é" * 100, "b" * 70_000]
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    for sizes in ((0, 0, 0, 0), (0, 1, 200, 70_000), (9, 1000, 199, 69_999), (100_000, 0, 201, 1)):
        texts, hashes = _rust.file_texts([(p, size) for p, size in zip(paths, sizes, strict=True)])
        assert list(texts) == contents
        assert hashes == [documents.file_xxh3(path) for path in paths]


def test_blocks_get_smaller_towards_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rust, "threads", lambda: 2)
    megabytes = [documents.block_size(left << 20) / (1 << 20) for left in (100, 8, 4, 2, 1, 0)]
    assert megabytes == [2, 2, 1, 0.5, 0.25, 0.25]


def test_wide_ids_and_a_real_tokenizer(tmp_path: Path) -> None:
    texts = words(200)
    content = archzoo.train_bpe(texts, 300)
    tokenizer = HuggingFace(content)
    source = jsonl(tmp_path / "a.jsonl", texts)
    manifest = write_pack([source], tokenizer, tmp_path / "out", append_eos=True)
    assert manifest.dtype == "uint16"
    assert manifest.settings.tokenizer_hash == tokenizer.hash
    wanted = [i for text in texts for i in [*tokenizer.tokenizer.encode(text).ids, 0]]
    assert Pack(tmp_path / "out").read(0, len(wanted)).tolist() == wanted
    tokenizer.vocab_size = 70_000
    assert write_pack([source], tokenizer, tmp_path / "wide", append_eos=True).dtype == "uint32"
    assert Pack(tmp_path / "wide").read(0, len(wanted)).tolist() == wanted


def test_parquet_and_zstd(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = words(3000)
    parquet.write_table(pyarrow.table({"body": texts[:2000]}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts[2000:]).encode()
    frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:1000], lines[1000:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    manifest = write_pack([tmp_path], Bytes(), tmp_path / "out", text_key="body", append_eos=True)
    assert all(entry.xxh3 == documents.file_xxh3(tmp_path / entry.name) for entry in manifest.inputs)
    assert texts_of(Pack(tmp_path / "out")) == texts
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text'"):
        write_pack([tmp_path], Bytes(), tmp_path / "no")


def test_rows_come_in_blocks_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "BLOCK", 1000)
    texts = ["x" * random.Random(i).randint(0, 700) for i in range(500)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    blocks = [list(block.texts) for block in documents.Documents(tmp_path / "a.parquet")]
    assert [text for block in blocks for text in block] == texts
    sizes = [sum(map(len, block)) for block in blocks]
    assert max(sizes) < 1700
    assert min(sizes[:-1]) >= 1000


def test_folders_may_be_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deep = [Path(*["d"] * depth) for depth in range(1, 1501)]
    try:
        for path in deep:
            path.mkdir()
        (deep[-1] / "a.txt").write_text("a")
        assert [file.path for file in documents.input_files(["."])] == [str(deep[-1] / "a.txt")]
        (deep[-1] / "a.txt").unlink()
    finally:  # pytest would do it by recursion
        for path in reversed(deep):
            path.rmdir()


def test_names_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.txt")
    path.write_text("a")
    for given in (path, tmp_path):
        with pytest.raises(InputError, match="a name that is not UTF-8"):
            documents.input_files([given])


def test_a_damaged_zstd_file_is_named(tmp_path: Path) -> None:
    """Wherever it was cut: a text that lacks its end looks like a whole one."""
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.txt.zst"
    frame = pyarrow.compress(random.Random(0).randbytes(200_000).hex().encode(), "zstd", asbytes=True)
    size = len(frame)
    for cut in (0, 1, 3, 6, 1000, size - 1, size, size + 1, size + 9, size + 70_000, 2 * size - 1, 2 * size):
        path.write_bytes((frame + frame)[:cut])
        if cut % size == 0:
            manifest = write_pack([path], Bytes(), tmp_path / f"out{cut}")
            assert manifest.tokens == cut // size * 400_000
            continue
        with pytest.raises(InputError, match=r"a\.txt\.zst: Truncated compressed stream"):
            write_pack([path], Bytes(), tmp_path / "out")
    path.write_bytes(frame + b"nonsense")
    with pytest.raises(InputError, match=r"a\.txt\.zst: ZSTD decompress failed"):
        write_pack([path], Bytes(), tmp_path / "out")


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "pyarrow")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    for key in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=rf"needs {module}: install archzoo\[data\]"):
        write_pack([tmp_path / name], Bytes(), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"txt": "b"}\n',
            "a.jsonl, line 3: no text at 'text'",
        ),
        ("a.jsonl", b"nonsense", "line 1: expected"),
        ("a.jsonl", b"[1]", "line 1: invalid type: sequence, expected a JSON object with text at 'text'"),
        ("a.jsonl", b'{"text": 1}', "line 1: invalid type: integer"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: unexpected end of hex escape at line 1 column 17"),
        ("a.jsonl", b'{"text": "a", "text": 1}', "line 1: invalid type: integer `1`, expected a string"),
        ("a.jsonl", b'{"text": "a"} x', "line 1: trailing characters at line 1 column 15"),
        ("a.jsonl", b'{"text": "a\xff"}', "line 1: invalid utf-8"),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8"),
        ("a.txt.gz", b"ab", "a.txt.gz: Compressed file ended before"),
        ("a.txt.gz", b"not what gzip has written", "a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"ab", mtime=0)[:-6], "a.txt.gz: Compressed file ended before"),
        ("a.txt.gz", gzip.compress(b"ab", mtime=0)[:10] + bytes(16), "a.txt.gz: Error -1"),
        ("a.pdf", b"", "a.pdf: unknown kind of file"),
    ],
)
def test_bad_input_is_named_and_leaves_no_pack(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_pack([tmp_path / name], Bytes(), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def python_text(line: str) -> str | None:
    """What Python's own reader finds at "text"; None for a line that is to be refused."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        fields = json.loads(line, parse_constant=refuse, object_pairs_hook=tuple)
        if not isinstance(fields, tuple):
            return None
        texts = [value for key, value in fields if key == "text"]
        "".join([*(key for key, _ in fields), *texts]).encode()  # no half of a surrogate pair
        return texts[-1]
    except (ValueError, TypeError, IndexError):
        return None


PIECES = [
    *'"\\{}[]:,u0+-e. \t\r\x01\x0cé',
    "\\n",
    "\\/",
    "\\€",
    "\\u00e9",
    "\\ud83d\\ude00",
    "\\ud800",
    "\\u+041",
    '"text":"',
]


def read_lines_as_python() -> None:
    for character in [*map(chr, range(0x800)), "€", "\ue000"]:  # low bits of a b, an n
        line = json.dumps({"text": "a" * 100 + "?" * 2 + "b" * 100}).replace("??", "\\" + character) + "\n"
        found, _, _ = _rust.json_texts(line.encode(), b"", "text")
        assert list(found) == [text for text in [python_text(line)] if text is not None], line
    rng = random.Random(0)
    accepted = 0
    for _ in range(15_000):
        texts = ["", "a", 'b"\n\\', "é\U0001f600" * 20, "\x00\t/", "ab" * rng.randrange(20)]
        texts += [
            "".join(rng.choices(["abcdefghi", *'\\\\\\"\n\t/é'], k=rng.randrange(80))) for _ in range(2)
        ]
        fields = [(rng.choice(["id", "text", 't"']), rng.choice([*texts, 1, -2.5e9, None, [{}, "]"]]))]
        fields += [("text", rng.choice(texts)), ("text", rng.choice(texts))][rng.randrange(2) :]
        rng.shuffle(fields)
        comma, colon = rng.choice([",", " , "]), rng.choice([":", " : "])
        as_json = partial(json.dumps, ensure_ascii=rng.random() < 0.5)
        line = "{" + comma.join(as_json(key) + colon + as_json(value) for key, value in fields) + "}"
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(line) + 1)
            line = line[:at] + rng.choice(PIECES) + line[at + rng.randrange(3) :]
        content = f"{line}\n".encode()
        cut = rng.randrange(len(content) + 1)
        found, count, fault = _rust.json_texts(content[:cut], content[cut:], "text")
        want = python_text(line)
        assert list(found) == ([] if want is None else [want]), line
        assert (count == 0) == (fault is not None) == (want is None), line
        accepted += want is not None
    assert 5_000 < accepted < 10_000


@pytest.mark.parametrize("instruction_set", ["baseline", "avx512"])
def test_lines_are_read_as_python_reads_them(instruction_set: str) -> None:
    """Also what someone has damaged."""
    run = subprocess.run(
        [sys.executable, "-c", "from test_pack import *; read_lines_as_python()"],
        env=os.environ
        | {"ARCHZOO_INSTRUCTION_SET": instruction_set, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_the_end_of_text_must_be_known(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a"])
    tokenizer = Bytes()
    tokenizer.special_tokens = {"<stop>": 3}
    with pytest.raises(InputError, match="none of the usual ends of text; they are <stop>"):
        write_pack([source], tokenizer, tmp_path / "out", append_eos=True)
    manifest = write_pack([source], tokenizer, tmp_path / "out", eos_token="<stop>")
    assert manifest.settings.eos_token_id == 3
    tokenizer.vocab_size = 90
    with pytest.raises(PackError, match="made id 97, its vocab_size is 90"):
        write_pack([source], tokenizer, tmp_path / "small")


# Resume and damage


class Dies(Bytes):
    """Fails on the batch with this text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def encode_documents(self, texts: Iterable[str], *how: Any) -> tuple[npt.NDArray[Any], Any]:
        if any(self.text in text for text in texts):
            raise KeyboardInterrupt
        return super().encode_documents(texts, *how)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 100)
    texts = words(500)
    for i in range(4):
        jsonl(tmp_path / f"{i}.jsonl", texts[i * 100 : i * 100 + 100])
    for i in range(400, 500):
        (tmp_path / f"{i}.txt").write_text(texts[i], encoding="utf-8")
    want, out = tmp_path / "want", tmp_path / "out"
    write_pack([tmp_path], Bytes(), want, shard_tokens=900)
    for text in ("50 ", "150 ", "299 ", "399 ", "470 ", "499 "):
        with pytest.raises(KeyboardInterrupt):
            write_pack([tmp_path], Dies(text), out, shard_tokens=900)
        with pytest.raises(PackError, match="packing has not finished"):
            Pack(out)
    assert len(list(out.glob("shard-*.tokens"))) >= 8
    with pytest.raises(PackError, match="other inputs or settings"):
        write_pack([tmp_path], Bytes(), out, shard_tokens=901)

    calls = []
    encode = Bytes.encode_documents
    monkeypatch.setattr(
        Bytes, "encode_documents", lambda self, texts, *how: calls.append(texts) or encode(self, texts, *how)
    )
    write_pack([tmp_path], Bytes(), out, shard_tokens=900)
    assert sum(map(len, calls)) < 100  # not from the start
    assert contents(out) == contents(want)
    calls.clear()
    assert write_pack([tmp_path], Bytes(), out, shard_tokens=900) == Pack(want).manifest
    assert not calls
    (tmp_path / "0.jsonl").write_bytes((tmp_path / "0.jsonl").read_bytes().replace(b"x", b"y"))
    with pytest.raises(PackError, match="already holds a pack of other inputs"):
        write_pack([tmp_path], Bytes(), out, shard_tokens=900)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_pack import Bytes
from archzoo.data import write_pack
import importlib
importlib.import_module("archzoo.data.documents").BLOCK = 2000
class Slow(Bytes):
    def encode_documents(self, texts, *how):
        time.sleep(0.01)
        return super().encode_documents(texts, *how)
write_pack([sys.argv[1]], Slow(), sys.argv[2], shard_tokens=5000)
"""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", words(20_000))
    want, out = tmp_path / "want", tmp_path / "out"
    write_pack([source], Bytes(), want, shard_tokens=5000)
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(Path(__file__).parent)]
    process = subprocess.Popen(command)
    while len(list(out.glob("*.documents"))) < 5 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    write_pack([source], Bytes(), out, shard_tokens=5000)
    assert contents(out) == contents(want)


def test_a_full_disk_is_told_while_a_shard_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not lost: a file whose writing failed once may be brought to the disk without an error later."""
    source = jsonl(tmp_path / "a.jsonl", words(500))
    monkeypatch.setattr(documents, "BLOCK", 1000)
    monkeypatch.setattr(pack_module, "_SYNC", 1000)
    failures = [OSError("disk full")]

    def fsync(handle: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        write_pack([source], Bytes(), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a"])
    with pack_module._lock(tmp_path), pytest.raises(PackError, match="another process is packing"):
        write_pack([source], Bytes(), tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 documents in several shards."""
    source = jsonl(tmp_path / "a.jsonl", words(200))
    write_pack([source], Bytes(), tmp_path / "pack", shard_tokens=900)
    return tmp_path / "pack"


def test_damage_is_found_and_named(folder: Path) -> None:
    Pack(folder)
    for name in ("shard-00001.tokens", "shard-00002.documents"):
        content = bytearray((folder / name).read_bytes())
        content[11] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(PackError) as error:
        verify_pack(folder)
    assert "shard-00001.tokens: damaged" in str(error.value)
    assert "shard-00002.documents: damaged" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    with open(folder / "shard-00000.tokens", "ab") as file:
        file.write(b"x")
    for check in (Pack, verify_pack):
        with pytest.raises(PackError, match=r"shard-00000\.tokens: \d+ bytes, the manifest says"):
            check(folder)
    (folder / "shard-00000.tokens").unlink()
    with pytest.raises(PackError, match=r"shard-00000\.tokens: missing"):
        Pack(folder)
    (folder / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(PackError, match=r"manifest\.json: no manifest of a pack: format"):
        Pack(folder)


# Sequences


def stream(dataset: PackedDataset, count: int, **loader: Any) -> list[Any]:
    """The first items, as bytes that compare."""
    iterator: Iterator[Any] = iter(DataLoader(dataset, **loader) if loader else dataset)
    return [tuple(t.numpy().tobytes() for t in next(iterator).values()) for _ in range(count)]


def test_items_say_where_documents_are(folder: Path) -> None:
    pack, dataset = Pack(folder), PackedDataset(folder, 64)
    assert len(pack.manifest.shards) > 3
    tokens = pack.read(0, len(pack))
    starts = set(pack.document_starts(0, len(pack)).tolist())
    assert len(starts) == 200
    assert dataset.sequences == (len(pack) - 1) // 64
    for i in range(dataset.sequences):
        item = dataset[i]
        assert item["input_ids"].tolist() == tokens[i * 64 : i * 64 + 64].tolist()
        position, positions = 0, []
        for at in range(i * 64, i * 64 + 64):
            position = 0 if at in starts else position
            positions.append(position)
            position += 1
        assert item["positions"].tolist() == positions
        edges = [k for k, p in enumerate(positions) if p == 0] + [64]
        assert item["cu_seqlens"].tolist() == edges
        assert item["cu_seqlens"].dtype == torch.int32
    with pytest.raises(IndexError):
        dataset[dataset.sequences]


def test_a_batch_runs_in_a_model_as_its_documents_do(folder: Path, tiny: Any) -> None:
    model = tiny("smollm2-135m")
    batch = next(iter(PackedDataset(folder, 48, batch_size=2)))
    edges = batch["cu_seqlens"].tolist()
    assert edges[-1] == 96
    ids = batch["input_ids"].clamp_max(255)
    batch["input_ids"] = ids
    hidden = model(**batch).hidden
    total = 0.0
    for a, b in pairwise(edges):
        alone = model(ids[:, a:b], labels=ids[:, a:b])
        torch.testing.assert_close(hidden[:, a:b], alone.hidden)
        total += alone.loss.item() * (b - a - 1) if b - a > 1 else 0
    mean = total / (96 - (len(edges) - 1))  # the first token of a document is not predicted
    assert model(**batch, labels=ids).loss.item() == pytest.approx(mean)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000, 1025])
def test_the_order_is_a_permutation(count: int) -> None:
    order = [packed_module.permuted(i, count, 3, 0) for i in range(count)]
    assert sorted(order) == list(range(count))
    if count > 5:
        assert order != sorted(order)
        assert order != [packed_module.permuted(i, count, 3, 1) for i in range(count)]
        assert order != [packed_module.permuted(i, count, 4, 0) for i in range(count)]


def test_the_order_is_fixed_for_good_and_well_mixed() -> None:
    """A checkpoint's data position must mean the same under every version."""
    assert [packed_module.permuted(i, 10**12, 0, 0) for i in range(3)] == FIXED
    order = np.array([packed_module.permuted(i, 4000, 0, 0) for i in range(4000)])
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.06
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


FIXED = [412275046770, 4151905108, 848482704851]


def test_epochs_end_and_differ(folder: Path) -> None:
    dataset = PackedDataset(folder, 64, epochs=2)
    n = dataset.sequences
    items = stream(dataset, 2 * n)
    assert sorted(items[:n]) == sorted(items[n:])
    assert items[:n] != items[n:]
    assert list(dataset) == []
    assert len(list(PackedDataset(folder, 64, epochs=1, world_size=4, batch_size=3))) == n // 12


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_global_order(folder: Path, world: int) -> None:
    whole = stream(PackedDataset(folder, 32), 400)
    ranks = [stream(PackedDataset(folder, 32, 0, r, world), 400 // world) for r in range(world)]
    assert [rank[i] for i in range(400 // world) for rank in ranks] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, workers: int) -> None:
    want = stream(PackedDataset(folder, 32, batch_size=4), 12)
    have = stream(PackedDataset(folder, 32, batch_size=4), 12, batch_size=None, num_workers=workers)
    assert have == want


def test_workers_of_any_loader_share_the_sequences(folder: Path) -> None:
    dataset = PackedDataset(folder, 32, epochs=1, rank=1, world_size=2)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate))
    rows = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"].view(-1, 32)]
    alone = [tuple(i["input_ids"].tolist()) for i in PackedDataset(folder, 32, 0, 1, 2, epochs=1)]
    assert sorted(rows) == sorted(alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_where_it_stopped(folder: Path, workers: int) -> None:
    def dataset(world: int = 1) -> PackedDataset:
        return PackedDataset(folder, 32, 5, batch_size=2, world_size=world)

    loader: dict[str, Any] = {"batch_size": None, "num_workers": workers}
    want = stream(dataset(), 60)
    first = dataset()
    assert stream(first, 25, **loader) == want[:25]
    state = json.loads(json.dumps(first.state_dict(consumed=25 if workers else 0)))
    again = dataset()
    again.load_state_dict(state)
    assert stream(again, 35, **loader) == want[25:]
    other = dataset(world=2)  # rank 0 of two: every other sequence from there
    other.load_state_dict(state)
    assert other.position == 50
    with pytest.raises(InputError, match="seed was 5, is 6"):
        PackedDataset(folder, 32, 6).load_state_dict(state)


def test_every_worker_can_save_its_own_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchdata's StatefulDataLoader does."""

    def worker(index: int, state: dict[str, Any] | None, count: int) -> tuple[list[Any], dict[str, Any]]:
        info = type("Info", (), {"id": index, "num_workers": 3})
        monkeypatch.setattr(packed_module, "get_worker_info", lambda: info)
        dataset = PackedDataset(folder, 32)
        if state:
            dataset.load_state_dict(state)
        return stream(dataset, count), dataset.state_dict()

    whole = stream(PackedDataset(folder, 32), 30)
    for index in range(3):
        first, state = worker(index, None, 4)
        assert first + worker(index, state, 6)[0] == whole[index::3]


def test_parts_and_pickles(folder: Path) -> None:
    pack = Pack(folder)
    first, second = (PackedDataset(pack, 32, part=p) for p in ((0.0, 0.5), (0.5, 1.0)))
    half = round(len(pack) / 2)
    assert second[0]["input_ids"].tolist() == pack.read(half, half + 32).tolist()
    assert first.sequences == (half - 1) // 32
    assert len(pickle.dumps(first)) < 2000
    assert stream(pickle.loads(pickle.dumps(first)), 5) == stream(first, 5)
    for kwargs, message in (
        ({"sequence_length": 10**6}, "do not fill one sequence"),
        ({"sequence_length": 0}, "at least 1"),
        ({"sequence_length": 8, "rank": 2}, "rank 2"),
    ):
        with pytest.raises(InputError, match=message):
            PackedDataset(pack, **kwargs)


# The training loop and the command line


def model(seed: int) -> archzoo.CausalLM:
    config = archzoo.config("smollm2-135m").tiny().override("layers.count=1", "vocab_size=257")
    return archzoo.build(config, seed=seed)


def test_a_recipe_names_a_pack_and_training_resumes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'pack = "pack"\n[[stages]]\nname = "kd"\nkind = "kd"\nsteps = 6\nseq_len = 16\nbatch_size = 2\n'
        "lr = 1e-3\nsave_every = 3\ndata = [0.1, 0.9]\n"
    )
    recipe = Recipe.from_toml(tmp_path / "recipe.toml")
    assert recipe.pack == str(folder)
    want = [m["loss"] for m in distill(model(1), model(2), None, recipe, tmp_path / "a", progress=False)]
    stage = recipe.stages[0]
    assert isinstance(stage, KD)
    short = Recipe(pack=recipe.pack, stages=(stage,))

    class StopError(Exception):
        pass

    student, seen = model(1), []

    def stop(*_: Any) -> Any:
        seen.append(1)
        if len(seen) > 4:
            raise StopError
        return original(*_)

    original = PackedDataset.next_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedDataset, "next_batch", stop)
        with pytest.raises(StopError):
            distill(student, model(2), None, short, tmp_path / "b", progress=False)
    have = distill(model(1), model(2), Pack(folder), short.stages[0], tmp_path / "b", progress=False)
    assert [m["loss"] for m in have] == want
    with pytest.raises(InputError, match="no data"):
        distill(model(1), model(2), None, stage, tmp_path / "c", progress=False)
    small = archzoo.build(archzoo.config("smollm2-135m").tiny())
    with pytest.raises(InputError, match="257 token ids, the student 256"):
        distill(small, small, Pack(folder), stage, tmp_path / "c", progress=False)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer(Bytes):
        @classmethod
        def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
            assert Path(path) == tmp_path / "tokenizer.json"
            return cls()

    monkeypatch.setattr(archzoo, "Tokenizer", Tokenizer, raising=False)
    source, out = jsonl(tmp_path / "a.jsonl", words(100)), tmp_path / "out"
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(out), "--append-eos"]
    result = CliRunner().invoke(cli.app, ["pack", str(source), *options, "--shard-tokens", "500"])
    assert result.exit_code == 0, result.output
    assert "100 documents" in result.output
    assert texts_of(Pack(out)) == words(100)
    result = CliRunner().invoke(cli.app, ["pack", "--verify", str(out)])
    assert result.exit_code == 0, result.output
    damaged = out / "shard-00001.tokens"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    result = CliRunner().invoke(cli.app, ["pack", "--verify", str(out)])
    assert result.exit_code == 2
    assert "shard-00001.tokens: damaged" in result.output
    assert CliRunner().invoke(cli.app, ["pack", str(source)]).exit_code == 2
