"""What of a checkpoint one rank reads, by expert, tensor and pipeline parallelism."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from archzoo.checkpoint.folder import adopt_dtypes, match, model_tensors, read_config, read_regions
from archzoo.checkpoint.keymap import Family, Region
from archzoo.checkpoint.quantized import Format
from archzoo.checkpoint.shards import Reader, shown
from archzoo.configuration import ModelConfig
from archzoo.errors import InputError
from archzoo.model import CausalLM, skeleton

Shape = tuple[int, ...]

EXPERTS = re.compile(r"\.experts\.")  # dim 0 is the expert
SPLIT = (  # by tensor parallelism, along this dim; what is not here is the same on every rank
    (re.compile(r"(embed|lm_head)\.weight|.*\.(q|k|v|q_b|kv_b|gate|up)_proj\.(weight|bias)"), 0),
    (re.compile(r".*\.mixer\.sinks"), 0),
    (re.compile(r".*\.(o|down)_proj\.weight"), 1),
    (re.compile(r".*\.experts\.(gate_up|gate_up_bias)"), 1),
    (re.compile(r".*\.experts\.down"), 2),
)


@dataclass(frozen=True)
class Rank:
    """(index, count) of a process in each kind of parallelism; equal, neighbouring parts.

    `expert`: a range of experts. `tensor`: of projections, embedding and head a range of rows or columns; of
    fused gates and ups [E, 2I, d] the rank's gates, then its ups. `pipeline`: a range of layers; the first
    rank also has the embedding, the last the final norm, head and prediction modules.
    """

    expert: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)
    pipeline: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for kind in ("expert", "tensor", "pipeline"):
            index, count = getattr(self, kind)
            if not 0 <= index < count:
                raise InputError(f"{kind}: rank {index} is not in range({count})")


def plan(model: CausalLM, rank: Rank) -> dict[str, Shape]:
    """The shape of what `rank` holds of each parameter and buffer, by native name; others it does not hold.

    Raises InputError where the ranks do not divide what they share.
    """
    config: ModelConfig = model.config
    parts = rank.tensor[1]
    for i, spec in enumerate(config.specs):
        for heads in ("heads", "kv_heads"):
            count = getattr(spec.mixer, heads, None) if spec.mixer.kind in ("attention", "mla") else None
            if count is not None and count % parts:
                raise InputError(
                    f"layer {i}: {parts} tensor-parallel ranks do not divide its {count} {heads}"
                )
    tensors = model_tensors(model)
    out = {}
    for name, tensor in tensors.items():
        if not _on_stage(name, config, rank.pipeline):
            continue
        shape = list(tensor.shape)
        for dim, count, kind in _splits(name, tensors, rank):
            if shape[dim] % count:
                raise InputError(f"'{name}': {count} {kind}-parallel ranks do not divide {shape[dim]}")
            shape[dim] //= count
        out[name] = tuple(shape)
    return out


def _on_stage(name: str, config: ModelConfig, pipeline: tuple[int, int]) -> bool:
    index, count = pipeline
    first, last = (config.layers.count * i // count for i in (index, index + 1))
    if layer := re.match(r"layers\.(\d+)\.", name):
        return first <= int(layer[1]) < last
    is_last = index == count - 1
    return (index == 0 or (is_last and config.tie_embeddings)) if name.startswith("embed.") else is_last


def _splits(name: str, tensors: Mapping[str, Tensor], rank: Rank) -> Iterator[tuple[int, int, str]]:
    """(dim, ranks, kind) of each way in which a parameter is shared."""
    if rank.expert[1] > 1 and EXPERTS.search(name):
        yield 0, rank.expert[1], "expert"
    if rank.tensor[1] > 1:
        # The single key and value head of multi-matrix factorization is every rank's.
        only_head = re.fullmatch(r"(.*\.)[kv]_proj\.weight", name)
        whole = only_head is not None and f"{only_head[1]}q_b_proj.weight" in tensors
        for pattern, dim in SPLIT:
            if not whole and pattern.fullmatch(name):
                yield dim, rank.tensor[1], "tensor"
        if norm := re.fullmatch(r"(.*\.[qk]_)norm\.weight", name):  # over each head, or over all
            projection = tensors.get(f"{norm[1]}proj.weight")
            if projection is not None and len(projection) == len(tensors[name]):
                yield 0, rank.tensor[1], "tensor"


def _regions(
    family: Family, name: str, local: Tensor, full: list[Region], rank: Rank, layers: int, stored: set[str]
) -> Iterator[Region]:
    """The file tensors of a rank's part of a parameter, of all of which they are `full`."""
    regions = family.regions(name, local, stored, layers)
    start = rank.expert[0] * len(regions) if len(regions) < len(full) else 0
    for whole, region in zip(full[start : start + len(regions)], regions, strict=True):
        ranges = []
        for dim, (size, mine) in enumerate(zip(whole.shape, region.shape, strict=True)):
            by_expert = dim == 0 and EXPERTS.search(name) and len(region.shape) == local.dim()
            index = (rank.expert if by_expert else rank.tensor)[0] if mine < size else 0
            ranges.append((index * mine, (index + 1) * mine))
        yield Region(whole.name, region.view, whole.shape, tuple(ranges))


@torch.no_grad()
def read_part(
    model: CausalLM, reader: Reader, family: Family, rank: Rank, *, verify: bool = False
) -> dict[str, Tensor]:
    """What `rank` holds of a checkpoint, by native name: CPU tensors of the model's dtypes.

    `model` may be on `meta`. The whole checkpoint is checked first, only the rank's bytes are read.
    """
    forms = match(model, reader, family)
    stored, layers = set(reader.keys()), model.config.layers.count
    tensors = model_tensors(model)
    out: dict[str, Tensor] = {}
    wanted: list[tuple[Region, Format | None]] = []
    for name, shape in plan(model, rank).items():
        out[name] = torch.empty(shape, dtype=tensors[name].dtype)
        full = family.regions(name, tensors[name], stored, layers)
        for region in _regions(family, name, out[name], full, rank, layers, stored):
            wanted.append((region, forms[region.name]))
    read_regions(reader, wanted, verify=verify)
    return out


def load_part(
    folder: str | Path,
    rank: Rank,
    *,
    dtype: torch.dtype | None = None,
    mtp: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> dict[str, Tensor]:
    """What `rank` holds of a model's folder, by native name; dtype None keeps the stored one."""
    config, family = read_config(folder, mtp)
    reader = Reader(folder)
    model = skeleton(config, dtype or torch.float32)
    if dtype is None:
        adopt_dtypes(model, reader, family, match(model, reader, family))
    with shown(reader, f"read {reader.path.name}", progress):
        return read_part(model, reader, family, rank, verify=verify)


@torch.no_grad()
def join(model: CausalLM, family: Family, parts: Mapping[Rank, Mapping[str, Tensor]]) -> None:
    """Fill a model from what all its ranks hold; the inverse of `read_part`."""
    tensors, layers = model_tensors(model), model.config.layers.count
    missing = set(tensors)
    for rank, held in parts.items():
        for name, shape in plan(model, rank).items():
            if name not in held or held[name].shape != shape:
                found = list(held[name].shape) if name in held else "nothing"
                raise InputError(f"{rank}: '{name}': expected {list(shape)}, found {found}")
            full = family.regions(name, tensors[name].detach(), layers=layers)
            views = {region.name: region.view for region in full}
            for region in _regions(family, name, held[name], full, rank, layers, set()):
                _box(views[region.name], region).copy_(region.view)
            missing.discard(name)
    if missing:
        raise InputError(f"'{min(missing)}': expected on some rank, found on none")


def _box(view: Tensor, region: Region) -> Tensor:
    """The part of a full region's view that a rank's region is."""
    dim = 0
    for size, (start, stop) in zip(region.shape, region.ranges, strict=True):
        if view.shape[dim] == size:
            view = view.narrow(dim, start, stop - start)
            dim += 1
        else:  # rows of two halves in turns: [..., size / 2, 2, ...]
            view = view.narrow(dim, start // 2, (stop - start) // 2)
            dim += 2
    return view
