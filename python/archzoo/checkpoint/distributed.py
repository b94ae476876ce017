"""Interchange with torch.distributed.checkpoint (DCP), both ways, a tensor at a time."""

from __future__ import annotations

import io
import json
import warnings
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from archzoo.checkpoint.shards import Contents, Reader, write_contents
from archzoo.checkpoint.source import Later
from archzoo.checkpoint.training import STATE_FILE
from archzoo.errors import CheckpointError


class _FromReader(DefaultSavePlanner):
    """Saves what a reader has, by its names; tensors are read when they are written."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return self.reader.read(index.fqn) if isinstance(found, Tensor) else found


class _WithoutPickle(DefaultLoadPlanner):
    """Loads values that are not tensors without running what a pickle asks for."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _DcpFolder(FileSystemReader):
    """An open folder whose index is read once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._lock = Lock()
        try:
            self.metadata: Metadata = super().read_metadata()
        except Exception as error:
            raise CheckpointError(f"{path}: not a torch.distributed.checkpoint folder: {error}") from None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def load(self, state: dict[str, Any]) -> None:
        """Fill in the values of a state; one thread at a time."""
        with self._lock:
            _quietly(load, state, storage_reader=self, planner=_WithoutPickle(), no_dist=True)

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        self.load({name: out})
        return out


def to_dcp(folder: str | Path, dcp_folder: str | Path) -> None:
    """Write the tensors of a checkpoint, and its training state, as a DCP folder.

    Names stay as they are; state.json becomes the value "state.json".
    """
    reader = Reader(folder)
    state: dict[str, Any] = {}
    for name in reader.keys():  # noqa: SIM118
        dtype, shape, _ = reader.info(name)
        state[name] = torch.empty(shape, dtype=dtype, device="meta")
    path = Path(folder) / STATE_FILE
    if path.exists():
        state[STATE_FILE] = path.read_text(encoding="utf-8")
    _quietly(save, state, checkpoint_id=dcp_folder, planner=_FromReader(reader), no_dist=True)


def from_dcp(
    dcp_folder: str | Path, folder: str | Path, *, max_shard_size: int | str = "4GB"
) -> dict[str, Any]:
    """Write the tensors of a DCP folder, whatever number of ranks wrote it, as safetensors, atomically.

    Values that are not tensors are returned; of `to_dcp`'s folders they are the state.json. DCP keeps its
    index as a pickle, which torch reads: convert only folders that you trust.
    """
    source = _DcpFolder(dcp_folder)
    tensors: dict[str, Tensor | Later] = {}
    values: dict[str, Any] = {}
    for name, entry in source.metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype, shape = entry.properties.dtype, tuple(entry.size)
            tensors[name] = Later(dtype, shape, partial(source.tensor, name, dtype, shape))
        elif isinstance(entry, BytesStorageMetadata):
            values[name] = None
    source.load(values)
    files = {}
    if isinstance(text := values.pop(STATE_FILE, None), str):
        json.loads(text)
        files[STATE_FILE] = text.encode()
    write_contents(Contents(tensors, files), folder, max_shard_size)
    return values


def _quietly(call: Any, *args: Any, **kwargs: Any) -> None:
    """Without the warning that one process is meant, which no_dist says already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        call(*args, **kwargs)
