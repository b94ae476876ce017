"""`archzoo ckpt`: listing, differences, resharding and conversion; resharding keeps every byte."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

import archzoo
from archzoo import checkpoint
from archzoo.checkpoint import Rank
from archzoo.cli import app
from archzoo.model import skeleton

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ckpt", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 4),
        "b.weight": torch.randn(3, 5).bfloat16(),
        "c.bias": torch.randn(7),
        "scale": torch.tensor(2.0),
        "ids": torch.arange(6),
    }


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_ls(tmp_path: Path) -> None:
    checkpoint.save(tensors(), tmp_path / "m", max_shard_size=100)
    code, text = run("ls", tmp_path / "m")
    assert code == 0
    for word in ("a.weight", "8 x 4", "bfloat16", "128 B", "model-00001-of-", "5 tensors", "61 elements"):
        assert word in text, word
    code, text = run("ls", tmp_path / "m", "--pattern", "*.bias")
    assert "1 tensors" in text
    assert "a.weight" not in text


def test_verify(tmp_path: Path) -> None:
    checkpoint.save(tensors(), tmp_path / "m")
    code, text = run("verify", tmp_path / "m")
    assert code == 0
    assert "5 tensors" in text
    assert "no faults" in text


def test_diff(tmp_path: Path) -> None:
    first = tensors()
    checkpoint.save(first, tmp_path / "a")
    assert run("diff", tmp_path / "a", tmp_path / "a")[0] == 0
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["a.weight"][3, 2] += 0.5
    second["c.bias"][0] = torch.nan
    second["ids"] = second["ids"] + 1
    second["new"] = second.pop("scale")
    second["b.weight"] = second["b.weight"].reshape(5, 3)
    checkpoint.save(second, tmp_path / "b", max_shard_size=100)
    code, text = run("diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    norm = float(first["a.weight"].double().norm())
    assert f"a.weight │ 0.5 │ {0.5 / norm:.3g} │ 1 of 32" in text
    assert "c.bias │ nan │ nan │ 1 of 7" in text
    assert "ids │ 1 │ 0.33 │ 6 of 6" in text
    assert "b.weight: [3, 5] against [5, 3]" in text
    assert f"scale: only in {tmp_path / 'a'}" in text
    assert f"new: only in {tmp_path / 'b'}" in text
    checkpoint.save(first | {"a.weight": second["a.weight"]}, tmp_path / "c")
    assert run("diff", tmp_path / "a", tmp_path / "c", "--tolerance", 0.5)[0] == 0
    checkpoint.save({n: t.half() if n == "a.weight" else t for n, t in first.items()}, tmp_path / "d")
    code, text = run("diff", tmp_path / "a", tmp_path / "d")
    assert code == 1
    assert "a.weight: torch.float32 against torch.float16" in text


def test_diff_of_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archzoo.cli import ckpt as module

    monkeypatch.setattr(module, "CHUNK", 7)
    first, second = torch.randn(50, 3), torch.randn(50, 3)
    checkpoint.save({"a": first}, tmp_path / "a")
    checkpoint.save({"a": second}, tmp_path / "b")
    readers = checkpoint.open(tmp_path / "a"), checkpoint.open(tmp_path / "b")
    largest, relative, count = module._difference(readers, "a")
    gap = (first.double() - second.double()).abs()
    assert largest == pytest.approx(float(gap.max()))
    assert relative == pytest.approx(float(gap.norm() / first.double().norm()))
    assert count == 150


def test_resharding_one_to_four_to_two(tmp_path: Path) -> None:
    model = archzoo.build(archzoo.config("deepseek-moe-16b").tiny(), dtype=torch.bfloat16)
    archzoo.save(model, tmp_path / "1")
    total = checkpoint.open(tmp_path / "1").nbytes()
    sizes = {"4": total // 4 + 5000, "2": total // 2 + 5000, "again": 1 << 40}
    for (source, _), (out, size) in pairwise([("1", 0), *sizes.items()]):
        assert run("reshard", tmp_path / source, tmp_path / out, "--max-shard-size", size)[0] == 0
        if out in "42":
            assert len(list((tmp_path / out).glob("*.safetensors"))) == int(out)
        checkpoint.verify(tmp_path / out)
    # Sharding deals tensors in the order of the files, one file sorts them: byte for byte the same.
    assert files(tmp_path / "again") == files(tmp_path / "1")
    archzoo.load(tmp_path / "4")


def test_ranks_one_to_four_to_two(tmp_path: Path) -> None:
    """Each rank saves its part; two ranks' parts are made from those of four, and give the first folder."""
    model = archzoo.build(archzoo.config("deepseek-moe-16b").tiny(), dtype=torch.bfloat16)
    archzoo.save(model, tmp_path / "1")
    config, family = checkpoint.read_config(tmp_path / "1")

    def joined(folder: Path, ranks: list[Rank]) -> None:
        again = skeleton(config, torch.bfloat16).to_empty(device="cpu")
        parts = {rank: checkpoint.load(folder / f"rank-{i}") for i, rank in enumerate(ranks)}
        checkpoint.join(again, family, parts)
        archzoo.save(again, folder / "whole")
        assert files(folder / "whole") == files(tmp_path / "1")

    source = tmp_path / "1"
    for name, ranks in {
        "four": [Rank(expert=(i // 2, 2), tensor=(i % 2, 2)) for i in range(4)],
        "two": [Rank(expert=(i, 2)) for i in range(2)],
    }.items():
        for i, rank in enumerate(ranks):
            checkpoint.save(checkpoint.load_part(source, rank), tmp_path / name / f"rank-{i}")
        joined(tmp_path / name, ranks)
        source = tmp_path / name / "whole"


def test_convert_to_dcp_and_back(tmp_path: Path) -> None:
    checkpoint.save(tensors(), tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "dcp", "--to", "dcp")[0] == 0
    assert run("convert", tmp_path / "dcp", tmp_path / "b")[0] == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    code, text = run("convert", tmp_path / "dcp", tmp_path / "c", "--dtype", "bfloat16")
    assert code == 2
    assert "keep their dtypes" in text


def test_convert_of_dtypes_and_of_public_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    safetensors.torch.save_file(tensors(), tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"torch_dtype": "float32", "x": 1}')
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert run("convert", tmp_path / "a", tmp_path / "b", "--dtype", "float16")[0] == 0
    stored = checkpoint.load(tmp_path / "b", verify=True)
    for name, tensor in tensors().items():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        assert stored[name].dtype == expected.dtype
        assert torch.equal(stored[name], expected)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {"torch_dtype": "float16", "x": 1}
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("command", ["ls", "verify", "reshard", "convert", "diff"])
def test_a_missing_checkpoint_is_one_line(command: str, tmp_path: Path) -> None:
    more = [] if command in ("ls", "verify") else [tmp_path / "out"]
    code, text = run(command, tmp_path / "missing", *more)
    assert code == 2
    assert "missing" in text
    assert not (tmp_path / "out").exists()
