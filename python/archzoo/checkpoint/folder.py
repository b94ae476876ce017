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
from archzoo.checkpoint.quantized import Format, stored_as
from archzoo.checkpoint.shards import CASTS, STAGE, Contents, Part, Reader, stages, write_contents
from archzoo.configuration import ModelConfig
from archzoo.data.gguf import GgufFile
from archzoo.errors import ArchzooError, CheckpointError, ConfigError

Forms = dict[str, Format | None]  # of each of the file's weights; None when its tensor is the weight
USABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of a weight


def read_config(folder: str | Path, mtp: bool = False) -> tuple[ModelConfig, Family]:
    """The config of a folder or GGUF file and the family whose layout it has.

    Prediction modules that transformers leaves out are part of it if `mtp`.
    """
    folder = Path(folder)
    files = _json_files(folder)
    claimed = [f for f in families().values() if f.reads(files)]
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
    if mtp and not data.get("mtp"):
        raise CheckpointError(f"{folder}: its config names no prediction modules to load with mtp=True")
    if not mtp and family.beyond is not None:
        data = {**data, "mtp": None}
    data = {"name": folder.name, **data, "family": family.name}
    return ModelConfig.from_dict(data, str(folder / "config.json")), family


def _json_files(folder: Path) -> dict[str, Any]:
    if folder.suffix == ".gguf":
        return {"config.json": GgufFile(folder).config()}
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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by native name; a tied head appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def match(model: nn.Module, reader: Reader, family: Family) -> Forms:
    """How each weight of the model is stored, once everything in the file fits: names and all shapes."""
    stored = set(reader.keys())
    config: ModelConfig = model.config  # type: ignore[assignment]
    layers, depth = config.layers.count, 0 if config.mtp is None else config.mtp.depth
    regions = [
        (r, stored_as(reader, stored, r.name, r.shape))
        for name, tensor in model_tensors(model).items()
        for r in family.regions(name, tensor, stored, layers)
    ]
    wanted = {part for r, form in regions for part in (form.names(r.name) if form else [r.name])}
    copies = [
        (r, stored_as(reader, stored, r.name, r.shape)) for r in _copies(model, family) if r.name in stored
    ]
    spare = family.ignored(stored, layers + depth)
    spare |= {part for r, form in copies for part in (form.names(r.name) if form else [r.name])}
    if config.tie_embeddings:
        spare.add("lm_head.weight")
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
    for (name, _, expected, _), form in [*regions, *copies]:
        if form is not None:
            form.check(reader, name, expected)
            continue
        dtype, shape, file = reader.info(name)
        if dtype not in USABLE:
            known = ", ".join(str(d).removeprefix("torch.") for d in USABLE)
            raise CheckpointError(f"{file}: tensor '{name}' has dtype {dtype}, expected one of {known}")
        if not reader.has_shape(name, expected):
            raise CheckpointError(
                f"{file}: tensor '{name}' has shape {list(shape)}, the config asks for {list(expected)}"
            )
    return {region.name: form for region, form in regions}


def _copies(model: nn.Module, family: Family) -> list[Region]:
    """Embedding and head as the file repeats them in every prediction module."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    embed = model.get_parameter("embed.weight")
    head = embed if config.tie_embeddings else model.get_parameter("lm_head.weight")
    return [
        Region(pattern.replace("{i}", str(config.layers.count + k)), weight.detach(), tuple(weight.shape))
        for k in range(0 if config.mtp is None else config.mtp.depth)
        for pattern, weight in zip(family.copies, (embed, head), strict=False)
    ]


def adopt_dtypes(model: nn.Module, reader: Reader, family: Family, forms: Forms) -> None:
    """Give every parameter of a `meta` model the dtype that is stored for it, bf16 for fewer bits."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    for name, tensor in model_tensors(model).items():
        keys = [region.name for region in family.regions(name, tensor, forms, config.layers.count)]
        stored = {torch.bfloat16 if forms[key] else reader.info(key)[0] for key in keys}
        if len(stored) == 1:
            tensor.data = tensor.data.to(stored.pop())


@torch.no_grad()
def read_into(
    model: nn.Module, reader: Reader, family: Family, forms: Forms, *, verify: bool = False
) -> None:
    """Fill a model that `match` has compared with the file; then compares copies with what they copy.

    With `verify` what is read as a whole is compared with its checksum, where the file has one.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    regions = [
        (region, forms[region.name])
        for name, tensor in model_tensors(model).items()
        for region in family.regions(name, tensor, forms, config.layers.count)
    ]
    read_regions(reader, regions, verify=verify)
    stored = set(reader.keys())
    for name, weight, shape, _ in _copies(model, family):
        if name in stored:
            copy = torch.empty_like(weight)
            form = stored_as(reader, stored, name, shape)
            read_regions(reader, [(Region(name, copy, shape), form)], verify=verify)
            if not torch.equal(copy, weight):
                raise CheckpointError(
                    f"{reader.info(name)[2]}: tensor '{name}' differs from that of the model, which shares it"
                )


def read_regions(
    reader: Reader, regions: list[tuple[Region, Format | None]], *, verify: bool = False
) -> None:
    """Fill the regions' views: straight from the file where it has their order, else through STAGE bytes."""
    direct: list[Part] = []
    staged: list[tuple[Region, Format | None]] = []
    for region, form in regions:
        parts = None if form else _direct(reader, region)
        if parts is None:
            staged.append((region, form))
        else:
            direct += parts
    reader.read_parts(direct, verify=verify)
    for batch in stages(_pieces(reader, staged), lambda piece: piece[0].view.nbytes):
        _read_batch(reader, batch, verify)


def _direct(reader: Reader, region: Region) -> list[Part] | None:
    """The parts of the file that are a region's memory, cast at most; None if it has another order."""
    name, view, shape, ranges = region
    stored = reader.info(name)[0]
    fits = view.dtype == stored or {view.dtype, stored} <= CASTS
    if view.device.type != "cpu" or view.shape != region.part or not fits:
        return None
    if view.is_contiguous():
        return [Part(name, view, ranges)]
    if not view[:1].is_contiguous():
        return None
    first, *rest = ranges or ((0, shape[0]),)
    rows = range(first[0], first[1])
    return [Part(name, row[None], ((i, i + 1), *rest)) for i, row in zip(rows, view, strict=True)]


def _pieces(
    reader: Reader, regions: list[tuple[Region, Format | None]]
) -> Iterator[tuple[Region, Format | None]]:
    """Regions, or rows of them; what cannot be cut may be larger than STAGE."""
    for region, form in regions:
        for piece in [region] if form else _rows(region, reader.info(region.name)[0].itemsize):
            yield piece, form


def _rows(region: Region, itemsize: int) -> Iterator[Region]:
    """A region cut along dim 0, which the file has too, into parts of at most STAGE bytes."""
    part = region.part
    if not part or math.prod(part) * itemsize <= STAGE:
        yield region
        return
    first, *rest = region.ranges or tuple((0, size) for size in region.shape)
    step = max(1, STAGE // (math.prod(part[1:]) * itemsize))
    for i in range(0, part[0], step):
        stop = min(i + step, part[0])
        yield region._replace(view=region.view[i:stop], ranges=((first[0] + i, first[0] + stop), *rest))


def _read_batch(reader: Reader, batch: list[tuple[Region, Format | None]], verify: bool) -> None:
    """Read regions that are not the file's bytes: another dtype, order or device, or fewer bits."""
    raw: list[list[Part]] = []
    for region, form in batch:
        parts = []
        own = form.parts(region.name, region.shape, region.ranges) if form else [(region.name, region.ranges)]
        for name, ranges in own:
            dtype, shape, _ = reader.info(name)
            size = (*(stop - start for start, stop in ranges), *shape[len(ranges) :])
            pinned = region.view.device.type == "cuda"
            buffer = torch.empty(size, dtype=dtype, pin_memory=pinned)
            parts.append(Part(name, buffer, ranges))
        raw.append(parts)
    reader.read_parts([part for parts in raw for part in parts], verify=verify)
    for (region, form), parts in zip(batch, raw, strict=True):
        tensors = [part.destination for part in parts]
        data = form.decode(*tensors) if form else tensors[0]
        region.view.copy_(data.reshape(region.view.shape))


def write_model(
    model: nn.Module,
    folder: str | Path,
    max_shard_size: int | str,
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """config files, weights and `extra_files` (tokenizer and the like) as one atomic folder."""
    write_contents(model_contents(model, extra_files), folder, max_shard_size)


def model_contents(model: nn.Module, extra_files: dict[str, bytes] | None = None) -> Contents:
    """config files, weights (views of the parameters) and `extra_files` of a model's folder."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    family = _family_for(config)
    layers = config.layers.count
    tensors = {r.name: r.view for r in _copies(model, family)}
    for name, tensor in model_tensors(model).items():
        regions = family.regions(name, tensor.detach(), layers=layers)
        tensors |= {r.name: r.view.reshape(r.shape) for r in regions}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    files = {}
    for file, content in family.write(config).items():
        if file == "config.json":
            content = {**content, "torch_dtype": dtype}
        text = json.dumps(_wrap(content), indent=2, allow_nan=False)
        files[file] = (text + "\n").encode()
    obsolete = {file for other in families().values() for file in other.files} - set(files)
    return Contents(tensors, files | (extra_files or {}), tuple(sorted(obsolete)))


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
        stacklevel=5,
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
