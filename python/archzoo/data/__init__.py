"""Token sequences for training, the packs they are read from, and text that every machine has."""

from archzoo.data.bpe import train_bpe
from archzoo.data.pack import PackManifest, verify_pack, write_pack
from archzoo.data.packed import Pack, PackedDataset, collate
from archzoo.data.text import python_manual_text, read_text
from archzoo.data.tokens import TokenBlocks, tokenize_text

__all__ = [
    "Pack",
    "PackManifest",
    "PackedDataset",
    "TokenBlocks",
    "collate",
    "python_manual_text",
    "read_text",
    "tokenize_text",
    "train_bpe",
    "verify_pack",
    "write_pack",
]
