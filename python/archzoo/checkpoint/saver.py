"""Saving in the background while training goes on, and which of many saves to keep."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from archzoo.checkpoint.folder import model_contents
from archzoo.checkpoint.shards import Contents, write_contents
from archzoo.checkpoint.source import Later
from archzoo.errors import CheckpointError, InputError
from archzoo.model import CausalLM


@dataclass(frozen=True)
class Retention:
    """Which of the folders `{prefix}{step}` to keep: the `last` n, and steps that `every` divides."""

    last: int
    every: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every is not None and self.every < 1):
            raise InputError(f"last and every must be at least 1, found {self.last} and {self.every}")

    def prune(self, newest: Path) -> list[Path]:
        """Remove what is not kept beside `newest`, such as runs/step-1200; what was removed, oldest first.

        A folder is renamed before its files go, so that a half-removed one never carries a step's name.
        """
        match = re.fullmatch(r"(.*?)(\d+)", newest.name)
        if match is None:
            raise InputError(f"{newest}: expected a folder with a step's number at the end of its name")
        name = re.compile(re.escape(match[1]) + r"(\d+)")
        steps: dict[int, Path] = {}
        for path in newest.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(match[1])}\d+\.removed", path.name):  # by a process that died
                shutil.rmtree(path)
            elif (found := name.fullmatch(path.name)) and path.is_dir():
                steps[int(found[1])] = path
        removed = []
        for step in sorted(steps)[: -self.last]:
            if self.every is None or step % self.every:
                hidden = steps[step].with_name(f".{steps[step].name}.removed")
                steps[step].rename(hidden)
                shutil.rmtree(hidden)
                removed.append(steps[step])
        return removed


class AsyncSaver:
    """Saves in a background thread, from a copy: training may change the tensors as soon as `save` returns.

    At most one save is under way: the next one waits for it. An error is raised by the next call. The copy is
    kept for the next save; of CUDA tensors it is in pinned memory, and only the thread waits for it.
    Use it as a context manager, or call `wait` at the end.
    """

    def __init__(self, retention: Retention | None = None) -> None:
        self.retention = retention
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[str, Tensor] = {}

    def save(
        self,
        what: CausalLM | Mapping[str, Tensor] | Contents,
        folder: str | Path,
        *,
        max_shard_size: int | str = "4GB",
    ) -> None:
        """Start to write a model's folder, tensors, or what `training_state` gives, atomically."""
        self.wait()
        if isinstance(what, CausalLM):
            what = model_contents(what)
        elif not isinstance(what, Contents):
            what = Contents(what)
        contents, events = self._snapshot(what)

        def write() -> None:
            try:
                for event in events:
                    event.synchronize()
                write_contents(contents, folder, max_shard_size)
                if self.retention is not None:
                    self.retention.prune(Path(folder))
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=write, name="archzoo-save")
        self._thread.start()

    def wait(self) -> None:
        """Return when the save that is under way is on the disk; raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, CheckpointError | InputError):
                raise error
            raise CheckpointError(f"the save in the background failed: {error}") from error

    @torch.no_grad()
    def _snapshot(self, contents: Contents) -> tuple[Contents, list[Any]]:
        """A copy, and events after which it is complete."""
        copies, devices = {}, set()
        for name, found in contents.tensors.items():
            tensor = found.make() if isinstance(found, Later) else found
            on_gpu = tensor.device.type == "cuda"
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            copies[name] = copy.copy_(tensor, non_blocking=on_gpu)
            if on_gpu:
                devices.add(tensor.device)
        self._copies = copies
        events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return Contents(copies, contents.files, contents.obsolete), events

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
