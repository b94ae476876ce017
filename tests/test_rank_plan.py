"""What each rank reads of a checkpoint: its part, no more bytes than that; together everything."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CausalLM, checkpoint
from archzoo.checkpoint import Rank
from archzoo.errors import InputError
from archzoo.model import skeleton


def state(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def saved(name: str, folder: Path, *changes: str, seed: int = 3) -> CausalLM:
    model = archzoo.build(archzoo.config(name).tiny().override(*changes), dtype=torch.bfloat16, seed=seed)
    archzoo.save(model, folder, max_shard_size="60KB")
    return model


def ranks(expert: int = 1, tensor: int = 1, pipeline: int = 1) -> list[Rank]:
    return [
        Rank((e, expert), (t, tensor), (p, pipeline))
        for e, t, p in product(range(expert), range(tensor), range(pipeline))
    ]


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_parts_of_all_ranks_join_to_the_model(
    structure: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    model = saved(structure, tmp_path / "m")
    config, family = checkpoint.read_config(tmp_path / "m")
    parts = {rank: checkpoint.load_part(tmp_path / "m", rank) for rank in ranks(*sizes)}
    again = skeleton(config, torch.bfloat16).to_empty(device="cpu")
    for tensor in state(again).values():
        tensor.detach().fill_(torch.nan)
    checkpoint.join(again, family, parts)
    for key, tensor in state(model).items():
        assert torch.equal(state(again)[key], tensor), key


def test_a_rank_with_a_quarter_of_the_experts_reads_a_quarter_of_their_bytes(tmp_path: Path) -> None:
    model = saved("deepseek-moe-16b", tmp_path / "m")
    config, family = checkpoint.read_config(tmp_path / "m")
    experts = sum(t.nbytes for n, t in state(model).items() if ".experts." in n)
    others = sum(t.nbytes for n, t in state(model).items() if ".experts." not in n)
    for rank in ranks(expert=4):
        reader = checkpoint.open(tmp_path / "m")
        part = checkpoint.read_part(skeleton(config, torch.bfloat16), reader, family, rank)
        assert reader.bytes_read == experts // 4 + others
        first = rank.expert[0] * 2
        gate_up = state(model)["layers.1.ffn.experts.gate_up"]
        assert torch.equal(part["layers.1.ffn.experts.gate_up"], gate_up[first : first + 2])


def test_all_ranks_together_read_each_shared_byte_once(tmp_path: Path) -> None:
    model = saved("smollm2-135m", tmp_path / "m")
    config, family = checkpoint.read_config(tmp_path / "m")
    sizes = {name: tensor.nbytes for name, tensor in state(model).items()}
    total = 0
    for rank in ranks(tensor=2, pipeline=2):
        reader = checkpoint.open(tmp_path / "m")
        part = checkpoint.read_part(skeleton(config, torch.bfloat16), reader, family, rank)
        assert reader.bytes_read == sum(t.nbytes for t in part.values())
        total += reader.bytes_read
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    # Norms are on both ranks of a layer; the tied embedding is on the first and the last stage.
    assert total == sum(sizes.values()) + norms + sizes["embed.weight"]


def test_rows_and_columns_are_those_of_the_projections(tmp_path: Path) -> None:
    weights = state(saved("smollm2-135m", tmp_path / "m"))
    part = checkpoint.load_part(tmp_path / "m", Rank(tensor=(1, 2)))
    for name, dim in {"mixer.q_proj": 0, "mixer.o_proj": 1, "ffn.gate_proj": 0, "ffn.down_proj": 1}.items():
        key = f"layers.0.{name}.weight"
        assert torch.equal(part[key], weights[key].chunk(2, dim)[1])
    moe = state(saved("deepseek-moe-16b", tmp_path / "moe"))
    part = checkpoint.load_part(tmp_path / "moe", Rank(tensor=(1, 2)))
    gate, up = moe["layers.1.ffn.experts.gate_up"].chunk(2, 1)
    halves = torch.cat([gate.chunk(2, 1)[1], up.chunk(2, 1)[1]], 1)
    assert torch.equal(part["layers.1.ffn.experts.gate_up"], halves)


def test_a_part_in_another_dtype(tmp_path: Path) -> None:
    weights = state(saved("llama-4-scout", tmp_path / "m"))
    part = checkpoint.load_part(tmp_path / "m", Rank(expert=(1, 2)), dtype=torch.float32)
    for name, tensor in part.items():
        if ".experts." in name:
            assert torch.equal(tensor, weights[name].float().chunk(2)[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rank(expert=(4, 4)), r"expert: rank 4 is not in range\(4\)"),
        (lambda: checkpoint.plan(skeleton_of("deepseek-moe-16b"), Rank(expert=(0, 3))), "3 expert-parallel"),
        (lambda: checkpoint.plan(skeleton_of("smollm2-135m"), Rank(tensor=(0, 3))), "3 tensor-parallel"),
    ],
)
def test_ranks_that_do_not_divide(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def skeleton_of(name: str) -> CausalLM:
    return skeleton(archzoo.config(name).tiny(), torch.float32)


def test_quantised_experts_are_read_by_rank(tmp_path: Path) -> None:
    from archzoo.ops.fp8 import quantize_blocks

    saved("deepseek-v3", tmp_path / "m")
    stored = checkpoint.load(tmp_path / "m")
    for name in [n for n in stored if ".experts." in n]:
        stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(stored[name].float())
    checkpoint.save(stored, tmp_path / "m")
    whole = state(archzoo.load(tmp_path / "m"))
    part = checkpoint.load_part(tmp_path / "m", Rank(expert=(1, 2)))
    names = [name for name in whole if ".experts." in name]
    assert names
    for name in names:
        assert torch.equal(part[name], whole[name].chunk(2)[1])


def quantised(folder: Path, *changes: str) -> None:
    """A DeepSeek-V3 whose experts are stored in blocks of 8 bits."""
    from archzoo.ops.fp8 import quantize_blocks

    saved("deepseek-v3", folder, *changes)
    stored = checkpoint.load(folder)
    for name in [n for n in stored if ".experts." in n]:
        stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(stored[name].float())
    checkpoint.save(stored, folder)


def experts_of(rank: Rank, name: str, whole: Tensor) -> Tensor:
    """What one of two tensor-parallel ranks has of fused experts [E, out, in]."""
    experts = whole.chunk(rank.expert[1])[rank.expert[0]]
    if name.endswith("down"):
        return experts.chunk(2, 2)[rank.tensor[0]]
    return torch.cat([half.chunk(2, 1)[rank.tensor[0]] for half in experts.chunk(2, 1)], 1)


@pytest.mark.parametrize("rank", [Rank(tensor=(1, 2)), Rank(tensor=(0, 2)), Rank((1, 2), (1, 2))])
def test_blocks_of_eight_bits_are_read_in_part(rank: Rank, tmp_path: Path) -> None:
    quantised(tmp_path / "m", "layers.override.0.ffn.hidden=256")
    whole = state(archzoo.load(tmp_path / "m"))
    part = checkpoint.load_part(tmp_path / "m", rank)
    names = [name for name in whole if ".experts." in name]
    assert len(names) >= 2
    for name in names:
        assert torch.equal(part[name], experts_of(rank, name, whole[name])), name


def test_a_cut_within_a_block_is_refused(tmp_path: Path) -> None:
    quantised(tmp_path / "m")
    with pytest.raises(
        InputError, match=r"experts.*_proj\.weight' is stored in blocks of 128 along dim \d, "
    ):
        checkpoint.load_part(tmp_path / "m", Rank(tensor=(1, 2)))


@pytest.mark.parametrize("rank", [Rank(tensor=(1, 2)), Rank((1, 2), (0, 2))])
def test_groups_of_four_bits_are_read_in_part(rank: Rank, tmp_path: Path) -> None:
    wide = [f"layers.{layers}.ffn.hidden=64" for layers in ("default", "override.0")]
    model = saved("gpt-oss-20b", tmp_path / "m", *wide, "hidden_size=64")
    stored = checkpoint.load(tmp_path / "m")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        e, inside, out = stored.pop(name).shape
        for suffix, size in {
            "_blocks": (e, out, inside // 32, 16),
            "_scales": (e, out, inside // 32),
        }.items():
            stored[name + suffix] = torch.randint(100, 130, size, generator=generator, dtype=torch.uint8)
    checkpoint.save(stored, tmp_path / "m")
    whole = state(archzoo.load(tmp_path / "m"))
    part = checkpoint.load_part(tmp_path / "m", rank)
    for name in (n for n in state(model) if n.endswith(("experts.gate_up", "experts.down"))):
        assert torch.equal(part[name], experts_of(rank, name, whole[name])), name
