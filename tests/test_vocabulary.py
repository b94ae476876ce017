"""Another tokenizer for a model: which rows are copied, which are means, what the config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from typer.testing import CliRunner

import archzoo
from archzoo import cli, zoo
from archzoo.conversion import swap_vocabulary
from archzoo.data import python_manual_text
from archzoo.errors import InputError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer of prose, and one of code and accents with other special tokens."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "old").mkdir()
    text = python_manual_text("valid")
    archzoo.train_bpe([text], 400, folder / "old", special_tokens=["<|endoftext|>", "<pad>"])
    code = [Path(json.__file__).read_text(encoding="utf-8"), "naïve été 你好 " * 50, text]
    archzoo.train_bpe(code, 500, folder / "new.json", special_tokens=["<s>", "<|endoftext|>", "<a b>"])
    return folder / "old" / "tokenizer.json", folder / "new.json"


def model(tied: bool) -> archzoo.CausalLM:
    config = archzoo.config("smollm2-135m").tiny()
    changes = ["vocab_size=420", "bos_token_id=0", "eos_token_id=[0, 1]", "pad_token_id=1"]
    return archzoo.build(config.override(*changes, f"tie_embeddings={str(tied).lower()}"), seed=3)


@pytest.mark.parametrize("tied", [True, False])
def test_known_tokens_keep_their_rows_and_others_are_means(files: tuple[Path, Path], tied: bool) -> None:
    source = model(tied)
    swapped = swap_vocabulary(source, *files)
    old, new = (tokenizers.Tokenizer.from_file(str(path)) for path in files)
    assert swapped.config.vocab_size == 500
    ids = (swapped.config.bos_token_id, swapped.config.eos_token_id, swapped.config.pad_token_id)
    assert ids == (1, 1, None)
    assert (swapped.lm_head is None) == tied
    copied = 0
    for i in range(500):
        token = new.id_to_token(i)
        if (same := old.token_to_id(token)) is not None:
            pieces = [same]
            copied += 1
        else:
            pieces = [t.id for t in old.model.tokenize(token.replace("<a b>", "<aĠb>"))]
            assert len(pieces) > 1
        for after, before in (
            (swapped.embed.weight, source.embed.weight),
            (swapped.head_weight, source.head_weight),
        ):
            torch.testing.assert_close(after[i], before[pieces].mean(0))
    assert 300 < copied < 500
    for name, parameter in source.state_dict().items():
        if name not in ("embed.weight", "lm_head.weight"):
            assert torch.equal(parameter, swapped.state_dict()[name])
    assert swapped(torch.arange(500)[None]).logits.shape == (1, 500, 500)


def test_the_same_tokenizer_changes_nothing(files: tuple[Path, Path]) -> None:
    source = model(True)
    again = swap_vocabulary(source, files[0], files[0])
    assert torch.equal(again.embed.weight, source.embed.weight[:400])
    assert again.config.eos_token_id == (0, 1)


def test_bad_input_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    small = archzoo.build(archzoo.config("smollm2-135m").tiny())
    with pytest.raises(InputError, match="400 ids, the model has 256"):
        swap_vocabulary(small, *files)
    with pytest.raises(InputError, match="no such file"):
        swap_vocabulary(small, tmp_path / "no.json", files[1])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match=r"words\.json: expected a byte-level BPE"):
        swap_vocabulary(small, tmp_path / "words.json", files[1])


def test_command(files: tuple[Path, Path], tmp_path: Path) -> None:
    zoo.save(model(True), tmp_path / "in", extra_files={"tokenizer.json": files[0].read_bytes()})
    arguments = ["convert", str(tmp_path / "in"), "vocabulary", str(tmp_path / "out")]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2
    result = CliRunner().invoke(cli.app, [*arguments, "--tokenizer", str(files[1])])
    assert result.exit_code == 0, result.output
    assert zoo.load(tmp_path / "out").config.vocab_size == 500
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == files[1].read_bytes()
