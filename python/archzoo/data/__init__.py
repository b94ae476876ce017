"""Token sequences for training, and text that every machine has."""

from archzoo.data.text import python_manual_text, read_text
from archzoo.data.tokens import TokenBlocks, tokenize_text

__all__ = ["TokenBlocks", "python_manual_text", "read_text", "tokenize_text"]
