"""Text files into token shards on disk: encode once, train often.

A pack is a folder:

    shard-00000.tokens      token ids, little-endian uint16 (or uint32 above 65,536 ids)
    shard-00000.documents   where each document starts, and where the last one ends: n + 1 times int64
    manifest.json           written last; `PackManifest`

Documents keep the order of the inputs and are never split over shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from archzoo._rust import Texts, threads
from archzoo.data.documents import (
    PARQUET,
    TEXT,
    Block,
    Documents,
    InputFile,
    block_size,
    file_xxh3,
    input_files,
    small_texts,
)
from archzoo.data.files import replace_text, sync, sync_folder
from archzoo.errors import InputError, PackError

T = TypeVar("T")
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_SMALL = 1 << 18
"""Bytes of a text file that is read with its neighbours, at most."""
_SYNC = 1 << 20
"""Bytes of a shard that the disk gets while more are made, so that its end does not wait for all of them."""


class PackTokenizer(Protocol):
    """What packing needs of a tokenizer; `archzoo.Tokenizer` is one. Several threads use it at once."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...
    @property
    def hash(self) -> str: ...
    def encode_documents(
        self, texts: list[str] | Texts, dtype: Literal["uint16", "uint32"], eos: int | None, ends: bool, /
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids [N] of texts one after the other, and their offsets [n + 1].

        `Texts` can be counted and iterated. After each comes `eos`, unless that is None; after the last one
        only if it `ends` here.
        """


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PackInput(_Data):
    """A file that was packed, named relative to the folder that holds all of them, and its xxh3-128."""

    name: str
    bytes: int
    xxh3: str


class PackShard(_Data):
    """One shard: its files are `{name}.tokens` and `{name}.documents`."""

    name: str
    tokens: int
    documents: int
    tokens_sha256: str
    documents_sha256: str


class PackSettings(_Data):
    """What decides the contents of a pack besides its inputs."""

    tokenizer_hash: str
    vocab_size: int
    eos_token_id: int | None
    text_key: str
    shard_tokens: int

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


class PackManifest(_Data):
    """The contents of manifest.json."""

    format: Literal["archzoo-pack"] = "archzoo-pack"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokens: int
    documents: int
    settings: PackSettings
    inputs: tuple[PackInput, ...]
    shards: tuple[PackShard, ...]

    @classmethod
    def read(cls, folder: str | Path) -> PackManifest:
        """The manifest of a finished pack."""
        path = Path(folder) / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            unfinished = (Path(folder) / UNFINISHED).exists()
            why = "packing has not finished: start it again" if unfinished else "no such file"
            raise PackError(f"{path}: {why}") from None
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise PackError(f"{path}: no manifest of a pack: {where}: {fault['msg']}") from None

    def files(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, sha256) of every file."""
        width = np.dtype(self.dtype).itemsize
        for shard in self.shards:
            yield f"{shard.name}.tokens", shard.tokens * width, shard.tokens_sha256
            yield f"{shard.name}.documents", (shard.documents + 1) * 8, shard.documents_sha256


class _Place(NamedTuple):
    """Input number, and documents of it that are done."""

    input: int = 0
    documents: int = 0


class _Unfinished(_Data):
    """What a killed run leaves: started again, packing goes on after the last finished shard."""

    settings: PackSettings
    inputs: tuple[tuple[str, int, int], ...]  # name, bytes, time of change
    shards: tuple[PackShard, ...] = ()
    place: _Place = _Place()


class _Batch(NamedTuple):
    block: Block
    start: _Place
    is_files: bool  # a text each, else texts of one file
    bytes_read: int

    @property
    def documents(self) -> int:
        """Documents that end here."""
        return len(self.block.texts) - (not self.block.ends)

    def place(self, documents: int) -> _Place:
        """Where packing goes on after this many of the documents."""
        input, before = self.start
        return _Place(input + documents) if self.is_files else _Place(input, before + documents)


class _Encoded(NamedTuple):
    """A batch, its ids with end-of-text tokens among them, and their offsets."""

    batch: _Batch
    ids: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]


def write_pack(
    inputs: Sequence[str | Path],
    tokenizer: PackTokenizer,
    out: str | Path,
    *,
    shard_tokens: int = 100_000_000,
    text_key: str = "text",
    append_eos: bool = False,
    eos_token: str | None = None,
    progress: bool = False,
) -> PackManifest:
    """Encode text, JSON lines and Parquet files into the folder `out`.

    The result is a pure function of the inputs, the tokenizer and the settings. A run that was killed goes on
    after its last finished shard and ends with the same bytes; a finished one is only checked. Reading,
    encoding and writing overlap; memory is bounded by a few blocks for each thread, and the document index of
    one shard.

    Args:
        inputs: files, and folders, in each of which what is there is taken by name.
        tokenizer: makes the ids.
        out: created if missing.
        shard_tokens: a shard ends with the document that reaches this.
        text_key: field of a JSON line, or column, with the text.
        append_eos: end every document with the tokenizer's end-of-text token.
        eos_token: that token, where it is not one of the usual ones.
        progress: show a progress bar.
    """
    files = input_files(inputs)
    if not files:
        raise InputError("no inputs to pack")
    if shard_tokens < 1:
        raise InputError(f"shard_tokens must be at least 1, found {shard_tokens}")
    settings = PackSettings(
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=_eos(tokenizer, eos_token) if append_eos or eos_token else None,
        text_key=text_key,
        shard_tokens=shard_tokens,
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        return _Packer(files, tokenizer, folder, settings)(progress)


def verify_pack(folder: str | Path) -> PackManifest:
    """Check every byte of a pack against its manifest; PackError names each damaged file."""
    manifest = PackManifest.read(folder)

    def fault(file: tuple[str, int, str]) -> str | None:
        name, size, wanted = file
        path = Path(folder) / name
        if not path.exists():
            return f"{path}: missing"
        if (found := path.stat().st_size) != size:
            return f"{path}: {found} bytes, the manifest says {size}"
        if (digest := _sha256(path)) != wanted:
            return f"{path}: damaged: its sha256 is {digest}, the manifest says {wanted}"
        return None

    with ThreadPoolExecutor() as threads:
        faults = [text for text in threads.map(fault, manifest.files()) if text]
    if faults:
        raise PackError("\n".join(faults))
    return manifest


class _Packer:
    """One run over one folder, which is locked."""

    def __init__(
        self, files: list[InputFile], tokenizer: PackTokenizer, folder: Path, settings: PackSettings
    ) -> None:
        self.files, self.tokenizer, self.folder, self.settings = files, tokenizer, folder, settings
        here = os.getcwd()
        paths = [os.path.join(here, file.path) for file in files]
        # `dirname` takes several times as long.
        whole = os.path.join(os.path.commonpath({path[: path.rfind("/") + 1] for path in paths}), "")
        self.names = [path.removeprefix(whole) for path in paths]
        self.bytes = sum(file.size for file in files)
        self.hashes: dict[int, str] = {}
        """Those of the files that this run has read from their start to their end."""
        known = ((name, size, changed) for name, (_, size, changed) in zip(self.names, files, strict=True))
        fresh = _Unfinished(settings=settings, inputs=tuple(known))
        self.state = self._found(fresh) or fresh

    def _found(self, fresh: _Unfinished) -> _Unfinished | None:
        """What an earlier run of the same job has done."""
        path = self.folder / UNFINISHED
        if not path.exists():
            return None
        try:
            state = _Unfinished.model_validate_json(path.read_bytes())
        except ValidationError:
            raise PackError(f"{path}: damaged; remove the folder to pack anew") from None
        if (state.settings, state.inputs) != (fresh.settings, fresh.inputs):
            raise PackError(f"{path}: left by a job with other inputs or settings; remove the folder first")
        return state

    def __call__(self, progress: bool) -> PackManifest:
        with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as finisher:
            self.finisher = finisher
            if (self.folder / MANIFEST).exists():
                return self._same(PackManifest.read(self.folder))
            stop = threading.Event()
            done, files = self.state.place.input, enumerate(self.files)
            others = [(i, file.path) for i, file in files if i < done or file.path.endswith(PARQUET)]
            hashes = hasher.submit(lambda: {i: file_xxh3(path) for i, path in others if not stop.is_set()})
            try:
                self._write(progress)
            except BaseException:
                stop.set()
                raise
            found = self.hashes | hashes.result()
        shards = self.state.shards
        inputs = zip(self.names, self.files, strict=True)
        content = {
            "dtype": self.settings.dtype,
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "settings": self.settings,
            # Many; to make each one here takes longer.
            "inputs": tuple(
                {"name": name, "bytes": file.size, "xxh3": found[i]} for i, (name, file) in enumerate(inputs)
            ),
            "shards": shards,
        }
        manifest = PackManifest.model_validate(content)
        _replace(self.folder / MANIFEST, manifest)
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return manifest

    def _same(self, manifest: PackManifest) -> PackManifest:
        """The finished pack of this very job, or an error."""
        mine = [(name, file.size) for name, file in zip(self.names, self.files, strict=True)]
        theirs = [(entry.name, entry.bytes) for entry in manifest.inputs]
        same = manifest.settings == self.settings and mine == theirs
        hashes = [entry.xxh3 for entry in manifest.inputs]
        if not same or [file_xxh3(file.path) for file in self.files] != hashes:
            raise PackError(f"{self.folder}: already holds a pack of other inputs or settings")
        return manifest

    def _write(self, progress: bool) -> None:
        bar = Progress(
            TextColumn("packing"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            disable=not progress,
        )
        tokens = sum(shard.tokens for shard in self.state.shards)
        task = bar.add_task("", total=self.bytes, tokens=tokens)
        shard: _Shard | None = None
        number = len(self.state.shards)
        finishing: Future[None] | None = None
        with bar, closing(self._encoded(_ahead(self._batches()))) as encoded:
            try:
                for batch, ids, offsets in encoded:
                    start = first = 0
                    ends = offsets[1 : 1 + batch.documents]
                    while start < len(ids) or first < len(ends):
                        if shard is None:
                            shard = _Shard(self.folder, number, self.settings.dtype, self.finisher)
                            number += 1
                        room = self.settings.shard_tokens - shard.tokens
                        full = first + int(np.searchsorted(ends[first:], start + room))
                        done = full < len(ends)
                        stop, last = (int(ends[full]), full + 1) if done else (len(ids), len(ends))
                        shard.write(ids[start:stop], ends[first:last] - start)
                        start, first = stop, last
                        if done:
                            finishing = self._finish(shard, batch.place(last), finishing)
                            shard = None
                    tokens += len(ids)
                    bar.update(task, completed=batch.bytes_read, tokens=tokens)
                if shard is not None:
                    finishing = self._finish(shard, _Place(len(self.files)), finishing)
                    shard = None
                if finishing is not None:
                    finishing.result()
            finally:
                if shard is not None:
                    shard.discard()

    def _batches(self) -> Iterator[_Batch]:
        """Texts from where the last finished shard ends."""
        i, skip = self.state.place
        before = sum(file.size for file in self.files[:i])
        while i < len(self.files):
            if not skip and (small := self._small(i, block_size(self.bytes - before))):
                files = self.files[i : i + small]
                before += sum(file.size for file in files)
                block, hashes = small_texts(files)
                self.hashes |= zip(range(i, i + small), hashes, strict=True)
                yield _Batch(block, _Place(i), True, before)
                i += small
                continue
            documents = Documents(Path(self.files[i].path), self.settings.text_key)
            done = 0
            for block in documents:
                start, batch = done, _Batch(block, _Place(i, done), False, before + documents.bytes_read)
                done += batch.documents
                if start < skip:  # of an unfinished run
                    rest = list(block.texts)[skip - start :]
                    if not rest:
                        continue
                    batch = batch._replace(block=Block(rest, block.ends), start=_Place(i, skip))
                yield batch
            if documents.xxh3:
                self.hashes[i] = documents.xxh3
            before += self.files[i].size
            i, skip = i + 1, 0

    def _small(self, first: int, most: int) -> int:
        """How many files from `first` on are small text files of so many bytes together at most."""
        count = size = 0
        for file in self.files[first : first + 4096]:
            size += file.size
            if not self._is_small(file) or size > most:
                break
            count += 1
        return count

    @staticmethod
    def _is_small(file: InputFile) -> bool:
        return file.size <= _SMALL and file.path.endswith(TEXT)

    def _encoded(self, batches: Generator[_Batch]) -> Generator[_Encoded]:
        """The batches in their order, each encoded by one thread."""
        waiting: deque[Future[_Encoded]] = deque()
        count = threads()
        with closing(batches), ThreadPoolExecutor(count) as pool:
            try:
                for batch in batches:
                    waiting.append(pool.submit(self._encode, batch))
                    while waiting and (waiting[0].done() or len(waiting) > 2 * count):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error nothing more is encoded

    def _encode(self, batch: _Batch) -> _Encoded:
        settings, block = self.settings, batch.block
        given = (block.texts, settings.dtype, settings.eos_token_id, block.ends)
        ids, offsets = self.tokenizer.encode_documents(*given)
        if len(ids) and (highest := int(ids.max())) >= settings.vocab_size:
            raise PackError(f"the tokenizer made id {highest}, its vocab_size is {settings.vocab_size}")
        return _Encoded(batch, ids, offsets)

    def _finish(self, shard: _Shard, place: _Place, before: Future[None] | None) -> Future[None]:
        """Bring a shard to the disk and record it, while the next one is written."""
        if before is not None:
            before.result()

        def finish() -> None:
            shards = (*self.state.shards, shard.finish())
            self.state = self.state.model_copy(update={"shards": shards, "place": place})
            if place.input < len(self.files):  # else the manifest follows at once
                _replace(self.folder / UNFINISHED, self.state)

        return self.finisher.submit(finish)


class _Shard:
    """Files of one shard under temporary names."""

    def __init__(self, folder: Path, number: int, dtype: str, syncer: ThreadPoolExecutor) -> None:
        self.folder, self.name, self._syncer = folder, f"shard-{number:05d}", syncer
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self._ends: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._syncing: Future[None] | None = None
        self._unsynced = 0
        self._digest = hashlib.sha256()
        self._file = open(self._temporary("tokens"), "wb")  # noqa: SIM115

    def write(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        """Append tokens; documents end after `ends` of them."""
        data = ids.astype(self.dtype, copy=False).data.cast("B")
        self._file.write(data)
        self._digest.update(data)
        self._ends.append(ends + self.tokens)
        self.tokens += len(ids)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._file.flush()
            self._syncing = self._syncer.submit(os.fsync, self._file.fileno())
            self._unsynced = 0

    def finish(self) -> PackShard:
        """Bring both files to the disk, then give them their names."""
        self._wait()
        ends = np.concatenate(self._ends).astype("<i8")
        sync(self._file)
        self._file.close()
        with open(self._temporary("documents"), "wb") as file:
            file.write(ends.data)
            sync(file)
        for suffix in ("tokens", "documents"):
            self._temporary(suffix).rename(self.folder / f"{self.name}.{suffix}")
        sync_folder(self.folder)
        return PackShard(
            name=self.name,
            tokens=self.tokens,
            documents=len(ends) - 1,
            tokens_sha256=self._digest.hexdigest(),
            documents_sha256=hashlib.sha256(ends.data).hexdigest(),
        )

    def discard(self) -> None:
        with suppress(OSError):
            self._wait()
        self._file.close()
        self._temporary("tokens").unlink(missing_ok=True)

    def _wait(self) -> None:
        """Raise what the disk said to the last part: asked again, it may not say so."""
        if self._syncing is not None:
            self._syncing.result()

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}.tmp"


def _ahead(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The same items, made in a thread that is up to `depth` of them ahead."""
    queue: Queue[tuple[T] | BaseException | None] = Queue(depth)
    stop = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def run() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                if not put((item,)):
                    break
        except BaseException as error:
            end = error
        finally:
            if isinstance(items, Generator):
                items.close()
        put(end)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while isinstance(item := queue.get(), tuple):
            yield item[0]
        if item is not None:
            raise item
    finally:
        stop.set()
        thread.join()


def _eos(tokenizer: PackTokenizer, name: str | None) -> int:
    special = tokenizer.special_tokens
    candidates = [token for token in ([name] if name else EOS_TOKENS) if token in special]
    if not candidates:
        what = f"'{name}'" if name else "none of the usual ends of text"
        raise InputError(
            f"the tokenizer's special tokens hold {what}; they are {', '.join(special) or 'none'}"
        )
    return special[candidates[0]]


def _sha256(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, content: BaseModel) -> None:
    replace_text(path, content.model_dump_json(indent=2) + "\n")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PackError(f"{folder}: another process is packing into this folder") from None
    finally:
        os.close(handle)
