"""Hugging Face style folders: safetensors shards through Rust, and the key maps of the families."""

from archzoo.checkpoint.folder import adopt_dtypes, match, read_config, read_into, write_model
from archzoo.checkpoint.shards import Reader, load, open, save

__all__ = [
    "Reader",
    "adopt_dtypes",
    "load",
    "match",
    "open",
    "read_config",
    "read_into",
    "save",
    "write_model",
]
