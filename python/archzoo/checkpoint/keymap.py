"""Two-way key maps: which regions of a native parameter are which tensors of a Hugging Face file.

A rule is data. Its native side names one parameter of the zoo; its parts name the file's tensors that,
concatenated on dim 0, make it up. `{i}` is the layer; `{e}` in the parts stacks one tensor per expert on a
new first dim. Reading fills the regions, writing emits them, so save undoes load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from archzoo.configuration import ModelConfig


class Rule:
    """native parameter pattern <-> file tensor patterns (concatenated on dim 0 when several)."""

    def __init__(self, native: str, *parts: str) -> None:
        self.native, self.parts = native, parts
        self.pattern = re.compile(re.escape(native).replace(r"\{i\}", r"(\d+)") + r"\Z")

    def regions(self, layer: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """(file tensor name, view of `tensor`) for each part."""
        if "{e}" not in self.parts[0]:
            pieces = tensor.chunk(len(self.parts)) if len(self.parts) > 1 else (tensor,)
            return [(p.replace("{i}", layer), v) for p, v in zip(self.parts, pieces, strict=True)]
        out = []
        for e, expert in enumerate(tensor):
            for part, view in zip(self.parts, expert.chunk(len(self.parts)), strict=True):
                out.append((part.replace("{i}", layer).replace("{e}", str(e)), view))
        return out


@dataclass(frozen=True)
class Family:
    """One Hugging Face layout: who claims a folder, its config files, its key rules.

    `claims(files)` looks at the folder's parsed JSON files; `read(files)` gives ModelConfig data;
    `write(config)` gives the JSON files, at most `files`. `dropped` are regexes of tensors that are derived,
    not stored.
    """

    name: str
    claims: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Sequence[Rule] = ()
    dropped: Sequence[str] = field(default=())
    files: Sequence[str] = ("config.json",)

    def regions(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The file tensors of native parameter `name` as views of `tensor`; no rule keeps the name."""
        for rule in self.rules:
            if match := rule.pattern.match(name):
                return rule.regions(match[1] if match.groups() else "", tensor)
        return [(name, tensor)]

    def drops(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)
