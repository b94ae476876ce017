"""Text to train and evaluate on: a user's file, or the Python manual that ships with the interpreter."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import Literal

from archzoo.errors import InputError


def python_manual_text(split: Literal["train", "valid"]) -> str:
    """English prose from the language manual in the standard library (`pydoc_data.topics`, 0.4 MB and more).

    A topic belongs to "valid" when the hash of its name says so (one in ten), so the split is stable. Topics
    repeat one another: a paragraph of an earlier topic is left out, and one that any training topic contains
    is never in "valid". Topics are separated by a blank line.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    train = sorted(name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10)
    seen: set[str] = set()
    documents: dict[str, list[str]] = {"train": [], "valid": []}
    for name in train + sorted(topics.keys() - set(train)):
        fresh = [p for p in re.split(r"\n\s*\n", topics[name].strip()) if p.strip() not in seen]
        seen.update(p.strip() for p in fresh)
        if fresh:
            documents["train" if name in train else "valid"].append("\n\n".join(fresh))
    return "\n\n".join(documents[split]) + "\n"


def read_text(path: str | Path) -> str:
    """A UTF-8 text file with its line ends as they are."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start}") from None
