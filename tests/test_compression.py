"""Compressed checkpoints, DFloat11 buffers: bit for bit, against the public encoder, and damaged."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

import archzoo
from archzoo import _rust, checkpoint
from archzoo.checkpoint import Part
from archzoo.checkpoint.shards import Contents
from archzoo.checkpoint.source import Later, bytes_of
from archzoo.cli import app
from archzoo.errors import CheckpointError, InputError

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    kind = INTEGERS[a.element_size()]
    return same and torch.equal(a.view(kind), b.view(kind))


def weights() -> dict[str, Tensor]:
    """Every dtype, every bfloat16, odd shapes; some too small or too random to get smaller."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 1001, generator=generator) * 0.02
    patterns = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16)
    return {
        "bf16": normal.bfloat16(),
        "patterns": torch.cat([patterns, torch.zeros(1 << 20, dtype=torch.bfloat16)]),
        "f32": normal,
        "upcast": normal.bfloat16().float(),
        "f16": normal.half(),
        "e4m3": (normal * 1000).to(torch.float8_e4m3fn),
        "e5m2": (normal * 1000).to(torch.float8_e5m2),
        "f64": normal[:9].double(),
        "ids": torch.arange(1000),
        "noise": torch.randint(-32768, 32768, (5000,), generator=generator)
        .to(torch.int16)
        .view(torch.float16),
        "small": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    checkpoint.save(weights(), out, max_shard_size="3MB", compress="huffman")
    return out


def test_every_tensor_comes_back(folder: Path) -> None:
    expected, found = weights(), checkpoint.load(folder, verify=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    verified = checkpoint.verify(folder)
    assert verified.unchecked == ()
    assert verified.tensors == len(expected)


def test_files_are_ordinary_and_smaller(folder: Path, tmp_path: Path) -> None:
    expected = weights()
    stored: dict[str, int] = {}
    compressed: set[str] = set()
    assert len(list(folder.glob("*.safetensors"))) > 1
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # the public reader validates the layout
            names = json.loads(file.metadata().get("archzoo.compressed", "{}"))
            compressed |= names.keys()
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                stored[name] = tensor.nbytes
                assert (tensor.dtype == torch.uint8 and tensor.ndim == 1) == (name in names)
    assert compressed == {"bf16", "patterns", "f32", "upcast", "f16", "e4m3", "e5m2"}
    limits = {
        "bf16": 0.68,
        "patterns": 0.65,
        "f32": 0.84,
        "upcast": 0.34,
        "f16": 0.87,
        "e4m3": 0.9,
        "e5m2": 0.8,
    }
    for name, limit in limits.items():
        assert stored[name] < limit * expected[name].nbytes, (name, stored[name] / expected[name].nbytes)
    again = tmp_path / "again"
    checkpoint.save(weights(), again, max_shard_size="3MB", compress="huffman")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_parts_and_casts(folder: Path) -> None:
    reader, expected = checkpoint.open(folder), weights()
    assert same_bits(reader.read("bf16", slice(17, 200)), expected["bf16"][17:200])
    assert same_bits(reader.read("f32", slice(1, 3), slice(5, 9)), expected["f32"][1:3, 5:9].contiguous())
    assert same_bits(reader.read("bf16", slice(3, 3)), expected["bf16"][3:3])
    wide = torch.empty(300, 1001)
    reader.read_parts([Part("bf16", wide)])
    assert same_bits(wide, expected["bf16"].float())


def test_a_model_is_loaded_from_it(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("smollm2-135m").tiny().override("vocab_size=4096"))
    model.bfloat16()
    archzoo.save(model, tmp_path / "plain")
    result = CliRunner().invoke(app, ["ckpt", "compress", str(tmp_path / "plain"), str(tmp_path / "small")])
    assert result.exit_code == 0, result.output
    assert "after" in result.output
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("plain", "small")]
    assert sizes[1] < 0.75 * sizes[0]
    again = archzoo.load(tmp_path / "small")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert same_bits(a.detach(), b.detach()), name
    args = ["ckpt", "compress", "--codec", "plain", str(tmp_path / "small"), str(tmp_path / "small")]
    assert CliRunner().invoke(app, args).exit_code == 0
    file = "model.safetensors"
    assert (tmp_path / "small" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert (tmp_path / "small" / "config.json").exists()


def test_damage_is_found_on_load(folder: Path, tmp_path: Path) -> None:
    checkpoint.save({"a": weights()["bf16"]}, tmp_path / "m", compress="huffman")
    path = tmp_path / "m" / "model.safetensors"
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for at in (data + 3, data + 20, data + 30, data + 160, data + 5000, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor \"a\": cannot read"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert same_bits(checkpoint.load(path)["a"], weights()["bf16"])


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ('{"a":["BF16",[300,1002]]}', "expected the elements of 601200 bytes"),
        ('{"a":["I16",[300,1001]]}', "expected a compressed floating-point dtype"),
        ('{"a":["BF16",[9]]}', "expected more than the"),
        ('{"a":["F64",[99999999,99999]]}', "expected a compressed floating-point dtype"),
        ('{"a":["F32",[99999999,9999999999999]]}', "expected more than the"),
        ('{"a":["F32",[99999999,999]]}', "expected more than the"),
        ('{"a":["F16",[300,1001]]}', "expected the planes of F16"),
        ('{"a":["BF16",[300,1001]],"b":["BF16",[2]]}', 'tensor "b": expected in the file'),
        ('{"a":["BF16",[300,1001]],"a":["BF16",[300,1001]]}', "expected once, found twice"),
        ('{"a":3}', "archzoo.compressed"),
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, described: str, message: str) -> None:
    stored = _rust.compress("BF16", bytes_of(weights()["bf16"]))
    assert stored is not None
    entry = {"dtype": "U8", "shape": [stored.size], "data_offsets": [0, stored.size]}
    head = json.dumps({"__metadata__": {"archzoo.compressed": described}, "a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + stored.tobytes())
    with pytest.raises(CheckpointError, match=r"a\.safetensors") as error:
        checkpoint.load(path)
    assert message in str(error.value)


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compress 'zip': expected 'huffman', 'dfloat11' or None"):
        checkpoint.save({}, tmp_path / "m", compress="zip")


def test_settings_do_not_replace_a_damaged_config(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    checkpoint.save(tensors, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object, which dfloat11's settings"):
        checkpoint.save(tensors, tmp_path / "m", compress="dfloat11")
    assert (tmp_path / "m" / "config.json").read_text() == "{"
    (tmp_path / "m" / "config.json").write_text("{}")
    assert checkpoint.load(tmp_path / "m").keys() == tensors.keys()


def dfloat11_round_trip(tensors: list[Tensor]) -> float | None:
    raw = [bytes_of(t) for t in tensors]
    measured = _rust.measure_dfloat11(raw)
    if measured is None:
        return None
    counts, sizes = measured
    buffers = _rust.encode_dfloat11(counts, raw)
    assert [buffer.size for buffer in buffers] == sizes
    out = [torch.empty_like(t) for t in tensors]
    _rust.decode_dfloat11(buffers, [bytes_of(t) for t in out])
    assert all(same_bits(a, b) for a, b in zip(tensors, out, strict=True))
    return sum(b.size for b in buffers) / sum(t.nbytes for t in tensors)


def test_dfloat11() -> None:
    normal = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    share = dfloat11_round_trip([normal[:5], normal[5:700_000], normal[700_000:]])
    assert share is not None
    assert 0.67 <= share <= 0.68
    assert dfloat11_round_trip([torch.cat([normal, torch.tensor([torch.inf]).bfloat16()])]) is None
    zeros = torch.cat([normal, torch.tensor([0.0, -0.0, 1e-40, -1e-40]).bfloat16()])
    assert dfloat11_round_trip([zeros]) is not None


def test_dfloat11_buffers_that_do_not_fit() -> None:
    normal = (torch.randn(50_000) * 0.02).bfloat16()
    measured = _rust.measure_dfloat11([bytes_of(normal)])
    assert measured is not None
    buffers = _rust.encode_dfloat11(measured[0], [bytes_of(normal)])
    out = np.empty(100_000, np.uint8)
    with pytest.raises(_rust.CheckpointError, match="expected weights of 100000 bytes, found 99998"):
        _rust.decode_dfloat11(buffers, [out[2:]])
    with pytest.raises(_rust.CheckpointError, match="gaps: expected"):
        _rust.decode_dfloat11((*buffers[:4], buffers[4][1:]), [out])
    with pytest.raises(_rust.CheckpointError, match="expected the exponents that were counted before"):
        _rust.encode_dfloat11(measured[0], [bytes_of(normal[1:])])
    with pytest.raises(ValueError, match="expected bfloat16, found 3 bytes"):
        _rust.measure_dfloat11([out[:3]])


def coded(rows: int, columns: int, seed: int) -> Tensor:
    """bfloat16 by arithmetic on integers alone, with few exponents."""
    raw = torch.arange(seed, seed + rows * columns) * 2654435761 % 65521
    words = (raw & 1) << 15 | 110 + (raw >> 4 & raw >> 8 & 15) << 7 | raw >> 9
    return words.to(torch.uint16).view(torch.bfloat16).reshape(rows, columns)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("max_shard_size", "manifest"),
    [
        ("30KB", "373d53f9e4f548aca95124b225dc105cf129d59bfc1124a572fd741ff9cd3f04"),
        ("4GB", "684558d97e670f8658fa35f610d531a1aa9bfea43692f587d80cb7feee788cdd"),
    ],
)
def test_dfloat11_files_are_the_same_bytes(
    tmp_path: Path, max_shard_size: str, manifest: str, later: bool
) -> None:
    """As an encoder with everything in memory wrote them: groups within others, and across shards."""
    parts = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("experts.0.up", "up", "down")]
    tensors = {
        "embed.weight": coded(300, 64, 1),
        **{name: coded(64, 90 + i, i) for i, name in enumerate(parts)},
        "layers.1.norm.weight": torch.ones(64, dtype=torch.bfloat16),
        "layers.2.inf.weight": torch.full((8, 8), torch.inf, dtype=torch.bfloat16),
        "bias": torch.arange(9).float(),
    }
    contents = {n: Later(t.dtype, tuple(t.shape), t.clone) if later else t for n, t in tensors.items()}
    checkpoint.save(Contents(contents), tmp_path / "m", max_shard_size, "dfloat11")
    assert sha256((tmp_path / "m" / "model.manifest.json").read_bytes()).hexdigest() == manifest
    found = checkpoint.load(tmp_path / "m", verify=True)
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_dfloat11_folders(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("smollm2-135m").tiny().override("vocab_size=4096")).bfloat16()
    archzoo.save(model, tmp_path / "plain")
    tensors = checkpoint.load(tmp_path / "plain")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan  # not held: stays as it is
    checkpoint.save(tensors, tmp_path / "plain", compress="dfloat11")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dfloat11_config"]["pattern_dict"].keys() == {
        r"model\.embed_tokens",
        r"model\.layers\.1",
    }
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.1.luts", "model.embed_tokens.gaps", "model.layers.0.mlp.up_proj.weight"} <= names
    assert "model.layers.1.mlp.up_proj.weight" not in names

    found = checkpoint.load(tmp_path / "plain", verify=True)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.verify(tmp_path / "plain").unchecked == ()
    reader, name = checkpoint.open(tmp_path / "plain"), "model.layers.1.mlp.down_proj.weight"
    assert same_bits(reader.read(name, slice(2, 5), slice(1, 3)), tensors[name][2:5, 1:3].contiguous())

    checkpoint.save(checkpoint.copied(checkpoint.open(tmp_path / "plain")), tmp_path / "again")
    copied_config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert copied_config == {k: v for k, v in config.items() if k != "dfloat11_config"}
    assert all(same_bits(t, tensors[n]) for n, t in checkpoint.load(tmp_path / "again").items())

    # Plain tensors over the folder: what the config says of the codes goes with them.
    checkpoint.save(tensors, tmp_path / "again", compress="dfloat11")
    checkpoint.save(tensors, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == copied_config
    assert all(same_bits(t, tensors[n]) for n, t in checkpoint.load(tmp_path / "again").items())

    # The public encoder does not write shapes: the model has them.
    del config["dfloat11_config"]["shapes"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert checkpoint.open(tmp_path / "plain").info(name)[1] == (tensors[name].numel(),)
    for dtype in (torch.bfloat16, torch.float32):
        again = archzoo.load(tmp_path / "plain", dtype=dtype)
        assert torch.equal(again.layers[1].ffn.down_proj.weight, tensors[name].to(dtype))

    del config["dfloat11_config"]["pattern_dict"]["model\\.layers\\.1"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"module 'model\.layers\.1': expected a pattern"):
        checkpoint.open(tmp_path / "plain")
