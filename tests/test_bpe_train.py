"""BPE training: the merges are those of Hugging Face's trainer, on any split of the work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

import archzoo
from archzoo.data import python_manual_text
from archzoo.data.bpe import PATTERNS
from archzoo.errors import InputError

SPECIAL = ["<|endoftext|>", "<|pad|>"]


def reference(texts: list[str], vocab_size: int, pattern: str, special: list[str], low: int = 0) -> Any:
    """What Hugging Face's trainer makes of the same texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=low,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def python_source() -> str:
    """Code of the standard library: other words than prose."""
    folder = Path(json.__file__).parent.parent
    files = sorted(folder.glob("*.py"))[:120]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "qwen2"])
def test_the_file_is_the_one_of_hugging_face(pattern: str) -> None:
    """Every field: vocabulary, ids, merges and their order, pre-tokenizer, special tokens."""
    texts = [*python_manual_text("train").split("\n\n"), python_source()]
    mine = json.loads(archzoo.train_bpe(texts, 6000, pattern=pattern, special_tokens=SPECIAL))
    wanted = reference(texts, 6000, pattern, SPECIAL)
    assert mine["model"]["merges"] == wanted["model"]["merges"]
    assert mine == wanted
    assert len(mine["model"]["merges"]) > 5000
    print(f"{pattern}: {sum(map(len, texts)):,} characters, {len(mine['model']['merges'])} equal merges")


@pytest.mark.parametrize("seed", range(30))
def test_ties_runs_and_reborn_pairs_are_merged_alike(seed: int) -> None:
    """Few letters make the same token in many ways and the same pair at many times."""
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abc "
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(40)]
    mine = json.loads(archzoo.train_bpe(texts, 400, pattern="gpt2", special_tokens=["ab", "<s>"]))
    assert mine["model"] == reference(texts, 400, "gpt2", ["ab", "<s>"])["model"]


def test_min_frequency() -> None:
    texts = ["low low lower newest newest widest"]
    mine = json.loads(archzoo.train_bpe(texts, 400, pattern="gpt2", special_tokens=[], min_frequency=2))
    assert mine == reference(texts, 400, "gpt2", [], 2)
    assert 0 < len(mine["model"]["merges"]) < 10


def test_files_and_texts_mix_and_the_result_is_written(tmp_path: Path) -> None:
    text = python_manual_text("valid")
    half = text.index("\n", len(text) // 2) + 1
    (tmp_path / "a.txt").write_text(text[:half], encoding="utf-8")
    content = archzoo.train_bpe([tmp_path / "a.txt", text[half:]], 800, tmp_path)
    assert content == archzoo.train_bpe(iter([text[half:], text[:half]]), 800)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 800
    sample = "naïve 你好\n\n  x = 1\t"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_a_pattern_that_looks_around() -> None:
    content = archzoo.train_bpe(["aab aab ab"], 260, pattern=r"a(?=a)|\w+|\s+", special_tokens=[])
    assert json.loads(content)["model"]["merges"] == [["a", "b"]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 100: the special tokens and the 256 bytes alone need 257"),
        ({"pattern": "("}, "pattern"),
        ({"texts": [Path("missing.txt")]}, "missing.txt: cannot open"),
        ({"texts": "abc"}, "several texts"),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        archzoo.train_bpe(**{"texts": ["a"], "vocab_size": 300, **kwargs})
