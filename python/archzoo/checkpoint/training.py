"""All that the next training step depends on, as safetensors and JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.checkpoint.shards import Contents, Reader
from archzoo.errors import CheckpointError

STATE_FILE = "state.json"


@runtime_checkable
class Stateful(Protocol):
    """A scheduler, a data set, ...: its state is JSON values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rng: bool = False,
    extra: Mapping[str, Any] | None = None,
    **parts: Stateful,
) -> Contents:
    """What `save` or `AsyncSaver` writes as a folder from which `load_training` goes on.

    Tensors are `model.{name}`, `optimizer.{parameter}.{key}` and `{part}.{key}`, whole where FSDP has sharded
    them (so every rank must call this, and one writes); the rest is in state.json.

    Args:
        optimizer: its state and the settings of its groups.
        rng: also the generators of Python, NumPy, torch and every CUDA device.
        extra: JSON values that `load_training` gives back, such as the step.
        parts: anything else with a `state_dict`: scheduler=..., data=...
    """
    tensors = {f"model.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    state: dict[str, Any] = {"extra": dict(extra or {})}
    if optimizer is not None:
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{names[parameter]}.{key}"] = whole(torch.as_tensor(value))
        state["optimizer"] = [
            {key: [names[p] for p in value] if key == "params" else value for key, value in group.items()}
            for group in optimizer.param_groups
        ]
    for part, thing in parts.items():
        state[part] = thing.state_dict()
    if rng:
        state["rng"] = _generators()
    packed = {key: _pack(value, key, tensors) for key, value in state.items()}
    return Contents(tensors, {STATE_FILE: (json.dumps(packed, indent=2) + "\n").encode()})


@torch.no_grad()
def load_training(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rng: bool = False,
    verify: bool = True,
    **parts: Stateful,
) -> dict[str, Any]:
    """Put back what `training_state` took, compared with its checksums; returns its `extra`.

    Everything is read and compared with the model before anything is changed.
    """
    folder = Path(folder)
    state, tensors = read_state(folder), _load(folder, verify)
    targets = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, target in targets.items():
        if (saved := tensors.get(name)) is None or saved.shape != target.shape:
            found = "nothing" if saved is None else f"{list(saved.shape)}"
            raise CheckpointError(f"{folder}: tensor '{name}': expected {list(target.shape)}, found {found}")
    unpacked = {}
    for key in [*(["optimizer"] if optimizer else []), *parts, *(["rng"] if rng else [])]:
        if key not in state:
            raise CheckpointError(f"{folder / STATE_FILE}: expected the state of '{key}', found none")
        unpacked[key] = _unpack(state[key], tensors)
    if optimizer is not None:
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        mine = [[names.get(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        if mine != [group["params"] for group in unpacked["optimizer"]]:
            raise CheckpointError(f"{folder}: the optimizer's groups hold other parameters than it expects")
    for name, target in targets.items():
        target.copy_(like(tensors[name], target))
    if optimizer is not None:
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                parameter_name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                states.setdefault(parameter_name, {})[entry] = tensor
        for group, saved_group in zip(optimizer.param_groups, unpacked["optimizer"], strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
            on_device = group.get("fused") or group.get("capturable")
            for parameter, name in zip(group["params"], saved_group["params"], strict=True):
                optimizer.state[parameter] = {
                    # A step count that the host reads stays on the host.
                    entry: tensor if entry == "step" and not on_device else like(tensor, parameter)
                    for entry, tensor in states.get(name, {}).items()
                }
    for part, thing in parts.items():
        thing.load_state_dict(unpacked[part])
    if rng:
        _restore(unpacked["rng"])
    extra: dict[str, Any] = _unpack(state["extra"], tensors)
    return extra


def read_state(folder: str | Path) -> dict[str, Any]:
    """The state.json of a folder, tensors by reference."""
    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: this folder holds no training state") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("extra"), dict):
        raise CheckpointError(f"{path}: expected a JSON object with 'extra'")
    return state


def _load(folder: Path, verify: bool) -> dict[str, Tensor]:
    reader = Reader(folder)
    out = {name: torch.empty(reader.info(name)[1], dtype=reader.info(name)[0]) for name in reader.keys()}  # noqa: SIM118
    reader.read_into(out, verify=verify)
    return out


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a state, with its tensors put into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = whole(value)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return {"$items": [[key, _pack(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
        return {key: _pack(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the state '{path}' is a {type(value).__name__}, which is neither JSON nor a tensor"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": str(name)}:
            if name not in tensors:
                raise CheckpointError(f"tensor '{name}': expected by {STATE_FILE}, found in no file")
            return tensors[name]
        case {"$tuple": list(items)}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"$items": list(items)}:
            return {key: _unpack(item, tensors) for key, item in items}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _generators() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def whole(tensor: Any) -> Tensor:
    """All of a tensor that FSDP may have sharded."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def like(tensor: Tensor, target: Any) -> Tensor:
    """A loaded tensor on the target's device, sharded like it."""
    tensor = tensor.to(target.device)
    if hasattr(target, "full_tensor") and tensor.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, target.device_mesh, target.placements)
    return tensor
