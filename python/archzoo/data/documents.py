"""Documents in files: plain text, JSON lines and Parquet; the first two also compressed with gzip or zstd."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import IO, Any, NamedTuple

from isal import igzip, isal_zlib

from archzoo import _rust
from archzoo.errors import InputError

TEXT, LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
SUFFIXES = (*(a + b for a in TEXT + LINES for b in ("", ".gz", ".zst")), *PARQUET)
BLOCK = 1 << 21
"""Bytes that are read at once, at most."""


def _least_block() -> int:
    return min(1 << 18, BLOCK)


def block_size(left: int) -> int:
    """Bytes of a file to read at once where so many are left: fewer at last, for all threads to have work."""
    return max(_least_block(), min(BLOCK, left // (2 * _rust.threads())))


class Block(NamedTuple):
    """Texts of documents, one each; the last document goes on in the next block unless it `ends` here."""

    texts: list[str] | _rust.Texts
    ends: bool = True


class InputFile(NamedTuple):
    """A file, its bytes, and the time of its last change in ns."""

    path: str
    size: int
    changed: int


def input_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """The files among `inputs` and, each folder by name, those of a known kind in its folders."""
    found: list[InputFile] = []
    for path in map(Path, inputs):
        if path.is_dir():
            before = len(found)
            try:
                found += starmap(InputFile, _rust.list_files(path, SUFFIXES))
            except OSError as error:
                raise InputError(str(error)) from None
            if len(found) == before:
                raise InputError(f"{path}: no file that ends in one of {', '.join(SUFFIXES)}")
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
        else:
            stat = path.stat()
            found.append(InputFile(_utf8(path), stat.st_size, stat.st_mtime_ns))
    return found


def _utf8(path: Path) -> str:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{os.fsencode(path)!r}: a name that is not UTF-8") from None
    return str(path)


class HashedFile(io.BufferedReader):
    """A file opened for reading, and the xxh3-128 of all that it holds.

    For who reads it in order, by the methods here: the others of its base do not take part in the hash.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path))
        self._hash = _rust.Xxh3()

    def read(self, size: int | None = -1, /) -> bytes:
        return self._taken(super().read(size))

    def readinto(self, buffer: Any, /) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._taken(super().readline(size))

    def _taken(self, part: bytes) -> bytes:
        self._hash.update(part)
        return part

    def xxh3(self) -> str:
        """In 32 hexadecimal digits; reads what has not been read."""
        while self.read(1 << 18):
            pass
        return self._hash.hexdigest()


class Documents:
    """The documents of one file in their order; `bytes_read` of it have been read so far.

    A text file is one document. A large one comes in parts that end, where they can, with the last line break
    before a line that does not start with white space: no word is cut.
    """

    def __init__(self, path: Path, text_key: str = "text") -> None:
        self.path, self.text_key = path, text_key
        self.size = path.stat().st_size
        self.xxh3: str | None = None
        """Of the file, known when all documents have been read; not of Parquet, which is read in no order."""
        self._raw: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        return min(self.size, self._raw.tell()) if self._raw and not self._raw.closed else self.size

    def __iter__(self) -> Iterator[Block]:
        name = self.path.name.removesuffix(".gz").removesuffix(".zst")
        if name.endswith(PARQUET):
            with open(self.path, "rb") as self._raw:
                yield from self._rows(self._raw)
            return
        with HashedFile(self.path) as raw, _decompressed(raw, self.path) as file:
            self._raw = raw
            try:
                yield from self._lines(file) if name.endswith(LINES) else self._text(file)
                self.xxh3 = raw.xxh3()
            except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]  # wrong in its stubs
                raise InputError(f"{self.path}: {error}") from None

    def _text(self, file: IO[bytes]) -> Iterator[Block]:
        held = b""
        while True:
            more = file.read(BLOCK)
            held += more
            if more and len(held) <= BLOCK:
                continue
            try:
                texts, size = _rust.text_start(held, not more)
            except ValueError as error:
                raise InputError(f"{self.path}: {error}") from None
            yield Block(texts, not more)
            if not more:
                return
            held = held[size:]

    def _lines(self, file: IO[bytes]) -> Iterator[Block]:
        number, size = 1, _least_block()  # the first ones are short, so that their encoding starts soon
        while block := file.read(size):
            size = min(2 * size, block_size(self.size - self.bytes_read))
            texts, count, fault = _rust.json_texts(block, file.readline(), self.text_key)
            number += count
            if len(texts):
                yield Block(texts)
            if fault is not None:
                raise InputError(f"{self.path}, line {number}: {fault}")

    def _rows(self, file: IO[bytes]) -> Iterator[Block]:
        parquet = _optional("pyarrow.parquet", self.path)
        try:
            table = parquet.ParquetFile(file)
            batches = table.iter_batches(batch_size=128, columns=[self.text_key])
            if self.text_key not in table.schema_arrow.names:
                raise InputError(f"{self.path}: no column '{self.text_key}'")
            row = size = 0
            texts: list[str] = []
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise InputError(f"{self.path}, row {row}: no text in column '{self.text_key}'")
                    texts.append(text)
                    size += len(text)
                    if size >= _least_block():
                        yield Block(texts)
                        texts, size = [], 0
            if texts:
                yield Block(texts)
        except OSError as error:  # pyarrow's ArrowInvalid is a ValueError, a damaged page an OSError
            raise InputError(f"{self.path}: {error}") from None


def small_texts(files: Sequence[InputFile]) -> tuple[Block, list[str]]:
    """Text files, small and not compressed: a document each; and the xxh3-128 of each file."""
    try:
        texts, hashes = _rust.file_texts([(file.path, file.size) for file in files])
        return Block(texts), hashes
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None


def file_xxh3(path: str | Path) -> str:
    """xxh3-128 of a file's content, in 32 hexadecimal digits."""
    with HashedFile(path) as file:
        return file.xxh3()


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(igzip.IGzipFile(fileobj=raw), 1 << 20)
    if path.suffix == ".zst":
        # zstandard's own reader takes a file that was cut for a whole one.
        return io.BufferedReader(_optional("pyarrow", path).input_stream(raw, compression="zstd"), 1 << 20)
    return raw


def _optional(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise InputError(
            f"{path}: reading it needs {package}: install archzoo[data] or {package} itself"
        ) from None
