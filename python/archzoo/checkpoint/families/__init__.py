"""Hugging Face layouts, one file each; each defines `FAMILY` and is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from archzoo.checkpoint.keymap import Family


@cache
def families() -> dict[str, Family]:
    """All layouts by name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {m.FAMILY.name: m.FAMILY for m in modules if hasattr(m, "FAMILY")}
