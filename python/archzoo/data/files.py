"""Files that are written whole or not at all, also when the power fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)
    temporary.rename(path)
    sync_folder(path.parent)


def sync(file: Any) -> None:
    """Wait until what was written to a file is on its disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on its disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
