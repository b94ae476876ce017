"""The decode cache: growth, positions, beams, truncation, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import archzoo
from archzoo import CacheError, CausalLM, InputError
from archzoo.blocks.mixers.attention import AttentionConfig, KVState
from archzoo.blocks.mixers.mamba2 import Mamba2State
from archzoo.blocks.mixers.mla import LatentState
from archzoo.cache import Timeline, grown

Tiny = Callable[..., CausalLM]
Tokens = Callable[..., Tensor]
ZEBRA, LLAMA = "zebra-llama-1b-4mla-12m2", "llama-3.2-1b"


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def feed(model: CausalLM, ids: Tensor, cache: archzoo.cache.Cache, chunks: list[int]) -> Tensor:
    return torch.cat([model(part, cache=cache).logits for part in ids.split(chunks, 1)], 1)


def test_grown_doubles_and_keeps() -> None:
    buffer = torch.arange(6.0).view(2, 3)
    assert grown(buffer, 1, 3) is buffer
    assert grown(buffer, 1, 4).shape == (2, 6)
    assert grown(buffer, 1, 100).shape == (2, 100)
    assert torch.equal(grown(buffer, 1, 4)[:, :3], buffer)
    assert grown(torch.empty(2, 0), 1, 5).shape == (2, 5)


def test_growth_takes_few_copies(tiny: Tiny, tokens: Tokens) -> None:
    model, sizes = tiny("llama-130m"), []
    cache = model.new_cache(1)
    assert cache.nbytes == 0
    for part in tokens(1, 33).split(1, 1):
        with torch.inference_mode():
            model(part, cache=cache)
        sizes.append(cache.states[0].k.shape[2])
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32, 64]


def test_length_counts_slots_in_a_hybrid(tiny: Tiny, tokens: Tokens) -> None:
    """Read from the timeline: no layer is special, and Mamba states hold no length."""
    model = tiny(ZEBRA)
    cache = model.new_cache(2, 8)
    assert [type(s) for s in cache.states] == [LatentState, Mamba2State]
    assert (cache.length, cache.batch_size) == (0, 2)
    feed(model, tokens(2, 5), cache, [3, 1, 1])
    assert cache.length == 5
    mamba_only = archzoo.build(archzoo.config("mamba2-130m").tiny())
    cache = mamba_only.new_cache(1, 100)
    before = cache.nbytes
    feed(mamba_only, tokens(1, 50), cache, [40, 10])
    assert (cache.length, cache.nbytes) == (50, before)  # constant in T


def test_reorder_permutes_every_state_together(tiny: Tiny, tokens: Tokens) -> None:
    model = tiny(ZEBRA)
    cache = model.new_cache(3, 6)
    feed(model, tokens(3, 6), cache, [6])
    latent, mamba = cache.states
    before = [latent.latent.clone(), mamba.conv.clone(), mamba.ssm.clone()]
    rows = torch.tensor([1, 1, 2, 0])
    cache.reorder(rows)
    for now, was in zip((latent.latent, mamba.conv, mamba.ssm), before, strict=True):
        assert torch.equal(now, was[rows])
        assert not torch.equal(was[0], was[1])
    assert cache.batch_size == 4


@pytest.mark.parametrize("name", [LLAMA, ZEBRA, "llama-130m-mod"])
def test_reorder_and_clone_of_a_padded_batch(name: str, tiny: Tiny, tokens: Tokens) -> None:
    model, rows = tiny(name), torch.tensor([1, 0, 1])
    ids, after = tokens(2, 7), tokens(3, 3, seed=3)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    with torch.inference_mode():
        cache = model.new_cache(2, 12)
        model(ids, positions=positions, cache=cache)
        cache.reorder(rows)
        copy = cache.clone()
        fork = feed(model, after.flip(1), cache, [1, 2])
        expected = []
        for row, new in zip(rows.tolist(), after, strict=True):
            whole = torch.cat((ids[row, positions[row] >= 0], new))
            expected.append(model(whole[None]).logits[0, -3:])
    assert_close(feed(model, after, copy, [1, 1, 1]), torch.stack(expected))
    assert not torch.allclose(fork, torch.stack(expected))


def test_truncate_a_padded_batch(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(LLAMA), tokens(2, 7)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    wrong, right = tokens(2, 4, seed=4), tokens(2, 2, seed=5)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(ids, positions=positions, cache=cache)
        expected = feed(model, right, cache.clone(), [1, 1])
        feed(model, wrong, cache, [4])
        cache.truncate(7)
    assert_close(feed(model, right, cache, [1, 1]), expected)


def test_truncate_to_nothing_starts_again(tiny: Tiny, tokens: Tokens) -> None:
    for name in (LLAMA, "x-ecomla-1b", "step-3"):
        model, ids = tiny(name), tokens(2, 6)
        cache = model.new_cache(2, 6)
        first = feed(model, ids, cache, [6])
        cache.truncate(0)
        assert cache.length == 0
        assert_close(feed(model, ids, cache, [4, 2]), first)


def test_refused_truncation_changes_nothing(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(ZEBRA), tokens(2, 9)
    cache = model.new_cache(2, 9)
    feed(model, ids[:, :6], cache, [6])
    with pytest.raises(CacheError, match="Mamba2State is recurrent and cannot be truncated; clone"):
        cache.truncate(3)
    with pytest.raises(CacheError, match="cannot truncate a cache of 6 tokens to -1"):
        cache.truncate(-1)
    cache.truncate(6)  # nothing to forget
    assert cache.length == cache.states[0].length == 6
    with torch.inference_mode():
        assert_close(feed(model, ids[:, 6:], cache, [3]), model(ids).logits[:, 6:])


def test_window_that_was_not_yet_left_cannot_be_truncated() -> None:
    state = KVState(torch.empty(1, 1, 4, 8), torch.empty(1, 1, 4, 8), window=4)
    assert not state.truncatable
    assert KVState(torch.empty(1, 1, 4, 8), torch.empty(1, 1, 4, 8)).truncatable


def test_padded_batch_through_a_window(tokens: Tokens) -> None:
    config = archzoo.config(LLAMA).tiny().override("layers.default.mixer.window=3", "init_std=0.15")
    assert all(isinstance(s.mixer, AttentionConfig) and s.mixer.window == 3 for s in config.specs)
    model = archzoo.build(config, dtype=torch.float64).eval()
    rows = [tokens(1, 12, 1), tokens(1, 8, 2)]
    ids = torch.stack((rows[0][0], torch.cat((torch.zeros(4, dtype=torch.long), rows[1][0]))))
    positions = torch.stack((torch.arange(12), torch.arange(-4, 8).clamp(min=-1)))
    with torch.inference_mode():
        expected = [model(row).logits[0] for row in rows]
        cache = model.new_cache(2, 12)
        out = [model(ids[:, :7], positions=positions[:, :7], cache=cache).logits]
        out += [model(ids[:, t : t + 1], cache=cache).logits for t in range(7, 12)]
    out = torch.cat(out, 1)
    assert_close(out[0], expected[0])
    assert_close(out[1, 4:], expected[1])
    assert cache.states[0].k.shape[2] == 3


def test_timeline_positions() -> None:
    timeline = Timeline(2, torch.device("cpu"))
    assert timeline.next_positions().tolist() == [[0], [0]]
    timeline.append(3)
    assert timeline.dense
    assert timeline.positions().tolist() == [[0, 1, 2]] * 2
    assert timeline.next_positions().tolist() == [[3], [3]]
    timeline.append(2, torch.tensor([[-1, 3], [7, 8]]))
    assert not timeline.dense
    assert timeline.positions().tolist() == [[0, 1, 2, -1, 3], [0, 1, 2, 7, 8]]
    assert timeline.next_positions().tolist() == [[4], [9]]
    timeline.append(1, torch.tensor([[-1], [9]]))  # the first row pauses
    assert timeline.next_positions().tolist() == [[4], [10]]
    copy = timeline.clone()
    timeline.reorder(torch.tensor([1]))
    assert (timeline.batch, copy.batch) == (1, 2)
    assert timeline.positions().tolist() == [[0, 1, 2, 7, 8, 9]]
    assert copy.positions().tolist() == [[0, 1, 2, -1, 3, -1], [0, 1, 2, 7, 8, 9]]


def test_row_of_only_padding_starts_at_zero(tiny: Tiny, tokens: Tokens) -> None:
    """A row may join later: its first tokens then stand at position 0."""
    for name in (LLAMA, ZEBRA, "x-ecomla-1b"):
        model, ids = tiny(name), tokens(2, 6)
        positions = torch.tensor([[0, 1, 2], [-1, -1, -1]])
        with torch.inference_mode():
            cache = model.new_cache(2)
            out = model(ids[:, :3], positions=positions, cache=cache).logits
            assert out.isfinite().all()
            late = feed(model, ids[:, 3:], cache, [1, 2])
            assert_close(late[0], model(ids[:1]).logits[0, 3:])
            assert_close(late[1], model(ids[1:, 3:]).logits[0])


# --- what a call refuses -----------------------------------------------------------------------------


def test_calls_that_do_not_fit(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(LLAMA), tokens(2, 6)
    cases = [
        ({"cache": model.new_cache(3)}, "the cache holds 3 sequences, input_ids 2"),
        (
            {"positions": torch.arange(6)[None]},
            r"positions \[1, 6\] must have the shape of input_ids \[2, 6\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens needs batch 1, found 2"),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "cache": model.new_cache(2)},
            "cannot be combined with a cache",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            model(ids, **arguments)
    with pytest.raises(InputError, match=r"input_ids must be \[batch, tokens\], found \[6\]"):
        model(ids[0])


def test_positions_beyond_the_limit(tokens: Tokens) -> None:
    model = archzoo.build(archzoo.config(LLAMA).tiny().override("max_positions=10")).eval()
    with pytest.raises(InputError, match="position 10 is beyond the model's limit of 10 positions"):
        model(tokens(1, 11))
    cache = model.new_cache(1)
    feed(model, tokens(1, 10), cache, [9, 1])
    before = cache.length
    with pytest.raises(InputError, match="position 10 is beyond"):
        model(tokens(1, 1), cache=cache)
    assert cache.length == before  # nothing was half-written
    packed = torch.tensor([0, 10, 20])
    assert model(tokens(1, 20), cu_seqlens=packed).logits.shape == (1, 20, 256)
