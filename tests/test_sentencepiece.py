"""SentencePiece and Tekken files, and such models in a `tokenizer.json`, beside their own libraries."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archzoo import Tokenizer, TokenizerError
from archzoo.data import python_manual_text
from archzoo.errors import InputError
from archzoo.tokenizer import TextStream
from test_tokenizer import added, every_character, gguf, hostile, write

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODELS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "unigram bytes": {
        "byte_fallback": True,
        "normalization_rule_name": "nfkc_cf",
        "user_defined_symbols": ["foo", "▁the", "<mask>", "don", "  x"],
    },
    "unigram suffix": {
        "treat_whitespace_as_suffix": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
    "bpe": {"model_type": "bpe"},
    "bpe bytes": {
        "model_type": "bpe",
        "byte_fallback": True,
        "treat_whitespace_as_suffix": True,
        "normalization_rule_name": "nmt_nfkc_cf",
    },
    "bpe symbols": {
        "model_type": "bpe",
        "user_defined_symbols": ["foo", "▁the", "<mask>", "don", "  ", "▁▁▁"],
        "control_symbols": ["<ctl>"],
        "add_dummy_prefix": False,
        "character_coverage": 0.99,
    },
    "bpe across words": {
        "model_type": "bpe",
        "split_by_whitespace": False,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
    },
}
"""Options of training."""


def proto(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(content)
    return message


def edited(content: bytes, edit: Callable[[Any], None]) -> bytes:
    message = proto(content)
    edit(message)
    return bytes(message.SerializeToString())


def tie(model: Any) -> None:
    """Many equal scores; no mark before a text."""
    for piece in model.pieces:
        if piece.type == NORMAL:
            piece.score = float(round(piece.score / (100 if model.trainer_spec.model_type == 2 else 1)))
    model.normalizer_spec.add_dummy_prefix = False


def drop(model: Any) -> None:
    """Pieces that are no longer used; blanks that stay blanks."""
    rng = random.Random(1)
    for piece in model.pieces:
        if piece.type == NORMAL and rng.random() < 0.2:
            piece.type = UNUSED
    model.normalizer_spec.escape_whitespaces = False


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    manual = [line for line in python_manual_text("valid").splitlines() if line.strip()][:3000]
    lines = manual + ["é́ ﬁne Ⅷ \uff46\uff55\uff4c\uff4c ㍿ ½ 東京 日本語 한국어 Привет"] * 5
    contents = {}
    for name, options in MODELS.items():
        out = io.BytesIO()
        options = {"vocab_size": 1500, "hard_vocab_limit": False, "minloglevel": 2} | options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options)
        contents[name] = out.getvalue()
    contents["unigram ties"] = edited(contents["unigram"], tie)
    contents["bpe ties"] = edited(contents["bpe"], tie)
    contents["unigram unused"] = edited(contents["unigram bytes"], drop)
    for name, content in contents.items():
        (folder / f"{name}.model").write_bytes(content)
    return {name: folder / f"{name}.model" for name in contents}


NAMES = [*MODELS, "unigram ties", "bpe ties", "unigram unused"]


def giants() -> Iterator[str]:
    rng = random.Random(0)
    yield from ("a" * 100_000, " " * 100_000, "\n" * 30_000, "ab" * 50_000, "▁" * 30_001, "=" * 9999 + " ")
    # Long enough for Unigram's sums to start anew.
    yield "".join(rng.choices("etaoinshr", k=100_000))
    yield "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(30_000))
    yield "\u0378" * 1000 + "a"


def random_ids(size: int, count: int) -> Iterator[list[int]]:
    rng = random.Random(2)
    for _ in range(count):
        ranges = [rng.choice([size, min(size, 300)]) for _ in range(rng.randint(0, 8))]
        yield [rng.randrange(r) for r in ranges]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_sentencepiece(
    name: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(files[name]))
    ours = Tokenizer.from_file(files[name])
    assert ours.vocab_size == theirs.vocab_size()
    manual = python_manual_text("valid")
    texts = [*hostile(2000), *every_character(), *(manual[i : i + 2000] for i in range(0, len(manual), 2000))]
    texts += [manual[:200_000], "<s>hi</s> <unk> <ctl><0x41>", "", " ", "  ", "\0a\0", *giants()]
    ids, offsets = ours.encode_batch(texts)
    for i, text in enumerate(texts):
        mine = ids[offsets[i] : offsets[i + 1]].tolist()
        expected = theirs.encode(text)
        assert mine == expected, (len(text), text[:200])
        assert ours.decode(mine) == theirs.decode(expected), text[:200]
    for some in random_ids(ours.vocab_size, 2000):
        assert ours.decode(some) == theirs.decode(some), [theirs.id_to_piece(i) for i in some]
    controls = {theirs.id_to_piece(i): i for i in range(ours.vocab_size) if theirs.is_control(i)}
    assert ours.special_tokens == controls
    with capsys.disabled():
        print(f"\n{name}: {len(texts)} texts, {len(ids)} ids: all equal")


@pytest.mark.parametrize("name", ["bpe bytes", "bpe symbols", "bpe ties", "unigram"])
def test_cache_file(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    plain = Tokenizer.from_file(files[name])
    texts = [*hostile(300, seed=1), "▁" * 300 + "   " * 50]
    for _ in range(2):
        cached = Tokenizer.from_file(files[name], cache=tmp_path / "cache")
        assert cached.encode_batch(texts).ids.tolist() == plain.encode_batch(texts).ids.tolist()
        assert cached.special_tokens == plain.special_tokens
    assert (tmp_path / "cache").exists() == name.startswith("bpe")


@pytest.mark.parametrize("name", ["unigram", "unigram bytes", "unigram suffix", "bpe bytes", "bpe symbols"])
def test_stream_is_decode(name: str, files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(files[name])
    encoded = [tokenizer.encode(text).tolist() for text in hostile(300, seed=4)]
    for ids in [*encoded, *random_ids(tokenizer.vocab_size, 2000)]:
        check_stream(tokenizer, ids)
    with pytest.raises(InputError, match="no token has the id"):
        TextStream(tokenizer).push(tokenizer.vocab_size)
    with pytest.raises(InputError):
        TextStream(tokenizer).push(-1)


def check_stream(tokenizer: Tokenizer, ids: list[int], cut: bool = True) -> None:
    """What came so far and what a stream has left is the text of all, after every id.

    Without `cut` only where no character is cut.
    """
    shown = ""
    for end in range(len(ids) + 1):
        stream = TextStream(tokenizer)
        parts = [stream.push(id) for id in ids[:end]]
        text = "".join(parts)
        assert text.startswith(shown)
        shown = text
        expected = tokenizer.decode(ids[:end])
        assert text + stream.finish() == expected or (not cut and "\ufffd" in expected), ids[:end]


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: setattr(m.trainer_spec, "model_type", 3), "model_type WORD"),
    (lambda m: setattr(m.trainer_spec, "model_type", 4), "model_type CHAR"),
    (lambda m: m.denormalizer_spec.CopyFrom(m.normalizer_spec), "denormalizer_spec"),
    (lambda m: setattr(m.pieces[500], "type", UNUSED), "unused piece"),
    (lambda m: setattr(m.pieces[500], "piece", m.pieces[501].piece), "500 and 501 are both"),
    (lambda m: setattr(m.pieces[500], "piece", ""), "500 is empty"),
    (lambda m: setattr(m.pieces[500], "piece", "z\u0416"), "which is no piece"),
    (lambda m: setattr(m.pieces[500], "score", float("nan")), "NaN"),
    (lambda m: setattr(m.pieces[500], "type", UNKNOWN), "two pieces are of type UNKNOWN"),
    (lambda m: setattr(m.pieces[0], "type", NORMAL), "no piece is of type UNKNOWN|no piece"),
    (lambda m: setattr(m.pieces[500], "type", BYTE), "without byte_fallback"),
    (lambda m: setattr(m.trainer_spec, "byte_fallback", True), "without a piece for the byte 0x00"),
    (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"\xff\0\0\0ab"), "precompiled_charsmap"),
    (lambda m: m.MergeFromString(b"\x1a\x03\xa8\x06\x01"), "field 101 of the normalizer_spec"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_is_not_supported_is_named(
    change: Callable[[Any], Any], message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(edited(files["bpe"].read_bytes(), change))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_damaged_files(files: dict[str, Path], tmp_path: Path) -> None:
    content = files["unigram"].read_bytes()
    path = tmp_path / "tokenizer.model"
    for cut in (1, 5, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(TokenizerError, match="model"):
            Tokenizer.from_file(path)
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="only a rank file"):
        Tokenizer.from_file(path, "cl100k")


def test_folders(files: dict[str, Path], tmp_path: Path) -> None:
    """A folder has its SentencePiece file read, and around a text goes what its settings ask for."""
    (tmp_path / "spiece.model").write_bytes(files["unigram"].read_bytes())
    text = "a plain text"
    plain = Tokenizer.from_file(files["unigram"])
    ids = plain.encode(text).tolist()
    assert Tokenizer.from_pretrained(tmp_path).encode(text).tolist() == ids
    settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>"}
    write(tmp_path / "tokenizer_config.json", settings)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode(text).tolist() == [plain.special_tokens["<s>"], *ids]
    assert ours.encode(text, add_special_tokens=False).tolist() == ids
    assert ours.decode(ours.encode(text)) == text
    assert ours.hash != plain.hash
    settings |= {"add_bos_token": False, "add_eos_token": True}
    write(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: add_eos_token is true"):
        Tokenizer.from_pretrained(tmp_path)
    write(tmp_path / "tokenizer_config.json", settings | {"eos_token": {"content": "</s>"}})
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode(text).tolist() == [*ids, plain.special_tokens["</s>"]]
    write(tmp_path / "tokenizer_config.json", settings | {"eos_token": "</other>"})
    with pytest.raises(TokenizerError, match=r'spiece\.model: no control token "</other>"'):
        Tokenizer.from_pretrained(tmp_path)


def as_in_gguf(model: Any) -> None:
    """What a GGUF file cannot say is not there."""
    model.normalizer_spec.precompiled_charsmap = b""
    model.trainer_spec.treat_whitespace_as_suffix = False


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("bpe")])
def test_gguf_of_a_sentencepiece_model(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    """The pieces of a model in a GGUF file give the model's own ids; its control pieces are found in text."""
    source = tmp_path / "tokenizer.model"
    source.write_bytes(edited(files[name].read_bytes(), as_in_gguf))
    model = proto(source.read_bytes())
    control = [i for i, piece in enumerate(model.pieces) if piece.type == CONTROL]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": control[0],
        "tokenizer.ggml.eos_token_id": control[1],
        "tokenizer.ggml.add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
    }
    path = gguf(tmp_path / "model.gguf", values)
    theirs = Tokenizer.from_file(source)
    texts = ["", " a  b\n c ", *hostile(300, seed=11)]
    for ours in (Tokenizer.from_file(path), *(Tokenizer.from_file(path, cache=tmp_path) for _ in range(2))):
        assert ours.special_tokens == theirs.special_tokens
        for text in texts:
            if not any(token in text for token in ours.special_tokens):
                assert ours.encode(text).tolist() == [control[0], *theirs.encode(text)]
                assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        first = model.pieces[control[1]].piece
        assert ours.encode(f"a{first}", add_special_tokens=False).tolist() == [
            *theirs.encode("a"),
            control[1],
        ]
    for change, message in (
        ({"tokenizer.ggml.scores": [1.0]}, "scores does not have a number for each"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.precompiled_charsmap": "x"}, "precompiled_charsmap"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "no id tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.model": "t5"}, 'tokenizer.ggml.model = "t5"'),
    ):
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(gguf(tmp_path / "other.gguf", {**values, **change}))
    del values["tokenizer.ggml.bos_token_id"]
    without = Tokenizer.from_file(gguf(tmp_path / "other.gguf", values))
    assert without.encode("a").tolist() == theirs.encode("a").tolist()
    values["tokenizer.ggml.add_bos_token"] = True
    with pytest.raises(TokenizerError, match=r"no id tokenizer\.ggml\.bos_token_id"):
        Tokenizer.from_file(gguf(tmp_path / "other.gguf", values))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TO_BLANKS = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK = [
    TO_BLANKS,
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def frame(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(names), "added_tokens": [], "model": model, **parts}


def unigram_json(content: bytes, **parts: Any) -> dict[str, Any]:
    """A Unigram model as the published tokenizer.json files of T5 and XLM-R write it."""
    model = proto(content)
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    normalizers = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, blanks]},
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
    } | parts
    return frame(
        {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
        **parts,
    )


def bpe_json(content: bytes, **parts: Any) -> dict[str, Any]:
    """A BPE model as the tokenizer.json of Llama 2 and Mistral write it: merges by their piece's score."""
    model = proto(content)
    scores = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    merges = [
        (-score, len(left), left, piece[len(left) :])
        for piece, score in scores.items()
        for left in (piece[:i] for i in range(1, len(piece)))
        if left in scores and piece[len(left) :] in scores
    ]
    control = [added(i, p.piece, special=True) for i, p in enumerate(model.pieces) if p.type == CONTROL]
    return frame(
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": [[left, right] for _, _, left, right in sorted(merges)],
        },
        added_tokens=control,
        **parts,
    )


LLAMA2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {"type": "Sequence", "decoders": FALLBACK},
}
MISTRAL = {
    "pre_tokenizer": {**METASPACE, "prepend_scheme": "first", "split": False},
    "decoder": {"type": "Sequence", "decoders": FALLBACK},
}
FORMS: dict[str, tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "T5": ("unigram", unigram_json, {}),
    "XLM-R": ("unigram", unigram_json, {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    "T5 with bytes": ("unigram bytes", unigram_json, {"decoder": {"type": "Sequence", "decoders": FALLBACK}}),
    "T5 whole": ("unigram ties", unigram_json, {"pre_tokenizer": None}),
    "Llama 2": ("bpe across words", bpe_json, LLAMA2),
    "Llama 2 with words": ("bpe", bpe_json, LLAMA2),
    "Llama 2 with bytes": ("bpe bytes", bpe_json, LLAMA2),
    "Mistral": ("bpe", bpe_json, MISTRAL),
}


@pytest.mark.parametrize("name", FORMS)
def test_ids_are_those_of_tokenizers(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    model, form, parts = FORMS[name]
    path = write(tmp_path / "tokenizer.json", form(files[model].read_bytes(), **parts))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ours = Tokenizer.from_file(path)
    manual = python_manual_text("valid")
    parts_of_manual = (manual[i : i + 2000] for i in range(0, 200_000, 2000))
    texts = [*hostile(1000, seed=7), *every_character(), *parts_of_manual]
    texts += ["<s>a</s>", "x<unk>y", "e\u0301\u0301 A\u030a ﬁ ㍿\r\n\u200b½", manual[:50_000], *giants()]
    ids, offsets = ours.encode_batch(texts)
    for i, (text, expected) in enumerate(zip(texts, theirs.encode_batch_fast(texts), strict=True)):
        mine = ids[offsets[i] : offsets[i + 1]].tolist()
        assert mine == expected.ids, (len(text), text[:200])
        if i < 500:
            assert ours.decode(mine) == theirs.decode(mine, skip_special_tokens=False)
    for some in random_ids(ours.vocab_size, 1000):
        text = ours.decode(some)
        assert text == theirs.decode(some, skip_special_tokens=False)
        # A run of bytes that is not UTF-8 spoils whole characters in it, which are out already.
        if "\ufffd" not in text:
            check_stream(ours, some, cut=False)


def tekken(**changes: Any) -> dict[str, Any]:
    words = [b"th", b"he", b"the", b" the", b"ab", b"aba", "é".encode(), b"unused"]
    tokens = [*(bytes([b]) for b in range(256)), *words]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    config = {"pattern": pattern, "num_vocab_tokens": 264, "default_vocab_size": 293}
    return {
        "config": {**config, "default_num_special_tokens": 30, "version": "v3"},
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
            for i, t in enumerate(tokens)
        ],
        **changes,
    }


def test_tekken(tmp_path: Path) -> None:
    """The first tokens that fit, behind the special ones, with tiktoken's merges."""
    path = write(tmp_path / "tekken.json", tekken())
    for tokenizer in (Tokenizer.from_pretrained(tmp_path), Tokenizer.from_file(path, cache=tmp_path)):
        assert tokenizer.vocab_size == 293
        assert len(tokenizer.special_tokens) == 30
        assert tokenizer.special_tokens["<SPECIAL_29>"] == 29
        assert tokenizer.encode(" the ab").tolist() == [30 + 259, 30 + ord(" "), 30 + 260]
        assert tokenizer.encode("abab").tolist() == [30 + 260, 30 + 260]
        assert tokenizer.encode("<s>é").tolist() == [30 + ord(c) for c in "<s>"] + [30 + 262]
        assert tokenizer.decode([1, 30 + 259]) == "<s> the"
        assert tokenizer.decode([1, 30 + 259], skip_special_tokens=True) == " the"
        for text in hostile(300):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    named = [{"rank": 1, "token_str": "<x>", "is_control": False}]
    write(path, tekken(special_tokens=named))
    assert Tokenizer.from_file(path).decode([1]) == "<x>"
    assert "<x>" not in Tokenizer.from_file(path).special_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"special_tokens": [{"rank": 30, "token_str": "x", "is_control": True}]}, '"x" is no. 30 of 30'),
        ({"special_tokens": [{"rank": 3, "token_str": "x", "is_control": True}] * 2}, "rank 3"),
        ({"vocab": [{"rank": 0, "token_bytes": "AA=="}]}, "expected 293 ids"),
        ({"vocab": [{"rank": 1, "token_bytes": "AA=="}] * 300}, "rank 0, found 1"),
        ({"vocab": [{"rank": 0, "token_bytes": "?"}] * 300}, "no base64"),
    ],
)
def test_tekken_that_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tekken.json", tekken(**changes))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(path)
