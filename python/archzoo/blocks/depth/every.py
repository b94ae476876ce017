"""The plain depth policy: a layer processes every token."""

from __future__ import annotations

from typing import Literal

from archzoo.blocks.registry import DepthConfig, Site


class EveryTokenConfig(DepthConfig):
    """No routing, no parameters."""

    kind: Literal["every"] = "every"

    def build(self, site: Site) -> None:
        return None
