"""The native module: routing and checkpoint IO in Rust. All work runs with the interpreter released."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "BpeTrainer",
    "CheckpointError",
    "CheckpointReader",
    "FolderWriter",
    "GgufReader",
    "Texts",
    "Tokenizer",
    "TokenizerError",
    "Utf8Stream",
    "Xxh3",
    "__version__",
    "attention",
    "compress",
    "conv",
    "conv_step",
    "decode_dfloat11",
    "decompress",
    "encode_dfloat11",
    "eplb",
    "experts",
    "file_texts",
    "gate",
    "gated_rms_norm",
    "has_bfloat16",
    "instruction_set",
    "json_texts",
    "latent_attention",
    "linear",
    "list_files",
    "measure_dfloat11",
    "plan",
    "render_chat",
    "rms_norm",
    "rope",
    "split_patterns",
    "ssd_scan",
    "ssd_step",
    "swiglu",
    "text_start",
    "threads",
    "write_shards",
]
__version__: str

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Buffers: TypeAlias = tuple[_Bytes, _Bytes, _Bytes, _Bytes, _Bytes]

@final
class BpeTrainer:
    """Counts the words of texts, then learns a byte-level BPE vocabulary from them."""

    def __new__(cls, pattern: str) -> Self:
        """A trainer that splits text into words by a regular expression."""
    def feed(self, texts: list[str]) -> None:
        """Counts the words of some texts; none spans two of them."""
    def feed_file(self, path: str | os.PathLike[str]) -> None:
        """Counts the words of a UTF-8 file of any size."""
    def train(self, vocab_size: int, special_tokens: list[str], min_frequency: int) -> str:
        """Learns the vocabulary; returns it as the text of a `tokenizer.json`."""

@final
class Texts:
    """Texts, one after the other in memory; as many strings for who iterates."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...

def json_texts(block: bytes, rest: bytes, key: str) -> tuple[Texts, int, str | None]:
    """The text at `key` of every JSON object, one a line; how many lines; what is wrong with the next one.

    The lines are those of `block`, the last of which goes on in `rest`.
    """

def threads() -> int:
    """How many threads the work of this process is shared by."""

def text_start(content: bytes, whole: bool) -> tuple[Texts, int]:
    """The start of a text file, up to a line that does not start with white space; how many bytes that is.

    All of it if it is `whole`. ValueError if it is not UTF-8.
    """

def file_texts(files: Sequence[tuple[str | os.PathLike[str], int]]) -> tuple[Texts, list[str]]:
    """The texts of whole files, given by their paths and about how many bytes they have; each one's xxh3-128.

    OSError or ValueError names the one that cannot be read or is not UTF-8.
    """

def list_files(folder: str | os.PathLike[str], suffixes: Sequence[str]) -> list[tuple[str, int, int]]:
    """The files in a folder and those in it whose names end so, each folder by name.

    Each with its bytes and the time of their last change in ns. Links lead to files, not to folders. OSError
    names what cannot be read.
    """

@final
class Xxh3:
    """xxh3-128 of bytes that are given part by part."""

    def __new__(cls) -> Self: ...
    def update(self, part: bytes) -> None:
        """Takes the next bytes."""
    def hexdigest(self) -> str:
        """The hash of the bytes so far, in 32 hexadecimal digits."""

class CheckpointError(Exception):
    """A checkpoint that cannot be read or written: names file, tensor, what was expected and found."""

@final
class CheckpointReader:
    """An open safetensors checkpoint, one file or sharded, checked as a whole before a tensor is read.

    Its files stay open: a folder that is replaced in the meantime does not change what is read.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a `.safetensors` file, an index file, or a folder that holds one of them."""
    @property
    def metadata(self) -> dict[str, str]:
        """The headers' free-form strings; of shards that disagree, the first."""
    def infos(self) -> dict[str, tuple[str, tuple[int, ...], str, int | None]]:
        """Dtype as the format writes it ("F32", ...), shape, path of the file and first byte of every tensor.

        By file name, then in the order of their bytes. Of one that is compressed the first byte is None.
        """
    @property
    def bytes_read(self) -> int:
        """Bytes that have been read from the tensors so far, also by a read that is under way."""
    @property
    def unchecked_files(self) -> list[Path]:
        """Files whose tensors have no checksums."""
    def verify(self) -> list[str]:
        """Reads every byte and compares it with the manifest and the checksums, where there are such.

        What is wrong, in the order of the files.
        """
    def read_into(
        self,
        requests: list[tuple[str, int, int, list[tuple[int, int]], str | None]],
        verify: bool = False,
    ) -> None:
        """Reads tensors, or boxes of them, into memory; `archzoo.checkpoint.Reader` is the only caller.

        requests: name, address, bytes, `start..end` on the first dimensions, dtype in memory if not the
        tensor's (rounded to nearest even). With `verify` whole tensors are compared with their checksums.
        """

@final
class FolderWriter:
    """Builds a folder beside its final place and puts it there in one step.

    Until `commit` the final folder is what it was, whatever happens to this process. One writer at a time for
    each final folder. As a context manager it aborts unless committed.
    """

    def __new__(cls, final: str | os.PathLike[str]) -> Self:
        """Locks `final` against other writers and makes the temporary folder."""
    @property
    def path(self) -> Path:
        """The temporary folder."""
    def commit(self, obsolete: Sequence[str] = ...) -> None:
        """Puts the folder in its final place.

        Other files of an older folder are carried over, not its weights (`model*.safetensors` and the index)
        nor those that are `obsolete`.
        """
    def abort(self) -> None:
        """Removes the temporary folder. Does nothing after a commit."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class GgufReader:
    """An open GGUF file (version 2 or 3), checked before a tensor is read."""

    def __new__(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a file."""
    @property
    def metadata(self) -> dict[str, Any]:
        """Values by key: numbers, strings, booleans and lists of them."""
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], str]]:
        """Name, dtype once read, shape (rows first) and ggml's type of every tensor, in the file's order."""
    def read_into(self, requests: list[tuple[str, npt.NDArray[np.uint8]]]) -> None:
        """Reads tensors into contiguous byte arrays of their length, quantised ones as float32."""

def eplb(
    load: int,
    layers: int,
    cluster: tuple[int, int, int, int, int],
    out: tuple[int, int, int],
    threads: int,
) -> None:
    """Places experts by load (float32 `[layers, experts]`); `archzoo.parallel` is the only caller.

    cluster: experts, replicas, groups, nodes, gpus. out: addresses of expert and rank of each slot (int64
    `[layers, replicas]`) and of the replicas of each expert (int64 `[layers, experts]`).
    """

class TokenizerError(Exception):
    """A tokenizer that cannot be read, or input that it cannot take: names file and feature."""

@final
class Tokenizer:
    """A tokenizer, ready for any number of threads."""

    def __new__(
        cls,
        path: str | os.PathLike[str],
        pattern: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        ends: tuple[str | None, str | None] = ...,
    ) -> Self:
        """Reads a `tokenizer.json`, a SentencePiece file, a GGUF file's vocabulary, or ranks.

        Those are Mistral's Tekken, or a rank file with its pattern.

        `cache` is a folder for tables that are built once; `ends` are control tokens that go before and after
        a text, if the file does not say so.
        """
    @property
    def vocab_size(self) -> int:
        """Number of ids, those of added tokens included."""
    def stream(self) -> Utf8Stream | None:
        """For `decode_next`; None if the text of a token depends on more than whether it is the first."""
    def decode_next(self, id: int, skip_special_tokens: bool, stream: Utf8Stream) -> str:
        """The text that one more id completes."""
    @property
    def hash(self) -> str:
        """A hash of the file and the pattern, in hexadecimal."""
    def added_tokens(self) -> list[tuple[str, int, bool]]:
        """Content, id, and whether it is a control token."""
    def encode(
        self, text: str | bytes, add_special_tokens: bool, allowed_special: set[str] | None
    ) -> npt.NDArray[np.uint32]:
        """Ids `[N]` of a text or of bytes; `allowed_special` None is all."""
    def encode_with_offsets(
        self, text: str, add_special_tokens: bool, allowed_special: set[str] | None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids `[N]` of a text, and where their bytes start and end in it `[2 * N]`."""
    def count(self, text: str, add_special_tokens: bool, allowed_special: set[str] | None) -> int:
        """Number of ids of a text."""
    def encode_batch(
        self, texts: list[str] | Texts, add_special_tokens: bool, allowed_special: set[str] | None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts `[N]` and offsets `[n + 1]`."""
    def encode_documents(
        self, texts: list[str] | Texts, is_wide: bool, eos: int | None, ends: bool
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of documents `[N]` and offsets `[n + 1]`, made by this thread alone unless a document is long.

        After each document comes `eos`; after the last one only if it `ends` here.
        """
    def decode(self, ids: npt.NDArray[np.uint32], skip_special_tokens: bool) -> str:
        """Text of ids; what is not UTF-8 becomes replacement characters."""
    def decode_bytes(self, ids: npt.NDArray[np.uint32], skip_special_tokens: bool) -> bytes:
        """Bytes of ids."""

@final
class Utf8Stream:
    """Joins the bytes of tokens that come one by one, and holds back what may still become a character.

    `Tokenizer.stream` makes one.
    """

    def finish(self) -> str:
        """What is left at the end."""

def split_patterns() -> dict[str, str]:
    """The regular expressions that cut text into words, by the name of a family of models."""

def render_chat(template: str, variables: str) -> str:
    """Fills in a chat template with the variables of a JSON object."""

def gate(
    logits: int,
    dtype: str,
    tokens: int,
    experts: int,
    top_k: int,
    score: str,
    bias: int,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
    out: tuple[int, int],
    threads: int,
) -> None:
    """Chooses each token's experts; `archzoo.ops.moe` is the only caller and says what the options mean.

    Args:
        logits: Address of `[tokens, experts]`.
        dtype: "float32", "bfloat16" or "float16".
        bias: Address of `[experts]` float32; 0 for none.
        out: Addresses of weights (float32) and ids (int64) `[tokens, top_k]`.

    Raises:
        ValueError: An argument is out of its range, or a token's scores are NaN.
    """

def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""

def instruction_set() -> str:
    """The vector instructions in use: "baseline", "avx2" or "avx512".

    The environment variable ARCHZOO_INSTRUCTION_SET names a lower set than the CPU's best.
    """

def linear(
    x: int,
    rows: int,
    k: int,
    bfloat16: bool,
    threads: int,
    parts: list[tuple[int, int, int, int]],
) -> None:
    """`out = x Wᵀ + b` for several weights on one x `[rows, k]`, all of one dtype.

    The arguments are addresses of contiguous CPU tensors; `archzoo.ops.linear` is the only caller.

    Args:
        x: Address of the input.
        rows: Rows of `x`.
        k: Columns of `x` and of each weight.
        bfloat16: Whether all are bfloat16 (else float32).
        threads: Most threads to use.
        parts: Address and rows of a weight, address of its bias (0: none), address of its output.
    """

def plan(
    ids: int,
    n: int,
    experts: int,
    top_k: int,
    out: tuple[int, int, int, int, int],
    threads: int,
) -> None:
    """Sorts `n` assignments `ids` (int64) by expert; `archzoo.ops.moe` is the only caller.

    out: addresses of order, inverse, token (int64 `[n]`), counts and offsets (int32 `[experts]`).
    """

def rms_norm(
    x: int, residual: int, weight: int, rows: int, d: int, eps: float, scale: float, out: int, sum: int
) -> None:
    """RMSNorm of fp32 `[rows, d]` by address; with a residual (not 0) of x + residual, kept in `sum`."""

def rope(
    shape: tuple[int, int, int, int, int],
    x: tuple[int, tuple[int, int, int]],
    table: tuple[int, int, bool],
    interleaved: bool,
    out: int,
    threads: int,
) -> None:
    """Rotate fp32 heads; shape (batch, tokens, heads, channels, pairs), table (cos, sin, one of each row)."""

def gated_rms_norm(
    y: int,
    gate: tuple[int, int],
    weight: int,
    rows: int,
    d: int,
    group: int,
    eps: float,
    before: bool,
    out: int,
    threads: int,
) -> None:
    """Gated RMSNorm of fp32 `[rows, d]` by address, in groups of channels; gate: address, row stride."""

def experts(
    shape: tuple[int, int, int, int, int],
    x: int,
    token: int,
    scale: int,
    counts: int,
    weights: tuple[int, int, int, int],
    bfloat16: bool,
    activation: str,
    scale_input: bool,
    keep: int,
    out: int,
    threads: int,
) -> None:
    """Adds scale[r] * FFN(x[token[r]]) to out[token[r]] for assignments sorted by expert, by address, fp32.

    shape: tokens, assignments, experts, d, hidden; weights: up, down and their biases (0: none), fp32, bf16;
    keep (0: none) takes the values before the activation.
    """

def conv(
    shape: tuple[int, int, int, int],
    x: tuple[int, int, int],
    state: int,
    weight: int,
    bias: int,
    silu: bool,
    out: int,
    threads: int,
) -> None:
    """A causal convolution by address, fp32. shape: rows, tokens, channels, taps; x: address, strides."""

def conv_step(
    x: int, state: int, weight: int, bias: int, rows: int, c: int, k: int, silu: bool, out: int
) -> None:
    """A step of a causal convolution by address: x, out `[rows, c]`, state `[rows, k, c]`."""

def latent_attention(
    shape: tuple[int, int, int, int, int, int, int, int],
    q: int,
    keys: tuple[int, tuple[int, int]],
    weight: int,
    scale: float,
    out: int,
    threads: int,
) -> None:
    """Absorbed latent attention of one query per row by address; keys: address, strides of row and slot.

    shape: batch, heads, heads of the up-projection, slots, rank, nope, rope and value channels.
    """

def swiglu(
    shape: tuple[int, int, int],
    x: int,
    weights: tuple[int, int, int],
    bfloat16: bool,
    out: int,
    threads: int,
) -> None:
    """A SwiGLU by address: x, out fp32 `[rows, d]`, weights gate, up, down. shape: rows, d, hidden."""

def ssd_scan(
    shape: tuple[int, int, int, int, int, int, int],
    x: int,
    a: int,
    b: int,
    c: int,
    state: int,
    y: int,
    threads: int,
) -> None:
    """The Mamba-2 recurrence by address, fp32, state in place; B, C `[batch, groups, tokens, state_size]`.

    shape: batch, tokens, heads, head_dim, state_size, groups of B, groups of C.
    """

def ssd_step(
    shape: tuple[int, int, int, int, int, int],
    x: int,
    decay: int,
    b: int,
    c: int,
    state: int,
    y: int,
    threads: int,
) -> None:
    """A step of the Mamba-2 recurrence by address, fp32, state in place.

    shape: batch, heads, head_dim, state_size, groups of B, groups of C.
    """

def attention(
    shape: tuple[int, int, int, int, int, int],
    q: int,
    k: tuple[int, tuple[int, ...]],
    v: tuple[int, tuple[int, ...]],
    scale: float,
    bfloat16: bool,
    out: int,
    threads: int,
) -> None:
    """Attention of one query per row and head over a cache, by address; q and out are fp32.

    shape: batch, heads, groups, slots, key channels, value channels. k, v: address and the strides of row,
    head and slot, bfloat16 or fp32.
    """

def write_shards(
    folder: str | os.PathLike[str],
    tensors: Sequence[tuple[str, str, tuple[int, ...], _Bytes | Callable[[], _Bytes]]],
    max_shard_bytes: int,
    compress: bool = False,
) -> None:
    """Writes a checkpoint into an existing folder, through to the disk.

    One file, or shards of at most `max_shard_bytes` and their index. Tensors (name, dtype, shape, bytes) are
    dealt to shards in the given order; bytes that are a call are asked for when they are written, by any
    thread. `compress`: as containers where these are smaller.
    """

def compress(dtype: str, bytes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    """The container of a tensor's contiguous bytes, None where that is no smaller.

    dtype: as safetensors writes it; BF16, F32, F16 and the F8 types with a mantissa are compressed.
    """

def decompress(dtype: str, stored: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
    """Fills `out`, which has their length, with the bytes that a container holds.

    Raises:
        CheckpointError: The container is damaged, or not one of `out.size` bytes of `dtype`.
    """

def measure_dfloat11(weights: Iterable[npt.NDArray[np.uint8]]) -> tuple[list[int], list[int]] | None:
    """How often exponents occur in a group of bfloat16 weights (their bytes), and its buffers' sizes.

    None where the container cannot hold the weights (an exponent of 240 or more) or is no smaller.
    """

def encode_dfloat11(counts: list[int], weights: Iterable[npt.NDArray[np.uint8]]) -> _Buffers:
    """DFloat11's buffers of a group, of which one weight at a time is in memory.

    counts: as `measure_dfloat11` has given them.

    Returns: luts, encoded_exponent, sign_mantissa, output_positions (uint32), gaps, all as bytes.

    Raises:
        CheckpointError: The weights are not those that were measured.
    """

def decode_dfloat11(buffers: _Buffers, weights: list[npt.NDArray[np.uint8]]) -> None:
    """Fills weights (their bytes) from the buffers of their group.

    Raises:
        CheckpointError: The buffers do not fit each other or the weights.
    """
