"""Text to token ids and back, in Rust."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from archzoo import _rust
from archzoo.errors import InputError, TokenizerError

Ids = npt.NDArray[np.uint32]
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json")
AllowedSpecial = Literal["all"] | AbstractSet[str]


class Ragged(NamedTuple):
    """Ids of n texts, one after the other: `ids` uint32 [N], `offsets` int64 [n + 1].

    Text i has `ids[offsets[i]:offsets[i + 1]]`.
    """

    ids: Ids
    offsets: npt.NDArray[np.int64]


class Located(NamedTuple):
    """Ids of a text and where they are: `ids` uint32 [N], `offsets` int64 [N, 2].

    Id i stands for `text.encode()[offsets[i, 0]:offsets[i, 1]]`.
    """

    ids: Ids
    offsets: npt.NDArray[np.int64]


class Tokenizer:
    """A tokenizer with the ids of the file's own library, read from a file or a model's folder."""

    def __init__(self, native: _rust.Tokenizer, config: dict[str, Any] | None = None) -> None:
        self._native = native
        self._config = config or {}

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        pattern: str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Read a `tokenizer.json`, a SentencePiece `.model`, a GGUF file's vocabulary, or ranks.

        Ranks are tiktoken's or Mistral's Tekken. Control tokens of a SentencePiece or Tekken file are not
        found in text, as in the libraries that these are of, and neither file says what goes around a text.
        Those of a GGUF file are found.

        Args:
            path: The file.
            pattern: For a rank file of tiktoken: "gpt2", "cl100k", "o200k", "llama3" or "qwen", which also
                name the special tokens, or a regular expression.
            cache: A folder for a byte-pair tokenizer's tables, in a file named by the hash of `path`'s
                content. It is written once, and makes later loads several times faster.

        Raises:
            TokenizerError: The file is damaged, or asks for something that is not supported.
        """
        try:
            return cls(_rust.Tokenizer(path, pattern, cache))
        except _rust.TokenizerError as error:
            raise TokenizerError(str(error)) from None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read the tokenizer of a model's folder, and its chat template.

        That is its `tokenizer.json`, or else a SentencePiece or Tekken file, around whose texts go the tokens
        that `add_bos_token` and `add_eos_token` of `tokenizer_config.json` ask for: see `from_file`.

        Raises:
            TokenizerError: A file is damaged or not supported.
        """
        folder = Path(folder)
        source = next((folder / name for name in _FILES if (folder / name).exists()), folder / _FILES[0])
        path = folder / "tokenizer_config.json"
        config: dict[str, Any] = {}
        if path.exists():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{path}: {error}") from None
        if source.name == _FILES[0]:  # which says itself what goes around a text
            tokenizer = cls.from_file(source)
        else:
            ends = (_end(config, "bos", path), _end(config, "eos", path))
            try:
                tokenizer = cls(_rust.Tokenizer(source, ends=ends))
            except _rust.TokenizerError as error:
                raise TokenizerError(str(error)) from None
        tokenizer._config = config
        template = folder / "chat_template.jinja"
        if template.exists():
            tokenizer._config["chat_template"] = template.read_text(encoding="utf-8")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, those of added tokens included."""
        return self._native.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the control tokens."""
        return {content: id for content, id, special in self._native.added_tokens() if special}

    @property
    def hash(self) -> str:
        """A hash of the file and the pattern: equal hashes give equal ids."""
        return self._native.hash

    def encode(
        self, text: str | bytes, add_special_tokens: bool = True, allowed_special: AllowedSpecial = "all"
    ) -> Ids:
        """Ids [N] of a text.

        Args:
            text: The text, or its bytes. Of bytes that are not UTF-8, which a byte-level tokenizer takes,
                each stretch is a piece of its own.
            add_special_tokens: Add what the file's post-processor puts around a text.
            allowed_special: Special tokens that are found in the text; the others are text like any other.
        """
        try:
            return self._native.encode(text, add_special_tokens, _allowed(allowed_special))
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, allowed_special: AllowedSpecial = "all"
    ) -> Located:
        """Ids of a text and the bytes of it that each stands for; see `encode`.

        Raises:
            InputError: The tokenizer is not byte-level, or its normalizer changes the text.
        """
        try:
            allowed = _allowed(allowed_special)
            ids, offsets = self._native.encode_with_offsets(text, add_special_tokens, allowed)
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None
        return Located(ids, offsets.reshape(-1, 2))

    def encode_batch(
        self,
        texts: Iterable[str],
        add_special_tokens: bool = True,
        allowed_special: AllowedSpecial = "all",
    ) -> Ragged:
        """Ids of many texts on all threads; see `encode`."""
        if isinstance(texts, str):
            raise InputError("encode_batch takes many texts; encode takes one")
        texts = texts if isinstance(texts, list | _rust.Texts) else list(texts)
        try:
            return Ragged(*self._native.encode_batch(texts, add_special_tokens, _allowed(allowed_special)))
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None

    def encode_documents(
        self,
        texts: list[str] | _rust.Texts,
        dtype: Literal["uint16", "uint32"],
        eos: int | None = None,
        ends: bool = True,
    ) -> tuple[npt.NDArray[np.uint16] | Ids, npt.NDArray[np.int64]]:
        """Ids [N] of documents one after the other for a token shard, and their offsets [n + 1].

        The calling thread makes them alone, unless a document is long. Nothing goes around a text but `eos`.

        Args:
            texts: The documents, in which special tokens are found.
            dtype: Of the ids, which have to fit.
            eos: An id that comes after each document.
            ends: Whether the last document ends here, and `eos` comes after it too.
        """
        if dtype not in ("uint16", "uint32"):
            raise InputError(f"dtype must be uint16 or uint32, found {dtype!r}")
        try:
            return self._native.encode_documents(texts, dtype == "uint32", eos, ends)
        except (_rust.TokenizerError, OverflowError) as error:
            raise InputError(str(error)) from None

    def count(
        self, text: str, add_special_tokens: bool = True, allowed_special: AllowedSpecial = "all"
    ) -> int:
        """Number of ids of a text, which are not kept."""
        try:
            return self._native.count(text, add_special_tokens, _allowed(allowed_special))
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None

    def decode(self, ids: Sequence[int] | npt.ArrayLike, skip_special_tokens: bool = False) -> str:
        """Text of ids [N]; bytes that are not UTF-8 become replacement characters."""
        try:
            return self._native.decode(_ids(ids), skip_special_tokens)
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None

    def decode_bytes(self, ids: Sequence[int] | npt.ArrayLike, skip_special_tokens: bool = False) -> bytes:
        """Bytes of ids [N]."""
        try:
            return self._native.decode_bytes(_ids(ids), skip_special_tokens)
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None

    def decode_stream(self, ids: Iterable[int], skip_special_tokens: bool = False) -> Iterator[str]:
        """Text of ids as they come; what may still become a character is held back."""
        stream = TextStream(self, skip_special_tokens)
        for id in ids:
            if text := stream.push(id):
                yield text
        if rest := stream.finish():
            yield rest

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Text of a conversation in the model's own form, to be encoded without adding special tokens.

        Args:
            messages: Dictionaries with "role", "content" and what else the template knows.
            add_generation_prompt: End with the start of an answer.
            variables: More of what the template knows, such as `tools`.
        """
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str):
            raise InputError("this tokenizer has no chat template; from_pretrained reads one from a folder")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _content(self._config[name]) for name in names if self._config.get(name)}
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return _rust.render_chat(template, json.dumps(tokens | given | variables))
        except _rust.TokenizerError as error:
            raise InputError(str(error)) from None


class TextStream:
    """Text of ids that come one by one; what may still become a character is held back.

    Args:
        tokenizer: Whose ids.
        skip_special_tokens: Leave control tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = tokenizer._native.stream()
        # Where a token's text depends on those before: the last ids, the first `_done` being out as `_shown`.
        self._ids: list[int] = []
        self._done = 0
        self._shown = ""

    def push(self, id: int) -> str:
        """The text that one more id completes."""
        if self._stream is not None:
            try:
                return self._tokenizer._native.decode_next(id, self._skip, self._stream)
            except (_rust.TokenizerError, OverflowError) as error:
                raise InputError(str(error)) from None
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        self._ids, self._done = self._ids[self._done :], len(self._ids) - self._done
        self._shown = self._tokenizer.decode(self._ids, self._skip)
        return new

    def finish(self) -> str:
        """What is left: replacement characters for a character that never ended."""
        if self._stream is not None:
            return self._stream.finish()
        return self._tokenizer.decode(self._ids, self._skip)[len(self._shown) :]


def _content(token: str | dict[str, Any]) -> str:
    """A token as tokenizer_config.json writes it: text, or an object with flags."""
    return token if isinstance(token, str) else str(token["content"])


def _end(config: dict[str, Any], name: str, path: Path) -> str | None:
    """The token at one end of a text, "bos" or "eos", if tokenizer_config.json wants one."""
    if not config.get(f"add_{name}_token"):
        return None
    if token := config.get(f"{name}_token"):
        return _content(token)
    raise TokenizerError(f"{path}: add_{name}_token is true, but no {name}_token is there")


def _allowed(allowed: AllowedSpecial) -> set[str] | None:
    if isinstance(allowed, str):
        if allowed != "all":
            raise InputError(f'allowed_special must be "all" or a set of tokens, found {allowed!r}')
        return None
    return set(allowed)


def _ids(ids: Sequence[int] | npt.ArrayLike) -> Ids:
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"ids must be a 1-D array of integers, got {array.ndim}-D {array.dtype}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**32):
        raise InputError("ids must be from 0 to 4294967295")
    return np.ascontiguousarray(array, np.uint32)
