"""Checkpoints in Rust: exchange with the safetensors package, damaged files, atomic folders."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import Tensor

from archzoo import _rust
from archzoo._rust import CheckpointError, CheckpointReader, FolderWriter

TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {tag: dtype for dtype, tag in TAGS.items()}


def every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.{tag}": (torch.randn(5, 3, generator=generator) * 3).to(dtype)
        for i, (dtype, tag) in enumerate(TAGS.items())
    }
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), 'ünï "quoted"': torch.ones(2)}


def bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def request(
    name: str, into: Tensor | npt.NDArray[Any], *ranges: tuple[int, int]
) -> tuple[str, int, int, list[tuple[int, int]], str | None]:
    array = bytes_of(into) if isinstance(into, Tensor) else into
    return name, array.ctypes.data, array.nbytes, list(ranges), None


def write(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 1 << 40) -> Path:
    folder.mkdir(exist_ok=True)
    items = [(name, TAGS[t.dtype], tuple(t.shape), bytes_of(t)) for name, t in tensors.items()]
    _rust.write_shards(folder, items, max_shard_bytes)
    return folder


def read(path: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(path)
    tensors = {}
    for name, (tag, shape, *_) in reader.infos().items():
        tensors[name] = torch.empty(shape, dtype=DTYPES[tag])
    reader.read_into([request(name, tensor) for name, tensor in tensors.items()])
    return tensors


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(bytes_of(found[name]), bytes_of(tensor), err_msg=name)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# Round trips


def test_a_single_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, tensors)
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt"})
    (ours_header, ours_data), (their_header, their_data) = map(
        header_and_data, (tmp_path / "model.safetensors", theirs)
    )
    assert ours_data == their_data
    metadata = ours_header.pop("__metadata__")
    assert their_header.pop("__metadata__") == {"format": "pt"}
    assert list(ours_header.items()) == list(their_header.items())
    assert metadata.keys() == {"format", "archzoo.xxh3"}
    assert json.loads(metadata["archzoo.xxh3"]).keys() == tensors.keys()
    assert_equal(read(theirs), tensors)
    assert_equal(read(tmp_path), tensors)
    assert_equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), tensors)
    assert CheckpointReader(tmp_path).metadata == {"format": "pt"}


def test_a_sharded_folder(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, tensors, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.numel() * t.itemsize for t in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    for file in files:
        held = safetensors.torch.load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in held)
        data = sum(t.numel() * t.itemsize for t in held.values())
        assert data <= 100 or len(held) == 1
    assert_equal(read(tmp_path), tensors)
    assert_equal(read(tmp_path / "model.safetensors.index.json"), tensors)
    _, _, file, _ = CheckpointReader(tmp_path).infos()["scalar"]
    assert file == str(tmp_path / index["weight_map"]["scalar"])


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, every_dtype(), 100) for name in "ab")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("rows", [(0, 7), (0, 0), (2, 5), (6, 7), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_row_ranges(tmp_path: Path, rows: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 3, 2).to(dtype)
    reader = CheckpointReader(write(tmp_path, {"other": torch.ones(3), "a": tensor}))
    found = torch.empty(rows[1] - rows[0], 3, 2, dtype=dtype)
    reader.read_into([request("a", found, rows)])
    assert torch.equal(found, tensor[slice(*rows)])


def test_rows_of_one_tensor_into_parts_of_another(tmp_path: Path) -> None:
    experts = torch.randn(4, 8, 8)
    write(tmp_path, {f"experts.{i}": expert.clone() for i, expert in enumerate(experts)}, 300)
    fused = torch.zeros(4, 8, 8)
    CheckpointReader(tmp_path).read_into([request(f"experts.{i}", fused[i]) for i in range(4)])
    assert torch.equal(fused, experts)


def test_large_tensors_and_many_small_ones(tmp_path: Path) -> None:
    tensors = {f"small.{i}": torch.full((3,), i) for i in range(500)} | {"large": torch.randn(5 << 20)}
    assert_equal(read(write(tmp_path, tensors, 8 << 20)), tensors)


def test_an_open_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for value in (1, 2):
        with FolderWriter(final) as writer:
            write(writer.path, {"a": torch.full((4,), value)})
            if value == 2:
                reader = CheckpointReader(final)
            writer.commit()
    found = torch.empty(4, dtype=torch.int64)
    reader.read_into([request("a", found)])
    assert found.tolist() == [1] * 4
    assert read(final)["a"].tolist() == [2] * 4


# Bad calls


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (("b", np.zeros(16, np.uint8)), CheckpointError, '"b": expected in the checkpoint'),
        (("a", np.zeros(15, np.uint8)), CheckpointError, "expected 16 bytes, found 15"),
        (("a", np.zeros(0, np.uint8), (2, 1)), CheckpointError, r"start <= end <= 2, found 2\.\.1"),
        (("a", np.zeros(0, np.uint8), (0, 3)), CheckpointError, r"start <= end <= 2, found 0\.\.3"),
        (("s", np.zeros(4, np.uint8), (0, 1)), CheckpointError, 'tensor "s": .*found a scalar'),
    ],
)
def test_bad_requests(tmp_path: Path, request_: Any, error: type[Exception], message: str) -> None:
    reader = CheckpointReader(write(tmp_path, {"a": torch.ones(2, 2), "s": torch.ones(())}))
    good = np.zeros(16, np.uint8)
    with pytest.raises(error, match=message):
        reader.read_into([request("a", good), request(*request_)])
    assert not good.any()  # nothing is read when one request is bad


def test_destinations_must_not_overlap(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}))
    buffer = torch.zeros(7)
    with pytest.raises(ValueError, match='destinations of "a" and "b" overlap'):
        reader.read_into([request("a", buffer[:4]), request("b", buffer[3:])])


@pytest.mark.parametrize(
    ("items", "limit", "error", "message"),
    [
        ([("a", "F31", (1,), np.zeros(4, np.uint8))], 9, ValueError, 'dtype of "a" is unknown: "F31"'),
        ([("a", "F32", (2,), np.zeros(4, np.uint8))], 9, CheckpointError, 'tensor "a": .*found 4 bytes'),
        ([("a", "F32", (1,), np.zeros(1, np.float32))], 9, TypeError, 'bytes of "a" must be a 1-D .*uint8'),
        ([("a", "U8", (4,), np.zeros(8, np.uint8)[::2])], 9, ValueError, 'bytes of "a" must be contiguous'),
        ([("a", "U8", (1,), np.zeros(1, np.uint8))] * 2, 9, CheckpointError, 'tensor "a": .*found twice'),
        ([("__metadata__", "U8", (1,), np.zeros(1, np.uint8))], 9, CheckpointError, "reserved"),
        ([], 0, CheckpointError, "max_shard_bytes: expected at least 1, found 0"),
    ],
)
def test_bad_saves(tmp_path: Path, items: Any, limit: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _rust.write_shards(tmp_path, items, limit)
    assert not list(tmp_path.iterdir())


def test_a_save_into_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r'missing/model\.safetensors: tensor "a": cannot write: No such'
    ):
        _rust.write_shards(tmp_path / "missing", [("a", "U8", (1,), np.zeros(1, np.uint8))], 9)


# Damaged files


def file_of(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = file_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}, bytes(12))
A = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    ("content", "tensor", "message"),
    [
        pytest.param(b"", None, "header length of 8 bytes, found 0", id="empty"),
        pytest.param(b"1234567", None, "header length of 8 bytes, found 7", id="no length"),
        pytest.param(file_of({}, length=1 << 63), None, f"found {1 << 63}", id="length 2^63"),
        pytest.param(file_of({}, length=100_000_001), None, "at most 100000000 bytes", id="length limit"),
        pytest.param(file_of({}, length=3), None, "remaining 2 bytes, found 3", id="length past the end"),
        pytest.param(GOOD[:30], None, "remaining 22 bytes", id="truncated header"),
        pytest.param(GOOD[:-1], "b", "within the file's 11 data bytes, found 12", id="truncated body"),
        pytest.param(GOOD + b"x", None, f"a file of {len(GOOD)} bytes", id="trailing byte"),
        pytest.param(file_of(b'{"\xff":1}'), None, "expected UTF-8", id="not UTF-8"),
        pytest.param(file_of(b" {}"), None, r"expected '{' first, found Some\(' '\)", id="starts with blank"),
        pytest.param(file_of(b""), None, "expected '{' first, found None", id="no header"),
        pytest.param(file_of(b"{"), None, "header: EOF", id="bad JSON"),
        pytest.param(file_of(b"{} x"), None, "header: trailing characters", id="text after the header"),
        pytest.param(file_of(b"{" + A + b"," + A + b"}", b"x"), "a", "once, found twice", id="twice"),
        pytest.param(file_of(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "a", "duplicate field", id="dtype twice"),
        pytest.param(
            file_of(b'{"__metadata__":{"k":"1","k":"2"}}'), None, '"k": expected once', id="metadata twice"
        ),
        pytest.param(file_of({"__metadata__": {"k": 1}}), None, "expected a string", id="metadata number"),
        pytest.param(file_of({"a": {"dtype": "U8", "shape": []}}), "a", "missing field", id="no offsets"),
        pytest.param(file_of({"a": entry("F31", [1], 0, 4)}, bytes(4)), "a", 'found "F31"', id="dtype"),
        pytest.param(
            file_of({"a": entry("F32", [2], 0, 4)}, bytes(4)), "a", r"expected 8 bytes .*found 4", id="shape"
        ),
        pytest.param(
            file_of({"a": entry("F32", [1 << 62, 1 << 62], 0, 4)}, bytes(4)), "a", "below 2", id="overflow"
        ),
        pytest.param(
            file_of({"a": entry("F32", [1 << 61], 0, 0)}), "a", "below 2", id="overflow by the dtype"
        ),
        pytest.param(file_of({"a": entry("F4", [3], 0, 1)}, b"x"), "a", "whole number", id="half a byte"),
        pytest.param(file_of({"a": entry("U8", [-1], 0, 1)}, b"x"), "a", "invalid value", id="negative size"),
        pytest.param(file_of({"a": entry("U8", [1.0], 0, 1)}, b"x"), "a", "invalid type", id="fraction"),
        pytest.param(
            file_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"),
            "b",
            r"start at 1, .* found 2 \(a hole\)",
            id="hole",
        ),
        pytest.param(
            file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"),
            "b",
            r"start at 2, .* found 1 \(an overlap\)",
            id="overlap",
        ),
        pytest.param(file_of({"a": entry("U8", [1], 1, 2)}, b"xy"), "a", "start at 0", id="late start"),
        pytest.param(file_of({"a": entry("U8", [1], 1, 0)}, b"x"), "a", "start <= end", id="reversed"),
        pytest.param(
            file_of({"a": entry("U8", [1 << 40], 0, 1 << 40)}), "a", "0 data bytes", id="past the end"
        ),
    ],
)
def test_a_damaged_file(tmp_path: Path, content: bytes, tensor: str | None, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    if tensor is not None:
        assert f'tensor "{tensor}"' in str(error.value)


def test_a_header_of_any_length_and_with_unknown_fields_is_legal(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": entry("U8", [1], 0, 1) | {"note": "x"}}, b"\x07"))
    assert read(path)["a"].tolist() == [7]


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, {"a": torch.ones(100)}))
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match=r'model\.safetensors: tensor "a": cannot read'):
        reader.read_into([request("a", np.zeros(400, np.uint8))])


SHARD_1, SHARD_2 = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "file", "tensor", "message"),
    [
        pytest.param(
            lambda f: (f / SHARD_2).unlink(), SHARD_2, "b", "found no such file", id="missing shard"
        ),
        pytest.param(
            lambda f: os.truncate(f / SHARD_2, (f / SHARD_2).stat().st_size - 1),
            SHARD_2,
            "b",
            "data bytes",
            id="truncated shard",
        ),
        pytest.param(
            lambda f: edit_index(f, lambda m: m.update(c=SHARD_1)),
            SHARD_1,
            "c",
            "found in no shard",
            id="index names a tensor that no shard holds",
        ),
        pytest.param(
            lambda f: edit_index(f, lambda m: m.update(a=SHARD_2, b=SHARD_1)),
            SHARD_1,
            "a",
            f"expected in {SHARD_2} .*found here",
            id="tensor in another shard",
        ),
        pytest.param(
            lambda f: safetensors.torch.save_file({"a": torch.ones(4), "c": torch.ones(4)}, f / SHARD_1),
            SHARD_1,
            "c",
            "found in no entry",
            id="tensor that the index omits",
        ),
        pytest.param(
            lambda f: safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, f / SHARD_1),
            SHARD_1,
            "b",
            f"expected in {SHARD_2} .*found here",
            id="tensor in two shards",
        ),
        pytest.param(
            lambda f: edit_index(f, lambda m: m.update(a=f"../{f.name}/{SHARD_1}")),
            INDEX,
            None,
            "plain file names",
            id="path upwards",
        ),
        pytest.param(
            lambda f: edit_index(f, lambda m: m.update(a="..")), INDEX, None, "plain file names", id="dots"
        ),
        pytest.param(
            lambda f: edit_index(f, lambda m: m.update(a="/etc/passwd")),
            INDEX,
            None,
            'found "/etc/passwd"',
            id="absolute path",
        ),
        pytest.param(
            lambda f: (f / INDEX).write_text(f'{{"weight_map":{{"a":"{SHARD_1}","a":"{SHARD_1}"}}}}'),
            INDEX,
            None,
            'key "a": expected once, found twice',
            id="index names a tensor twice",
        ),
        pytest.param(lambda f: (f / INDEX).write_text("{}"), INDEX, None, "weight_map", id="no weight_map"),
        pytest.param(
            lambda f: (f / INDEX).write_bytes(b"\xff"), INDEX, None, "expected value", id="index not JSON"
        ),
        pytest.param(lambda f: (f / INDEX).unlink(), "", None, "found neither", id="no index"),
        pytest.param(
            lambda f: (f / "model.safetensors").touch(), "", None, "found both", id="index and single file"
        ),
        pytest.param(
            lambda f: ((f / SHARD_2).unlink(), (f / SHARD_2).mkdir()),
            SHARD_2,
            None,
            "regular file",
            id="folder",
        ),
    ],
)
def test_a_damaged_folder(
    tmp_path: Path, damage: Callable[[Path], object], file: str, tensor: str | None, message: str
) -> None:
    folder = write(tmp_path / "model", {"a": torch.ones(4), "b": torch.ones(4)}, 16)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(folder)
    assert str(error.value).startswith(f"{folder / file}: ")
    if tensor is not None:
        assert f'tensor "{tensor}"' in str(error.value)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing: cannot open: No such file"):
        CheckpointReader(str(tmp_path / "missing"))


# Atomic folders


def test_commit_and_abort(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    writer = FolderWriter(final)
    assert writer.path.parent == final.parent
    assert not final.exists()
    writer.abort()
    writer.abort()
    assert not list(final.parent.iterdir())
    writer = FolderWriter(str(final))
    write(writer.path, {"a": torch.ones(3)})
    writer.commit()
    assert_equal(read(final), {"a": torch.ones(3)})
    assert list(final.parent.iterdir()) == [final]
    with pytest.raises(CheckpointError, match="has ended"):
        writer.commit()
    with pytest.raises(CheckpointError, match="has ended"):
        _ = writer.path


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    final = write(tmp_path / "out", {"a": torch.ones(3)})

    def save() -> None:
        with FolderWriter(final) as writer:
            write(writer.path, {"a": torch.zeros(3)})
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        save()
    assert_equal(read(final), {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [final]


def test_other_files_are_carried_over_and_old_weights_are_not(tmp_path: Path) -> None:
    final = write(tmp_path / "out", {"a": torch.ones(4), "b": torch.ones(4)}, 16)
    (final / "tokenizer.json").write_text("tokenizer")
    (final / "config.json").write_text("old")
    (final / "assets" / "deep").mkdir(parents=True)
    (final / "assets" / "deep" / "x.txt").write_text("x")
    (final / "adapter.safetensors").write_text("kept: not a model file")
    (final / "a.tmp-1").write_text("rubbish")
    (final / "link").symlink_to("tokenizer.json")
    final.chmod(0o750)
    with FolderWriter(final) as writer:
        write(writer.path, {"c": torch.zeros(4)})
        (writer.path / "config.json").write_text("new")
        writer.commit()
    assert sorted(path.name for path in final.iterdir()) == [
        "adapter.safetensors",
        "assets",
        "config.json",
        "link",
        "model.manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (final / "config.json").read_text() == "new"
    assert (final / "link").read_text() == "tokenizer"
    assert (final / "assets" / "deep" / "x.txt").read_text() == "x"
    assert final.stat().st_mode & 0o777 == 0o750
    assert_equal(read(final), {"c": torch.zeros(4)})
    assert list(tmp_path.iterdir()) == [final]


SAVE = """
import sys, time
import numpy as np
from archzoo import _rust

final, size, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
version = 1
while True:
    version += 1
    values = np.full(size, version, np.uint8)
    writer = _rust.FolderWriter(final)
    print(version, flush=True)
    _rust.write_shards(writer.path, [(f"t{i}", "U8", (size,), values) for i in range(4)], size)
    if stop == "stop":
        print("written", flush=True)
        time.sleep(60)
    writer.commit()
"""


def save_elsewhere(final: Path, size: int, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SAVE, str(final), str(size), mode], stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, "the saving process ended early"
    return line


def kill(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    return rest


def version_of(folder: Path) -> int:
    values = {int(v) for tensor in read(folder).values() for v in tensor.unique()}
    assert len(values) == 1, "a mix of two saves"
    return values.pop()


@pytest.mark.parametrize("exists", [True, False])
def test_kill_before_the_commit(tmp_path: Path, exists: bool) -> None:
    final = tmp_path / "out"
    if exists:
        write(final, {f"t{i}": torch.ones(10, dtype=torch.uint8) for i in range(4)}, 10)
    before = sorted(final.iterdir()) if exists else []
    process = save_elsewhere(final, 1 << 20, "stop")
    assert line_of(process) == "2"
    assert line_of(process) == "written"
    with pytest.raises(CheckpointError, match="out: another writer is saving to this folder"):
        FolderWriter(final)
    kill(process)
    assert final.exists() == exists
    if exists:
        assert sorted(final.iterdir()) == before
        assert version_of(final) == 1
    left = [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert len(left) == 1
    FolderWriter(final).abort()
    assert list(tmp_path.iterdir()) == ([final] if exists else [])


def test_kill_at_any_moment(tmp_path: Path) -> None:
    final = tmp_path / "out"
    write(final, {f"t{i}": torch.ones(10, dtype=torch.uint8) for i in range(4)}, 10)
    (final / "tokenizer.json").write_text("kept")
    choose, before = random.Random(0), 1
    for _ in range(10):
        process = save_elsewhere(final, 1 << 18, "run")
        last = int(line_of(process))
        time.sleep(choose.uniform(0, 0.15))
        last = int([str(last), *kill(process).split()][-1])  # the save that was killed
        before = before if last == 2 else last - 1
        version = version_of(final)
        assert version in {before, last}
        before = version
        assert (final / "tokenizer.json").read_text() == "kept"
        assert not [path for path in final.iterdir() if ".tmp" in path.name]
    FolderWriter(final).abort()
    assert list(tmp_path.iterdir()) == [final]


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    final = tmp_path / "out"
    first = FolderWriter(final)
    with pytest.raises(CheckpointError, match=f"{final}: another writer is saving to this folder"):
        FolderWriter(tmp_path / "." / "out")
    FolderWriter(tmp_path / "out2").abort()
    first.commit()
    FolderWriter(final).abort()


READ_ONLY = """
import os, sys
from archzoo import _rust

if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    _rust.FolderWriter(sys.argv[1])
except _rust.CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("inner", [True, False], ids=["folder", "parent"])
def test_a_read_only_folder(tmp_path: Path, inner: bool) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    final = write(parent / "out", {"a": torch.ones(3)})
    for folder in [*tmp_path.parents[:2], tmp_path]:
        folder.chmod(0o755)
    parent.chmod(0o777 if inner else 0o555)
    final.chmod(0o555 if inner else 0o777)
    run = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(final)], capture_output=True, text=True, timeout=60
    )
    parent.chmod(0o755)
    assert run.returncode == 0, run.stderr
    assert "Permission denied" in run.stdout
    assert str(final if inner else parent) in run.stdout
    assert list(parent.iterdir()) == [final]
    assert_equal(read(final), {"a": torch.ones(3)})


@pytest.mark.parametrize("final", ["/", "file", "dangling"])
def test_no_place_for_a_folder(tmp_path: Path, final: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"^{final if final == '/' else tmp_path / final}: "):
        FolderWriter(tmp_path / final)


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    real = write(tmp_path / "real", {"a": torch.ones(3)})
    link = tmp_path / "link"
    link.symlink_to("real")
    with FolderWriter(link) as writer:
        write(writer.path, {"a": torch.zeros(3)})
        writer.commit()
    assert link.is_symlink()
    assert_equal(read(real), {"a": torch.zeros(3)})
