"""Hugging Face style folders: safetensors shards through Rust, and the key maps of the families."""

from archzoo.checkpoint.folder import adopt_dtypes, match, read_config, read_into, write_model
from archzoo.checkpoint.plan import Rank, join, load_part, plan, read_part
from archzoo.checkpoint.shards import Part, Reader, Verified, load, open, save, shown, verify

__all__ = [
    "Part",
    "Rank",
    "Reader",
    "Verified",
    "adopt_dtypes",
    "join",
    "load",
    "load_part",
    "match",
    "open",
    "plan",
    "read_config",
    "read_into",
    "read_part",
    "save",
    "shown",
    "verify",
    "write_model",
]
