"""Token sequences: what they contain, their order, ranks, resume; the built-in text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archzoo.data import TokenBlocks, python_manual_text, read_text, tokenize_text
from archzoo.errors import InputError

TOKENS = np.arange(1000, dtype=np.uint16)


def starts(blocks: TokenBlocks, batch_size: int, batches: int) -> list[int]:
    return [int(row[0]) for _ in range(batches) for row in blocks.next_batch(batch_size)[0]]


def test_an_epoch_is_every_sequence_once_with_shifted_labels() -> None:
    blocks = TokenBlocks(TOKENS, 10)
    assert len(blocks) == 99  # 100 sequences of inputs, but the last one lacks its last label
    ids, labels = blocks.next_batch(99)
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape == (99, 10)
    assert torch.equal(labels, ids + 1)
    assert sorted(ids[:, 0].tolist()) == list(range(0, 990, 10))
    assert ids[:, 0].tolist() != sorted(ids[:, 0].tolist())
    assert len(TokenBlocks(TOKENS[:11], 10)) == 1


def test_every_epoch_and_seed_has_its_own_order() -> None:
    first = starts(TokenBlocks(TOKENS, 10), 33, 6)
    assert sorted(first[:99]) == sorted(first[99:])
    assert first[:99] != first[99:]
    assert first == starts(TokenBlocks(TOKENS, 10), 33, 6)
    assert first != starts(TokenBlocks(TOKENS, 10, seed=1), 33, 6)
    # Fixed for good: a checkpoint's data position must mean the same under every version.
    assert [s // 10 for s in first[:8]] == [28, 85, 86, 90, 54, 24, 15, 0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_global_order(world: int) -> None:
    whole = starts(TokenBlocks(TOKENS, 10), 8, 30)  # 240 sequences: the epochs end inside a batch
    ranks = [TokenBlocks(TOKENS, 10, rank=r, world_size=world) for r in range(world)]
    parts = [starts(blocks, 8 // world, 30) for blocks in ranks]
    assert [part[i] for i in range(len(parts[0])) for part in parts] == whole
    assert len({blocks.position for blocks in ranks}) == 1


def test_resume_goes_on_where_it_stopped() -> None:
    blocks = TokenBlocks(TOKENS, 10, seed=3)
    starts(blocks, 7, 20)
    state = blocks.state_dict()
    rest = starts(blocks, 7, 20)
    again = TokenBlocks(TOKENS, 10, seed=3)
    again.load_state_dict(state)
    assert starts(again, 7, 20) == rest
    with pytest.raises(InputError, match="seed was 3, is 4"):
        TokenBlocks(TOKENS, 10, seed=4).load_state_dict(state)


def test_memory_mapped_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    blocks = TokenBlocks(mapped, 10)
    assert isinstance(blocks.tokens, np.memmap)
    assert starts(blocks, 5, 5) == starts(TokenBlocks(TOKENS, 10), 5, 5)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        (TOKENS[:10], {}, "10 tokens do not fill one sequence of 10"),
        (TOKENS.reshape(10, 100), {}, "1-D array of integers, got 2-D"),
        (TOKENS.astype(np.float32), {}, "float32"),
        (TOKENS, {"rank": 2, "world_size": 2}, "rank 2"),
    ],
)
def test_bad_input_is_refused(tokens: Any, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenBlocks(tokens, 10, **kwargs)
    with pytest.raises(IndexError):
        TokenBlocks(TOKENS, 10)[99]


def test_python_manual() -> None:
    train, valid = python_manual_text("train"), python_manual_text("valid")
    assert len(train) > 250_000
    assert 20_000 < len(valid) < len(train) / 4
    assert 'The "if" statement\n****' in train + valid
    paragraphs = [[p.strip() for p in text.split("\n\n")] for text in (train, valid)]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert sum(map(len, paragraphs)) < 1.02 * sum(len(set(part)) for part in paragraphs)


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("naïve\r\n你好\n".encode())
    assert read_text(path) == "naïve\r\n你好\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 2"):
        read_text(path)
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "b.txt")


def test_tokenize_text_takes_lists_and_encodings() -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    class Encoding:
        ids = (5, 70_000)

    class Wrapped:
        def encode(self, text: str) -> Encoding:
            return Encoding()

    ids = tokenize_text(Bytes(), "ab")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [97, 98]
    assert tokenize_text(Wrapped(), "ab").tolist() == [5, 70_000]
