"""Text for the tokenization benchmarks: a file, or what every environment has, documents of mixed lengths."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from archzoo.data import python_manual_text, read_text


def documents(megabytes: float, file: str | None = None) -> list[str]:
    """About that much of a text file cut at blank lines, or of the Python manual and installed sources."""
    limit = int(megabytes * 1e6)
    if file is not None:
        return _first(read_text(file)[:limit].split("\n\n"), limit)
    folders = [sysconfig.get_paths()[key] for key in ("stdlib", "purelib")]
    sources = (path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sources)
    found = [python_manual_text("train"), python_manual_text("valid")]
    size = sum(map(len, found))
    for text in texts:
        if size >= limit:
            break
        found.append(text)
        size += len(text)
    return _first(found, limit)


def _first(texts: list[str], limit: int) -> list[str]:
    kept, size = [], 0
    for text in texts:
        if text and size < limit:
            kept.append(text)
            size += len(text.encode())
    return kept
