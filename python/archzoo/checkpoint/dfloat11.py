"""Folders of the public DFloat11 format (arXiv 2504.11651, version 0.5.0).

The linear weights of a block share one code; embedding and head have their own. A group's buffers carry the
name of its module; config.json tells by a pattern which submodules' weights they are, in which order. Weights
that a group cannot hold stay as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archzoo import _rust
from archzoo.checkpoint.source import Bytes, Later, made
from archzoo.errors import CheckpointError

KEY = "dfloat11_config"
BUFFERS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
IN_A_BLOCK = re.compile(r"(.+\.\d+)\.(.+)\.weight")
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TAGS = {dtype: tag for tag, dtype in PLAIN.items()}  # cast into each other while they are read
Ranges = tuple[tuple[int, int], ...]


def encode(tensors: Mapping[str, Tensor | Later]) -> tuple[dict[str, Tensor | Later], dict[str, Any]]:
    """Tensors as they are stored, and what goes under `dfloat11_config` of config.json.

    Weights are read twice: now for the sizes, and when their group is written. Beyond the public format the
    config also lists their shapes.
    """
    groups: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16 or len(tensor.shape) != 2 or not name.endswith(".weight"):
            continue
        match = IN_A_BLOCK.fullmatch(name)
        prefix, part = (match[1], match[2]) if match else (name.removesuffix(".weight"), "")
        groups.setdefault(prefix, {})[name] = part
    stored = dict(tensors)
    modules: dict[tuple[str, ...], list[str]] = {}
    held: dict[int, dict[str, Bytes]] = {}
    # In one piece: small ones between weights would keep the memory that these leave from being used again.
    all_counts = np.zeros((len(groups), 256), np.uint64)
    for i, (prefix, parts) in enumerate(groups.items()):
        weights = [tensors[name] for name in parts]
        measured = _rust.measure_dfloat11(map(made, weights))
        if measured is None:
            continue
        all_counts[i], sizes = measured
        for name in parts:
            del stored[name]
        names = [f"{prefix}.{kind}" for kind in BUFFERS]
        for name, size in zip(names, sizes, strict=True):
            make = partial(_buffer, held, name, names, all_counts, i, weights)
            stored[name] = Later(torch.uint8, (size,), make)
        splits = list(accumulate(math.prod(w.shape) for w in weights))[:-1]
        stored[f"{prefix}.split_positions"] = Later(
            torch.int64, (len(splits),), partial(torch.tensor, splits, dtype=torch.int64)
        )
        modules.setdefault(tuple(filter(None, parts.values())), []).append(prefix)
    config = {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": {"|".join(map(re.escape, names)): list(parts) for parts, names in modules.items()},
        "shapes": {name: list(t.shape) for name, t in tensors.items() if name not in stored},
    }
    return stored, config


def _buffer(
    held: dict[int, dict[str, Bytes]],
    name: str,
    names: list[str],
    all_counts: npt.NDArray[np.uint64],
    group: int,
    weights: list[Tensor | Later],
) -> Tensor:
    """One of a group's buffers; a thread holds the others, which follow in the file, until the next group."""
    own = held.setdefault(get_ident(), {})
    if name not in own:
        own.clear()
        buffers = _rust.encode_dfloat11(all_counts[group].tolist(), map(made, weights))
        own.update(zip(names, buffers, strict=True))
    return torch.from_numpy(own.pop(name))


def config_of(path: Path) -> dict[str, Any] | None:
    """`dfloat11_config` of a folder, if it has such."""
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    found = content.get(KEY) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


class DFloat11Folder:
    """An open folder whose weights go by their own names.

    A weight of which the folder does not tell the shape is a vector.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._reader = _rust.CheckpointReader(path)
        self._stored = self._reader.infos()
        self._infos = dict(self._stored)
        self._groups: dict[str, str] = {}
        self._weights: dict[str, dict[str, int]] = {}
        patterns, shapes = config.get("pattern_dict"), config.get("shapes", {})
        if not isinstance(patterns, dict) or not isinstance(shapes, dict):
            raise CheckpointError(f"{path / 'config.json'}: {KEY}: expected a pattern_dict")
        self._shapes = shapes
        for prefix in [name.removesuffix(".luts") for name in self._infos if name.endswith(".luts")]:
            file = self._infos[f"{prefix}.luts"][2]
            missing = [
                kind for kind in (*BUFFERS, "split_positions") if f"{prefix}.{kind}" not in self._infos
            ]
            if missing:
                raise CheckpointError(f"{file}: tensor '{prefix}.{missing[0]}' is missing")
            parts = next((v for k, v in patterns.items() if re.fullmatch(k, prefix)), None)
            if parts is None:
                raise CheckpointError(f"{file}: module '{prefix}': expected a pattern of it in config.json")
            names = [f"{prefix}.{part}.weight" for part in parts] or [f"{prefix}.weight"]
            ends = [*self._read(f"{prefix}.split_positions").view(np.int64).tolist()]
            ends.append(math.prod(self._infos[f"{prefix}.sign_mantissa"][1]))
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            if len(sizes) != len(names) or min(sizes) < 0:
                raise CheckpointError(
                    f"{file}: module '{prefix}': expected {len(names)} weights, found {sizes}"
                )
            for kind in (*BUFFERS, "split_positions"):
                del self._infos[f"{prefix}.{kind}"]
            self._weights[prefix] = dict(zip(names, sizes, strict=True))
            for name, size in self._weights[prefix].items():
                shape = tuple(shapes.get(name, [size]))
                if math.prod(shape) != size:
                    raise CheckpointError(f"{file}: tensor '{name}': expected {size} elements, found {shape}")
                self._infos[name] = ("BF16", shape, file, None)
                self._groups[name] = prefix

    def infos(self) -> dict[str, tuple[str, tuple[int, ...], str, int | None]]:
        """Per weight: dtype, shape, path of the file, and where it is in it (None in a group)."""
        return self._infos

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read, as stored."""
        return self._reader.bytes_read

    @property
    def unchecked_files(self) -> list[Path]:
        """Files without checksums."""
        return self._reader.unchecked_files

    def verify(self) -> list[str]:
        """What is wrong with the stored bytes."""
        return self._reader.verify()

    def shape(self, name: str, expected: tuple[int, ...]) -> bool:
        """Give a weight of unknown shape the one that is expected; whether it has that now."""
        tag, shape, file, start = self._infos[name]
        if name in self._groups and name not in self._shapes and shape == (math.prod(expected),):
            self._infos[name] = (tag, expected, file, start)
        return self._infos[name][1] == expected

    def fill(self, parts: Sequence[tuple[str, Tensor, Ranges]], verify: bool = False) -> None:
        """Read tensors, or boxes of them, into contiguous CPU tensors of any dtype, a group at a time."""
        wanted: dict[str | None, list[tuple[str, Tensor, Ranges]]] = {}
        for part in parts:
            wanted.setdefault(self._groups.get(part[0]), []).append(part)
        for name, out, ranges in wanted.pop(None, []):
            tag = None if out.dtype == PLAIN.get(self._infos[name][0], out.dtype) else TAGS[out.dtype]
            self._reader.read_into([(name, out.data_ptr(), out.nbytes, list(ranges), tag)], verify)
        for prefix, own in wanted.items():
            assert prefix is not None
            direct = {name: out for name, out, ranges in own if not ranges and out.dtype == torch.bfloat16}
            weights = {
                name: direct[name]
                if name in direct
                else torch.empty(self._infos[name][1], dtype=torch.bfloat16)
                for name in self._weights[prefix]
            }
            luts, stream, rest, positions, gaps = (self._read(f"{prefix}.{kind}", verify) for kind in BUFFERS)
            raw = [weight.reshape(-1).view(torch.uint8).numpy() for weight in weights.values()]
            try:
                _rust.decode_dfloat11((luts, stream, rest, positions, gaps), raw)
            except _rust.CheckpointError as error:
                file = self._infos[next(iter(weights))][2]
                raise CheckpointError(f"{file}: module '{prefix}': {error}") from None
            for name, out, ranges in own:
                if weights[name] is not out:
                    out.copy_(weights[name][tuple(slice(*r) for r in ranges)])

    def _read(self, name: str, verify: bool = False) -> Bytes:
        tag, shape, file, _ = self._stored[name]
        if tag not in ("U8", "I64"):
            raise CheckpointError(f"{file}: tensor '{name}': expected U8 or I64, found {tag}")
        out = np.empty(math.prod(shape) * (1 if tag == "U8" else 8), np.uint8)
        self._reader.read_into([(name, out.ctypes.data, out.nbytes, [], None)], verify)
        return out
