"""The zoo's own layout: the whole ModelConfig in config.json, native parameter names."""

from __future__ import annotations

from typing import Any

from archzoo.checkpoint.keymap import Family
from archzoo.configuration import ModelConfig


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"config.json": {"model_type": "archzoo", "archzoo": config.model_dump()}}


FAMILY = Family(
    name="archzoo",
    read=lambda files: dict(files["config.json"]["archzoo"]),
    write=_write,
)
