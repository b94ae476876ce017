"""A pack of token shards as training sequences: order, documents, ranks and workers, resume."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from archzoo.data.pack import MANIFEST, PackManifest
from archzoo.errors import InputError, PackError

Item = dict[str, Tensor]
_M64 = (1 << 64) - 1


class Pack:
    """An opened pack: one long array of tokens, memory-mapped shard by shard when first read.

    Opening reads the manifest and compares the size of every file; `verify_pack` also reads the bytes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = PackManifest.read(folder)
        for name, size, _ in self.manifest.files():
            path = self.folder / name
            if not path.exists():
                raise PackError(f"{path}: missing")
            if (found := path.stat().st_size) != size:
                raise PackError(f"{path}: {found} bytes, the manifest says {size}")
        self.vocab_size = self.manifest.settings.vocab_size
        self._shards = [shard for shard in self.manifest.shards if shard.tokens]
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._maps: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        """Tokens in all."""
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[Pack], tuple[Path]]:
        return Pack, (self.folder,)  # a pickled memory map would be a copy of its file

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start ... stop-1."""
        out = np.empty(stop - start, np.int64)
        for i, low, high in self._parts(start, stop):
            at = self._starts[i]
            tokens = self._map(f"{self._shards[i].name}.tokens", self.manifest.dtype)
            out[low - start : high - start] = tokens[low - at : high - at]
        return out

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where documents start among the tokens start ... stop-1, ascending and each once."""
        found = []
        for i, low, high in self._parts(start, stop):
            at = self._starts[i]
            starts = self._map(f"{self._shards[i].name}.documents", "int64")
            first, last = np.searchsorted(starts, (low - at, high - at))
            found.append(starts[first:last] + at)
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of what a range takes from each shard, in tokens of the pack."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of {len(self)}")
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[i + 1])
            yield i, start, end
            start, i = end, i + 1

    def _map(self, name: str, dtype: str) -> npt.NDArray[Any]:
        if name not in self._maps:
            little = np.dtype(dtype).newbyteorder("<")
            self._maps[name] = np.memmap(self.folder / name, little, "r").view(np.ndarray)
        return self._maps[name]


class PackedDataset(IterableDataset[Item]):
    """Fixed-length sequences of packed documents, shuffled anew each epoch, split over ranks and workers.

    Sequence i holds the tokens [i·T, i·T + T) of the pack. An item is

    * `input_ids` [T] int64,
    * `cu_seqlens` [n + 1] int32: document j is the tokens cu_seqlens[j] ... cu_seqlens[j + 1] - 1,
    * `positions` [T] int64: from 0 in every document. One that goes on from the sequence before starts
      again at 0, since nothing before the sequence can be attended to.

    The stream of sequences is a pure function of (pack, seed, position): `position` is the sequences that
    all ranks have consumed. As with `TokenBlocks` it is endless, and all ranks together see the same batches
    for any number of ranks.

    With `batch_size` an item is a whole batch in one row, as `collate` makes it: read it with
    `DataLoader(dataset, batch_size=None, num_workers=...)`, and the order is the same for any number of
    workers. Without, `DataLoader(dataset, batch_size=B, collate_fn=collate)` also gives every sequence once,
    but its workers decide the order.

    Resume: `state_dict()` in the process that iterates, as `StatefulDataLoader` does in its workers; or
    with a plain DataLoader and workers `state_dict(consumed=items taken)` in the main process.

    Args:
        pack: folder, or an opened pack.
        sequence_length: T.
        seed: order of the sequences.
        rank: this process, of `world_size`.
        batch_size: sequences in an item.
        epochs: end after so many; the last items that do not fill all ranks are left out.
        part: use these shares of the tokens only, [from, to).
    """

    def __init__(
        self,
        pack: str | Path | Pack,
        sequence_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.pack = pack if isinstance(pack, Pack) else Pack(pack)
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not in range({world_size})")
        if sequence_length < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(
                f"sequence_length and batch_size must be at least 1, found {sequence_length} and {batch_size}"
            )
        self.seq_len, self.seed, self.rank, self.world_size = sequence_length, seed, rank, world_size
        self.batch_size, self.epochs = batch_size, epochs
        self._first, last = (round(share * len(self.pack)) for share in part)
        # One token further for the last label.
        self.sequences = (last - self._first - 1) // sequence_length
        if self.sequences < 1:
            raise InputError(
                f"{self.pack.folder}: {last - self._first} tokens do not fill one sequence of "
                f"{sequence_length} + 1"
            )
        self.position = 0

    def __getitem__(self, index: int) -> Item:
        """Sequence `index` in the order of the pack."""
        ids = self._row(index)[:-1]
        start = self._first + index * self.seq_len
        starts = self.pack.document_starts(start, start + self.seq_len) - start
        edges = np.concatenate(([0], starts[starts > 0], [self.seq_len]))
        positions = np.arange(self.seq_len) - np.repeat(edges[:-1], np.diff(edges))
        return {
            "input_ids": ids,
            "positions": torch.from_numpy(positions),
            "cu_seqlens": torch.from_numpy(edges.astype(np.int32)),
        }

    def __iter__(self) -> Iterator[Item]:
        """Items of this rank, or of this worker of it, from `position` on."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rows = self.batch_size or 1
        step = rows * self.world_size  # sequences that one item of every rank takes
        at = self.position + worker * step
        while self.epochs is None or at + step <= self.epochs * self.sequences:
            items = [self[self._at(at + self.rank + i * self.world_size)] for i in range(rows)]
            at += workers * step
            self.position = at - worker * step
            yield items[0] if self.batch_size is None else collate(items)

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels, both [batch_size, T], for `archzoo.distill`: documents follow one another."""
        first = self.position + self.rank
        rows = torch.stack([self._row(self._at(first + i * self.world_size)) for i in range(batch_size)])
        self.position += batch_size * self.world_size
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self, consumed: int = 0) -> dict[str, Any]:
        """The position, `consumed` items of this rank further, and what it refers to."""
        manifest = hashlib.sha256((self.pack.folder / MANIFEST).read_bytes()).hexdigest()
        return {
            "position": self.position + consumed * (self.batch_size or 1) * self.world_size,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "sequences": self.sequences,
            "first": self._first,
            "manifest": manifest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after what `state` has seen; the pack and the order must be the same."""
        for key, mine in self.state_dict().items():
            if key != "position" and state.get(key) != mine:
                raise InputError(
                    f"the saved position belongs to other data: {key} was {state.get(key)}, is {mine}"
                )
        self.position = int(state["position"])

    def _row(self, index: int) -> Tensor:
        """Sequence `index` and the token after it: [T + 1]."""
        if not 0 <= index < self.sequences:
            raise IndexError(index)
        start = self._first + index * self.seq_len
        return torch.from_numpy(self.pack.read(start, start + self.seq_len + 1))

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self.sequences)
        return permuted(index, self.sequences, self.seed, epoch)


def collate(items: Sequence[Item]) -> Item:
    """Sequences as one row, for `model(**batch)`.

    Returns:
        `input_ids` and `positions` [1, B·T], `cu_seqlens` [n + 1] over all documents of all sequences.
    """
    edges = [torch.zeros(1, dtype=torch.int32)]
    for item in items:
        edges.append(item["cu_seqlens"][1:] + edges[-1][-1])
    return {
        "input_ids": torch.cat([item["input_ids"] for item in items])[None],
        "positions": torch.cat([item["positions"] for item in items])[None],
        "cu_seqlens": torch.cat(edges),
    }


def permuted(index: int, count: int, seed: int, epoch: int) -> int:
    """Element `index` of a permutation of range(count) that is keyed by (seed, epoch) and never stored.

    A Feistel network permutes the next power of four; a result beyond `count` goes through it again.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed & _M64) + epoch)
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(key + (turn << 32) + right) & mask)
        index = (left << half) | right
        if index < count:
            return index


def _mix(x: int) -> int:
    """splitmix64, fixed for good: an order never depends on a library's version."""
    x = (x + 0x9E3779B97F4A7C15) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)
