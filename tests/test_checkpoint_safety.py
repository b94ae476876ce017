"""Checkpoints under faults: damage that only checksums show, full disks, memory, foreign readers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

import archzoo
from archzoo import CheckpointError, checkpoint
from archzoo.checkpoint.distributed import to_dcp
from archzoo.cli import app
from archzoo.model import skeleton

LLAMA = "smollm2-135m"
INDEX = "model.safetensors.index.json"
MANIFEST = "model.manifest.json"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (30, 20), "b": (7,), "c": (), "d": (3, 4, 5), "e": (0, 4)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << (bit % 8)
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))


# --- checksums -------------------------------------------------------------------------------------


def test_what_was_saved_is_verified(tmp_path: Path) -> None:
    checkpoint.save(tensors(), tmp_path / "m", max_shard_size=300)
    found = checkpoint.verify(tmp_path / "m", progress=True)
    assert found.tensors == 5
    assert found.bytes == sum(t.nbytes for t in tensors().values())
    assert found.unchecked == ()
    assert checkpoint.verify(tmp_path / "m" / INDEX) == found


SHARD = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / SHARD, -9), rf'{SHARD}: tensor "a": damaged: expected checksum [0-9a-f]{{16}}, '),
        (lambda f: replace(f / SHARD, '"a":{"dtype":"F32"', '"a":{"dtype":"I32"'), f"{SHARD}: damaged: "),
        (lambda f: replace(f / SHARD, "[30,20]", "[20,30]"), f"{SHARD}: damaged: .*by {MANIFEST}"),
        (lambda f: replace(f / SHARD, '"pt"', '"tf"'), f"{SHARD}: damaged: "),
        (lambda f: replace(f / INDEX, '"total_size": 6', '"total_size": 7'), f"{INDEX}: damaged: "),
        (lambda f: replace(f / MANIFEST, '"version": 1', '"version": 2'), f"{MANIFEST}: version: expected 1"),
        (lambda f: replace(f / MANIFEST, '"head"', '"bytes"'), f"{MANIFEST}: duplicate field `bytes`"),
        (lambda f: replace(f / MANIFEST, SHARD, SHARD.replace("1-of", "2-of")), f"{MANIFEST}: .*found twice"),
        (lambda f: replace(f / MANIFEST, SHARD, "x"), r"x: cannot open: No such file"),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"), f"{SHARD}: expected a file of"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    checkpoint.save(tensors() | {"f": torch.ones(900)}, tmp_path / "m", max_shard_size=2400)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(tmp_path / "m")
    result = CliRunner().invoke(app, ["ckpt", "verify", str(tmp_path / "m")])
    assert result.exit_code == 2


def test_a_missing_shard_is_named_with_what_is_in_it(tmp_path: Path) -> None:
    checkpoint.save({name: torch.ones(10) for name in "abcde"}, tmp_path / "m", max_shard_size=80)
    for shard, message in {
        "model-00002-of-00003": r'"c": expected here with 1 more \(by {}\), found no such file$',
        "model-00003-of-00003": r'"e": expected here \(by {}\), found no such file$',
    }.items():
        path = (tmp_path / "m" / shard).with_suffix(".safetensors")
        path.rename(tmp_path / "aside")
        for read in (checkpoint.open, checkpoint.load, checkpoint.verify):
            with pytest.raises(CheckpointError, match=f"{path}: tensor " + message.format(INDEX)):
                read(tmp_path / "m")
        (tmp_path / "aside").rename(path)


def test_every_fault_is_told(tmp_path: Path) -> None:
    checkpoint.save(tensors(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    reader = checkpoint.open(path)
    assert reader.keys()
    content[-1] ^= 1
    content[-tensors()["d"].nbytes - 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(tmp_path / "m")
    assert len(str(caught.value).splitlines()) == 2


def test_a_load_can_compare_checksums(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config(LLAMA).tiny())
    archzoo.save(model, tmp_path / "m")
    archzoo.load(tmp_path / "m", verify=True, progress=True)
    flip(tmp_path / "m" / "model.safetensors", -100)
    archzoo.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r'model\.safetensors: tensor ".*": damaged'):
        archzoo.load(tmp_path / "m", verify=True)
    with pytest.raises(CheckpointError, match=r'model\.safetensors: tensor ".*": damaged'):
        checkpoint.load(tmp_path / "m", verify=True)
    with pytest.raises(CheckpointError, match=r'model\.safetensors: tensor ".*": damaged'):
        archzoo.load(tmp_path / "m", verify=True, dtype=torch.bfloat16)  # cast while it is read


def test_public_files_are_checked_in_structure_only(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "model.safetensors")
    found = checkpoint.verify(tmp_path)
    assert found.unchecked == (tmp_path / "model.safetensors",)
    result = CliRunner().invoke(app, ["ckpt", "verify", str(tmp_path)])
    assert result.exit_code == 0
    assert "no checksums" in result.output
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor"):
        checkpoint.verify(tmp_path)


def test_other_libraries_load_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = archzoo.build(archzoo.config(LLAMA).tiny(), seed=4)
    archzoo.save(model, tmp_path / "m", max_shard_size="60KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    ours = checkpoint.load(tmp_path / "m")
    for path in (tmp_path / "m").glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            assert torch.equal(tensor, ours[name])
            assert torch.equal(tensor, theirs[name])


# --- disks -----------------------------------------------------------------------------------------

FULL = """
import os, resource, subprocess, sys
from pathlib import Path
import torch
from archzoo import CheckpointError, checkpoint

disk = Path(sys.argv[1])
mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
private = sys.argv[2] == "private"
if not private or subprocess.run(mount, capture_output=True).returncode:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
shard, codec = sys.argv[3:]
small = {f"t{i}": torch.full((100, 100), float(i)).bfloat16() for i in range(4)}
checkpoint.save(small, disk / "m", shard)
before = {path.name: path.read_bytes() for path in (disk / "m").iterdir()}
# Only one does not fit.
words = torch.randint(-32768, 32768, (400_000,)).to(torch.int16)
sizes = {"t0": 20_000, "t1": 20_000, "t2": 400_000, "t3": 20_000}
large = {name: words[:n].view(torch.bfloat16) for name, n in sizes.items()}
other = checkpoint.Contents(small, {"config.json": bytes(1_000_000)})
for contents in (large, other):
    try:
        checkpoint.save(contents, disk / "m", shard, codec or None)
    except CheckpointError as error:
        print(error)
assert {path.name: path.read_bytes() for path in (disk / "m").iterdir()} == before
assert [path.name for path in disk.iterdir()] == ["m"]
checkpoint.verify(disk / "m")
assert all(torch.equal(found, small[name]) for name, found in checkpoint.load(disk / "m").items())
"""


@pytest.mark.parametrize(
    ("shard", "codec", "places"),
    [
        # Threads write shards side by side: any may be the one that finds no room.
        ("50KB", "", [(f"model-0000{i + 1}-of-00004", f"t{i}") for i in range(4)]),
        ("50KB", "huffman", [(f"model-0000{i + 1}-of-00004", f"t{i}") for i in range(4)]),
        ("4GB", "", [("model", "t0")]),  # space is taken for all of the file
    ],
)
@pytest.mark.parametrize("private", ["private", "limit"])
def test_a_full_disk(
    tmp_path: Path, private: str, shard: str, codec: str, places: list[tuple[str, str]]
) -> None:
    """A tmpfs in a private mount namespace where the system allows one, else a limit on the file size."""
    command = [sys.executable, "-c", FULL, str(tmp_path), private, shard, codec]
    unshare = ["unshare", "-Urm"]
    if private == "private" and shutil.which("unshare") and not subprocess.call([*unshare, "true"]):
        command = [*unshare, *command]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    refused = "cannot write: .*(No space left|File too large)"
    named = "|".join(rf'/{file}\.safetensors: tensor "{tensor}"' for file, tensor in places)
    assert re.search(rf"({named}): {refused}", run.stdout), run.stdout
    assert re.search(rf"/config\.json: {refused}", run.stdout), run.stdout


# --- memory ----------------------------------------------------------------------------------------

MEMORY = """
import ctypes, gc, sys
import torch
import archzoo
from archzoo import checkpoint

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

def start():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    return memory("VmRSS:")
"""
PEAK = """
kwargs = {"dtype": getattr(torch, sys.argv[2])} if len(sys.argv) > 2 else {}
model = archzoo.load(sys.argv[3], **kwargs)  # everything is imported and every thread started
size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
largest = max(t.nbytes for t in model.parameters())
del model
before = start()
model = archzoo.load(sys.argv[1], **kwargs)
size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
largest = max(t.nbytes for t in model.parameters())
print(memory("VmHWM:") - before - size, largest)
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("deepseek-moe-16b", "bfloat16"),
        ("deepseek-moe-16b", "float32"),
        ("gpt-oss-20b", "bfloat16"),
        ("llama-4-scout", "float32"),
    ],
)
def test_memory_beyond_the_model(name: str, dtype: str, tmp_path: Path) -> None:
    """64 MB and one tensor: files per expert, transposed in turns, transposed; as stored and cast."""
    config = archzoo.config(name).tiny()
    archzoo.save(archzoo.build(config, dtype=torch.bfloat16), tmp_path / "tiny")
    layers = ["override.0", *(["default"] if config.specs[0].ffn.kind == "moe" else [])]
    sizes = {"experts": 64 // len(layers), "hidden": 1024}
    changes = [f"layers.{layer}.ffn.{key}={size}" for layer in layers for key, size in sizes.items()]
    large = config.override(*changes, "hidden_size=1024")
    model = skeleton(large, torch.bfloat16).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0.5)
    size = sum(t.nbytes for t in model.parameters())
    assert size > 180e6
    archzoo.save(model, tmp_path / "large", max_shard_size="100MB")
    del model
    command = [sys.executable, "-c", MEMORY + PEAK, str(tmp_path / "large"), dtype, str(tmp_path / "tiny")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    extra, largest = map(int, run.stdout.split())
    assert extra <= 64e6 + largest, json.dumps({"extra": extra, "largest": largest})


CONVERT = """
from archzoo.checkpoint.distributed import from_dcp

def run(source, out):
    if source.endswith("dcp"):
        from_dcp(source, out, max_shard_size="100MB")
    else:
        copied = checkpoint.copied(checkpoint.open(source), torch.bfloat16)
        checkpoint.save(copied, out, "100MB", codec or None)

source, tiny, out, codec = sys.argv[1:]
run(tiny, out + "-tiny")
before = start()
run(source, out)
print(memory("VmHWM:") - before)
"""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("layout", "codec"), [("dcp", ""), ("compressed", ""), ("compressed", "dfloat11")])
def test_memory_of_a_conversion(layout: str, codec: str, tmp_path: Path) -> None:
    """64 MB and a few tensors, of a checkpoint that is larger; every value arrives."""
    names = [f"layers.{i // 2}.w{i % 2}.weight" for i in range(40)]
    whole = {name: torch.arange(i, i + 2**21).float().view(2**10, -1) for i, name in enumerate(names)}
    for name, content in {f"large-{layout}": whole, f"tiny-{layout}": tensors()}.items():
        checkpoint.save(content, tmp_path / "plain", compress="huffman")
        if layout == "dcp":
            to_dcp(tmp_path / "plain", tmp_path / name)
        else:
            (tmp_path / "plain").rename(tmp_path / name)
    folders = [str(tmp_path / f"{size}-{layout}") for size in ("large", "tiny")]
    command = [sys.executable, "-c", MEMORY + CONVERT, *folders, str(tmp_path / "out"), codec]
    environment = os.environ | {"RAYON_NUM_THREADS": "2"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    found = checkpoint.load(tmp_path / "out", verify=True)
    dtype = torch.float32 if layout == "dcp" else torch.bfloat16
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in whole.items())
    if codec:
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 120e6
    largest = whole["layers.0.w0.weight"].nbytes
    assert sum(t.nbytes for t in found.values()) > 2 * (64e6 + largest)
    assert int(run.stdout) <= 64e6 + 2 * 3 * largest  # a thread has it as read, as cast and as bytes
