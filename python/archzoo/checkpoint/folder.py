"""A model's folder: config files and weights, read all or nothing, written atomically."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.checkpoint.families import families
from archzoo.checkpoint.keymap import Family, Region
from archzoo.checkpoint.shards import Reader, atomic_folder, write_shards
from archzoo.configuration import ModelConfig
from archzoo.errors import ArchzooError, CheckpointError, ConfigError
from archzoo.ops.fp8 import BLOCK, dequantize_blocks

STAGE = 1 << 27  # elements read at once into memory of their own
SCALES = "_scale_inv"  # behind the name of an 8-bit weight
USABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of a weight


def read_config(folder: str | Path) -> tuple[ModelConfig, Family]:
    """The config of a folder and the family whose layout it has."""
    folder = Path(folder)
    files = _json_files(folder)
    claimed = [f for f in families().values() if f.claims(files)]
    if not claimed:
        found = files["config.json"].get("model_type")
        known = ", ".join(sorted(families()))
        raise CheckpointError(f"{folder}: model_type '{found}' is not supported; known families: {known}")
    family = claimed[0]
    try:
        data = family.read(files)
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: the config files lack the key {error} of family '{family.name}'"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of the wrong kind
        raise CheckpointError(
            f"{folder}: the config files do not make sense for family '{family.name}': {error}"
        ) from None
    data = {"name": folder.name, **data, "family": family.name}
    return ModelConfig.from_dict(data, str(folder / "config.json")), family


def _json_files(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    files = {}
    for path in sorted(folder.glob("*config.json")):
        try:
            files[path.name] = json.loads(path.read_text(encoding="utf-8"), object_hook=_unwrap)
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(files[path.name], dict):
            raise CheckpointError(f"{path}: expected a JSON object")
    if "config.json" not in files:
        raise CheckpointError(f"{folder}: no config.json")
    return files


def _wrap(value: Any) -> Any:
    """JSON has no infinity; transformers spells it {"__float__": "Infinity"}."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _wrap(item) for key, item in value.items()}
    return [_wrap(item) for item in value] if isinstance(value, list | tuple) else value


def _unwrap(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by native name; a tied head appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def match(model: nn.Module, reader: Reader, family: Family) -> list[Region]:
    """The regions of the model, once everything in the file fits them: names both ways and all shapes."""
    regions = [r for name, tensor in _tensors(model).items() for r in family.regions(name, tensor)]
    wanted = {region.name for region in regions}
    stored = set(reader.keys())
    config: ModelConfig = model.config  # type: ignore[assignment]
    spare = family.ignored(stored, config.layers.count)
    if config.tie_embeddings:
        spare.add("lm_head.weight")
    spare |= {name + SCALES for name in wanted if _is_fp8(reader, name, stored)}
    extra = sorted(stored - wanted - spare)
    missing = sorted(wanted - stored)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{reader.path}: tensor '{missing[0]}'{more} of family '{family.name}' is missing"
        )
    if extra:
        _, _, file = reader.info(extra[0])
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{file}: tensor '{extra[0]}'{more} has no place in the model")
    for name, _, expected in regions:
        dtype, shape, file = reader.info(name)
        if dtype not in USABLE and not _is_fp8(reader, name, stored):
            known = ", ".join(str(d).removeprefix("torch.") for d in USABLE)
            raise CheckpointError(f"{file}: tensor '{name}' has dtype {dtype}, expected one of {known}")
        if shape != expected:
            raise CheckpointError(
                f"{file}: tensor '{name}' has shape {list(shape)}, the config asks for {list(expected)}"
            )
        if dtype == torch.float8_e4m3fn:
            _, scales, file = reader.info(name + SCALES)
            blocks = tuple(-(-n // BLOCK) for n in shape)
            if scales != blocks:
                raise CheckpointError(
                    f"{file}: tensor '{name}{SCALES}' has shape {list(scales)}, "
                    f"blocks of {BLOCK} ask for {list(blocks)}"
                )
    return regions


def _is_fp8(reader: Reader, name: str, stored: set[str]) -> bool:
    """Whether a matrix is stored in 8 bits with a scale per block beside it (DeepSeek-V3, 2412.19437)."""
    if name not in stored or name + SCALES not in stored:
        return False
    dtype, shape, _ = reader.info(name)
    return dtype == torch.float8_e4m3fn and len(shape) == 2


def adopt_dtypes(model: nn.Module, reader: Reader, family: Family) -> None:
    """Give every parameter of a `meta` model the dtype that is stored for it."""
    match(model, reader, family)
    for name, tensor in _tensors(model).items():
        stored = {reader.info(region.name)[0] for region in family.regions(name, tensor)}
        if torch.float8_e4m3fn in stored:
            stored = {torch.bfloat16}  # what the 8-bit weights stand for
        if len(stored) == 1:
            tensor.data = tensor.data.to(stored.pop())


@torch.no_grad()
def read_into(model: nn.Module, reader: Reader, family: Family) -> None:
    """Fill the model; checks everything first."""
    direct: dict[str, Tensor] = {}
    staged: list[Region] = []
    for region in match(model, reader, family):
        name, view, shape = region
        dtype, _, _ = reader.info(name)
        plain = view.shape == shape and view.is_contiguous() and view.device.type == "cpu"
        if plain and view.dtype == dtype:
            direct[name] = view
        else:
            staged.append(region)
    reader.read_into(direct)
    for batch in _batches(staged):  # read together, in threads
        _read_batch(reader, batch)


def _batches(regions: list[Region]) -> Iterator[list[Region]]:
    """Regions in groups of at most STAGE elements, or a single larger one."""
    batch: list[Region] = []
    size = 0
    for region in regions:
        if batch and size + region.view.numel() > STAGE:
            yield batch
            batch, size = [], 0
        batch.append(region)
        size += region.view.numel()
    if batch:
        yield batch


def _read_batch(reader: Reader, batch: list[Region]) -> None:
    """Read regions that are not the file's bytes: another dtype, order or device, or 8 bits with scales."""
    names = [region.name for region in batch]
    names += [n + SCALES for n in names if reader.info(n)[0] == torch.float8_e4m3fn]
    raw = {n: torch.empty(shape, dtype=dtype) for n in names for dtype, shape, _ in [reader.info(n)]}
    reader.read_into(raw)
    for name, view, _ in batch:
        data = raw[name]
        if data.dtype == torch.float8_e4m3fn:
            data = dequantize_blocks(data, raw[name + SCALES])
        view.copy_(data.view(view.shape))


def write_model(
    model: nn.Module,
    folder: str | Path,
    max_shard_size: int | str,
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """config files, weights and `extra_files` (tokenizer and the like) as one atomic folder."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    family = _family_for(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(model).items():
        tensors |= {r.name: r.view.reshape(r.shape) for r in family.regions(name, tensor.detach())}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    contents = family.write(config)
    with atomic_folder(folder) as tmp:
        for file, content in contents.items():
            if file == "config.json":
                content = {**content, "torch_dtype": dtype}
            text = json.dumps(_wrap(content), indent=2, allow_nan=False)
            (tmp / file).write_text(text + "\n", encoding="utf-8")
        for file, raw in (extra_files or {}).items():
            (tmp / file).write_bytes(raw)
        write_shards(tensors, tmp, max_shard_size)
    for other in families().values():  # an older folder's other files were carried over
        for file in set(other.files) - set(contents):
            (Path(folder) / file).unlink(missing_ok=True)


def _family_for(config: ModelConfig) -> Family:
    """The config's family if its files can hold the config; else the zoo's own, with a warning."""
    known = families()
    family = known.get(config.family)
    if family is None:
        raise ConfigError(f"family '{config.family}': expected one of {', '.join(sorted(known))}")
    if (field := _misfit(family, config)) is None:
        return family
    warnings.warn(
        f"the '{family.name}' layout cannot hold this config ({field}); writing the zoo's own layout instead",
        stacklevel=4,
    )
    return known["archzoo"]


def _misfit(family: Family, config: ModelConfig) -> str | None:
    """What of the config the family's files would not give back; None when they hold all of it."""
    try:
        again = ModelConfig.from_dict(json.loads(json.dumps(family.read(family.write(config)))))
    except (AssertionError, StopIteration):
        return "its blocks"
    except ArchzooError as error:
        return str(error)
    if (field := _difference(_outer(config), _outer(again))) is not None:
        return field
    for i, (old, new) in enumerate(zip(config.specs, again.specs, strict=True)):
        if (field := _difference(old.model_dump(), new.model_dump())) is not None:
            return f"layer {i}: {field}"
    return None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The dotted key of the first difference, and the old value."""
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if (field := _difference(value, other)) is not None:
                return f"{key}.{field}"
        elif value != other:
            return f"{key} = {value!r}"
    return None


def _outer(config: ModelConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"name", "source", "family", "layers"})
