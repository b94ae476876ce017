"""GGUF files of the architecture "llama" as Hugging Face stores them: names, order of rows, config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo import _rust
from archzoo.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
STAGE = 1 << 27  # bytes read at once into memory of their own
Ranges = tuple[tuple[int, int], ...]


class GgufFile:
    """An open GGUF file whose tensors go by their Hugging Face names.

    Quantised tensors are float32. llama.cpp stores the rows of q and k so that neighbours rotate together;
    here the two rotary halves of a head come one after the other: shapes do not tell the two apart,
    perplexity does.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._reader = _rust.GgufReader(str(path))
        except _rust.CheckpointError as error:
            raise CheckpointError(str(error)) from None
        self.metadata = self._reader.metadata
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: architecture '{architecture}' is not supported, expected 'llama'")
        heads = self._key("attention.head_count")
        turned = {"attn_q": heads, "attn_k": self._key("attention.head_count_kv", heads)}
        self._tensors = {}
        self._heads = {}
        for name, dtype, shape, _ in self._reader.tensors():
            key = self._hf_name(name)
            self._tensors[key] = (name, dtype, tuple(shape))
            if count := turned.get(name.split(".")[-2]):
                if not shape or shape[0] % (2 * count):
                    raise CheckpointError(
                        f"{path}: tensor '{name}' has shape {list(shape)}, expected rows of {count} heads"
                    )
                self._heads[key] = count
        self.bytes_read = 0
        self.unchecked_files = [self.path]

    def _key(self, key: str, *default: Any) -> Any:
        """A value of the metadata, by its name within the architecture."""
        value = self.metadata.get(f"llama.{key}", *default)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lacks 'llama.{key}'")
        return value

    def _hf_name(self, name: str) -> str:
        match name.split("."):
            case [stem, suffix] if stem in OUTER:
                return f"{OUTER[stem]}.{suffix}"
            case ["blk", layer, part, suffix] if part in INNER:
                return f"model.layers.{layer}.{INNER[part]}.{suffix}"
        raise CheckpointError(f"{self.path}: tensor '{name}' has no place in a model of architecture 'llama'")

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        if self._key("expert_count", 0):
            raise CheckpointError(f"{self.path}: 'llama.expert_count' is not supported, expected 0")
        scaling = self._key("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise CheckpointError(
                f"{self.path}: rope scaling '{scaling}' is not supported, expected 'linear'"
            )
        factor = self._key("rope.scaling.factor", 1.0)
        linear = {"rope_type": "linear", "factor": factor} if scaling == "linear" and factor != 1 else None
        hidden, heads = self._key("embedding_length"), self._key("attention.head_count")
        head_dim = self._key("attention.key_length", self._key("rope.dimension_count", hidden // heads))
        if self._key("rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(
                f"{self.path}: expected 'llama.rope.dimension_count' = {head_dim}, the head's"
            )
        embed = self._tensors.get("model.embed_tokens.weight")
        if embed is None:
            raise CheckpointError(f"{self.path}: tensor 'token_embd.weight' is missing")
        ids = {
            f"{theirs}_token_id": self.metadata[key]
            for ours, theirs in {"bos": "bos", "eos": "eos", "padding": "pad"}.items()
            if (key := f"tokenizer.ggml.{ours}_token_id") in self.metadata
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": embed[2][0],
            "hidden_size": hidden,
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._key("context_length"),
            "rope_theta": float(self._key("rope.freq_base", 10000.0)),
            "rope_scaling": linear,
            # A float32 that was once written in decimal.
            "rms_norm_eps": float(f"{self._key('attention.layer_norm_rms_epsilon'):.6g}"),
            "hidden_act": "silu",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
            "attention_dropout": 0.0,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "use_cache": True,
            **ids,
        }

    def infos(self) -> dict[str, tuple[str, tuple[int, ...], str, int | None]]:
        """Per Hugging Face name: dtype once read, shape, path of the file, None for where it is in it."""
        return {
            name: (dtype, shape, str(self.path), None) for name, (_, dtype, shape) in self._tensors.items()
        }

    def verify(self) -> list[str]:
        """Nothing: the format has no checksums."""
        return []

    def fill(self, parts: Sequence[tuple[str, Tensor, Ranges]]) -> None:
        """Read tensors, or boxes of them, into contiguous CPU tensors of any dtype."""
        batch: list[tuple[str, Tensor, Ranges]] = []
        size = 0
        for part in parts:
            batch.append(part)
            _, dtype, shape = self._tensors[part[0]]
            size += math.prod(shape) * DTYPES[dtype].itemsize
            if size > STAGE:
                self._fill_batch(batch)
                batch, size = [], 0
        self._fill_batch(batch)

    def _fill_batch(self, parts: Sequence[tuple[str, Tensor, Ranges]]) -> None:
        requests, wholes = [], []
        for name, out, ranges in parts:
            own, stored, shape = self._tensors[name]
            direct = not ranges and out.dtype == DTYPES[stored]
            wholes.append(out if direct else torch.empty(shape, dtype=DTYPES[stored]))
            requests.append((own, wholes[-1].reshape(-1).view(torch.uint8).numpy()))
        try:
            self._reader.read_into(requests)
        except _rust.CheckpointError as error:
            raise CheckpointError(str(error)) from None
        for (name, out, ranges), whole in zip(parts, wholes, strict=True):
            self.bytes_read += whole.nbytes
            if name in self._heads:
                whole.copy_(_halves(whole, self._heads[name]))
            if whole is not out:
                out.copy_(whole[tuple(slice(*r) for r in ranges)])


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (2i, 2i + 1) of each head that rotate together -> first halves, then second halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
