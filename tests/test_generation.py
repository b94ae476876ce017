"""Generation: greedy against a plain loop, sampling filters, padding, stops, chunks, errors."""

from __future__ import annotations

import pytest
import torch

import archzoo
from archzoo.generation import probabilities

NAMES = ["llama-3.2-1b", "mamba2-130m", "zebra-llama-1b", "deepseek-v2-lite", "llama-130m-mod", "step-3"]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> archzoo.CausalLM:
    return archzoo.build(archzoo.config(request.param).tiny(), seed=3).eval()


def naive(model: archzoo.CausalLM, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_equals_full_forwards(model: archzoo.CausalLM) -> None:
    prompt = [5, 9, 200, 31, 7]
    assert archzoo.generate(model, [prompt], 8)[0].tolist() == naive(model, prompt, 8)


def test_left_padded_rows_equal_single_rows(model: archzoo.CausalLM) -> None:
    prompts = [[5], [9, 8, 7, 6], [1, 2, 3, 4, 5, 6, 7]]
    out = archzoo.generate(model, prompts, 6)
    assert out.shape == (3, 13)
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        assert row[7 - len(prompt) :] == naive(model, prompt, 6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_prefill_in_chunks_changes_nothing(model: archzoo.CausalLM, chunk: int) -> None:
    prompts = [[5, 4], [9, 8, 7, 6, 5]]
    whole = archzoo.generate(model, prompts, 5)
    assert torch.equal(archzoo.generate(model, prompts, 5, prefill_chunk=chunk), whole)


def test_mask_and_ragged_lists_agree() -> None:
    model = archzoo.build(archzoo.config("zebra-llama-1b").tiny())
    ids = torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ragged = archzoo.generate(model, [[3, 4], [1, 2, 3, 4]], 5)
    assert torch.equal(archzoo.generate(model, ids, 5, attention_mask=mask), ragged)


def test_stop_tokens_end_rows_and_the_loop() -> None:
    model = archzoo.build(archzoo.config("llama-3.2-1b").tiny(), seed=3)
    prompts = [[5, 9], [7, 1]]
    free = archzoo.generate(model, prompts, 12)
    stop = int(free[0, 4])
    seen: list[int] = []
    out = archzoo.generate(
        model, prompts, 12, stop_tokens=[stop], pad_token_id=255, callback=lambda t: seen.append(t.numel())
    )
    first = free[0, 2:].tolist().index(stop)
    assert out[0, : 3 + first].tolist() == free[0, : 3 + first].tolist()
    assert (out[0, 3 + first :] == 255).all()
    assert seen == [2] * (out.shape[1] - 2)
    alone = archzoo.generate(model, prompts[:1], 12, stop_tokens=[stop])
    assert alone.shape[1] == 3 + first
    assert torch.equal(archzoo.generate(model, prompts, 12, stop_tokens=[]), free)


def test_sampling_is_seeded_and_follows_the_distribution() -> None:
    model = archzoo.build(archzoo.config("llama-3.2-1b").tiny(), seed=3)
    ids = torch.tensor([[5, 9]]).expand(4000, -1)
    a = archzoo.generate(model, ids, 1, temperature=1.5, top_k=4, seed=1)
    assert torch.equal(a, archzoo.generate(model, ids, 1, temperature=1.5, top_k=4, seed=1))
    with torch.inference_mode():
        probs = probabilities(model(ids[:1]).logits[0, -1], 1.5, top_k=4)
    counts = torch.bincount(a[:, -1], minlength=256).float()
    kept = probs > 0
    assert counts[~kept].sum() == 0
    chi2 = ((counts - 4000 * probs)[kept] ** 2 / (4000 * probs[kept])).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, p = 0.001


def test_filters() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    torch.testing.assert_close(probabilities(logits, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    torch.testing.assert_close(probabilities(logits, top_p=0.5), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(probabilities(logits, top_p=0.51), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    torch.testing.assert_close(probabilities(logits, min_p=0.3), torch.tensor([0.5, 0.25, 0.15, 0]) / 0.9)
    cold = probabilities(logits, temperature=0.01)
    torch.testing.assert_close(cold, torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, found -1.0"),
        ({"top_k": 0}, "top_k must be >= 1, found 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \(0, 1\], found 1.5"),
        ({"max_new_tokens": 600}, "3 prompt tokens and 600 new ones exceed the model's 512 positions"),
        ({"input_ids": [[1, 256]]}, r"token id 256 at \[0, 1\] is outside the vocabulary of 256"),
        ({"input_ids": [[]]}, "at least one token"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding must stand on the left"),
        ({"attention_mask": torch.ones(1, 2)[:, :1] * 0}, "must have the shape"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    model = archzoo.build(archzoo.config("llama-3.2-1b").tiny())
    call: dict[str, object] = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4} | arguments
    with pytest.raises(archzoo.InputError, match=message):
        archzoo.generate(model, **call)


def test_training_mode_is_restored() -> None:
    model = archzoo.build(archzoo.config("llama-3.2-1b").tiny()).train()
    archzoo.generate(model, [[1]], 2)
    assert model.training
