"""Hugging Face style folders: safetensors shards through Rust, and the key maps of the families."""

from archzoo.checkpoint.folder import adopt_dtypes, match, read_config, read_into, write_model
from archzoo.checkpoint.plan import Rank, join, load_part, plan, read_part
from archzoo.checkpoint.saver import AsyncSaver, Retention
from archzoo.checkpoint.shards import (
    Contents,
    Part,
    Reader,
    Verified,
    copied,
    load,
    open,
    save,
    shown,
    verify,
)
from archzoo.checkpoint.training import load_training, read_state, training_state

__all__ = [
    "AsyncSaver",
    "Contents",
    "Part",
    "Rank",
    "Reader",
    "Retention",
    "Verified",
    "adopt_dtypes",
    "copied",
    "join",
    "load",
    "load_part",
    "load_training",
    "match",
    "open",
    "plan",
    "read_config",
    "read_into",
    "read_part",
    "read_state",
    "save",
    "shown",
    "training_state",
    "verify",
    "write_model",
]
