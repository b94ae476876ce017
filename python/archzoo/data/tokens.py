"""A long array of token ids, cut into training sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archzoo.errors import InputError

_M64 = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: a fixed 64-bit hash, so that an order never depends on a library's version."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    """A permutation of range(count), a pure function of its arguments."""
    base = int(_mix(np.array([seed & _M64], np.uint64))[0]) + epoch
    base = int(_mix(np.array([base & _M64], np.uint64))[0])
    keys = _mix(np.arange(count, dtype=np.uint64) ^ np.uint64(base))
    return np.argsort(keys, kind="stable")


class TokenBlocks:
    """Fixed-length sequences from a 1-D token array, shuffled anew each epoch, split over ranks.

    Sequence i reads tokens [i·T, i·T + T]: T inputs and, one further, T labels. The stream of sequences is
    infinite and a pure function of (seed, position): the batches of all ranks together are the same for any
    number of ranks, and `position` (sequences consumed by all ranks) is the whole state.

    Args:
        tokens: 1-D integers, in memory or memory-mapped (`numpy.load(path, mmap_mode="r")`).
        seq_len: T.
        seed: order of the sequences.
        rank: this process, of `world_size`.
    """

    def __init__(
        self, tokens: npt.ArrayLike, seq_len: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.tokens = np.asanyarray(tokens)
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise InputError(
                f"tokens must be a 1-D array of integers, got {self.tokens.ndim}-D of {self.tokens.dtype}"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not in range({world_size})")
        self.seq_len, self.seed, self.rank, self.world_size = seq_len, seed, rank, world_size
        self.position = 0
        if len(self) < 1:
            raise InputError(f"{self.tokens.size} tokens do not fill one sequence of {seq_len} + 1")
        self._epoch, self._order = -1, np.empty(0, np.intp)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return (self.tokens.size - 1) // self.seq_len

    def __getitem__(self, index: int) -> Tensor:
        """Sequence `index` in the order of the array: [T + 1] int64."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels, both [batch_size, T]: labels[:, t] is the token after input_ids[:, t]."""
        first = self.position + self.rank
        rows = torch.stack([self[self._at(first + i * self.world_size)] for i in range(batch_size)])
        self.position += batch_size * self.world_size
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it refers to."""
        return {"position": self.position, "seed": self.seed, "seq_len": self.seq_len, "blocks": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that `state` has seen; the data and the order must be the same."""
        for key, mine in self.state_dict().items():
            if key != "position" and state[key] != mine:
                raise InputError(
                    f"the saved position belongs to other data: {key} was {state[key]}, is {mine}"
                )
        self.position = int(state["position"])

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self), self.seed, epoch)
        return int(self._order[index])


def tokenize_text(tokenizer: Any, text: str) -> npt.NDArray[np.uint32]:
    """Ids [N] of a text from any tokenizer with `.encode(text)`, a list or an object with `.ids`."""
    ids = tokenizer.encode(text)
    return np.asarray(getattr(ids, "ids", ids), np.uint32)
