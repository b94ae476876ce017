"""Two-way key maps: which regions of a native parameter are which tensors of a Hugging Face file.

A rule is data. Its native side names one parameter of the zoo; its parts name the file's tensors that,
concatenated on dim 0, make it up. `{i}` is the layer; `{e}` in the parts stacks one tensor per expert on a
new first dim. Reading fills the regions, writing emits them, so save undoes load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from archzoo.configuration import ModelConfig


class Region(NamedTuple):
    """One tensor of the file: a view of a native parameter in its element order, and its shape there.

    With `ranges` (start, stop of each dim) the view is only that part of the file's tensor.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def part(self) -> tuple[int, ...]:
        """The shape in the file of what the view is."""
        return tuple(stop - start for start, stop in self.ranges) if self.ranges else self.shape


class Rule:
    """native parameter pattern <-> file tensor patterns (concatenated on dim 0 when several).

    For fused experts [E, R, d]: `transpose` stores them as [E, d, R]; `interleave` stores the rows of the
    two halves of R (gate, up) in turns; `stacked` concatenates the parts on R, dim 1.
    """

    def __init__(
        self,
        native: str,
        *parts: str,
        transpose: bool = False,
        interleave: bool = False,
        stacked: bool = False,
    ) -> None:
        self.native, self.parts, self.dim = native, parts, int(stacked)
        self.transpose, self.interleave = transpose, interleave
        self.pattern = re.compile(re.escape(native).replace(r"\{i\}", r"(\d+)") + r"\Z")

    def first(self, layer: str) -> str:
        """The name of the first of the file's tensors."""
        return self.parts[0].replace("{i}", layer).replace("{e}", "0")

    def regions(self, layer: str, tensor: Tensor) -> list[Region]:
        """The views of `tensor` that are the file's tensors."""
        parts = [part.replace("{i}", layer) for part in self.parts]
        if "{e}" not in parts[0]:
            pieces = tensor.chunk(len(parts), self.dim) if len(parts) > 1 else (tensor,)
            return [self._laid_out(p, v) for p, v in zip(parts, pieces, strict=True)]
        views = tensor.unflatten(1, (len(parts), -1)).flatten(0, 1)  # one call for all: there may be many
        shape = tuple(views.shape[1:])
        names = (part.replace("{e}", str(e)) for e in range(len(tensor)) for part in parts)
        return [Region(name, view, shape) for name, view in zip(names, views.unbind(), strict=True)]

    def _laid_out(self, name: str, view: Tensor) -> Region:
        shape = (view.transpose(1, 2) if self.transpose else view).shape
        if self.interleave:
            view = view.unflatten(1, (2, -1)).transpose(1, 2)  # [E, R/2, 2, ...]
        if self.transpose:
            view = view.movedim(-1, 1)
        return Region(name, view, tuple(shape))


@dataclass(frozen=True)
class Family:
    """One Hugging Face layout: who claims a folder, its config files, its key rules.

    `claims(files)` looks at the folder's parsed JSON files; `read(files)` gives ModelConfig data;
    `write(config)` gives the JSON files, at most `files`. `dropped` are regexes of tensors that are derived,
    not stored. `beyond` names the tensor (with `{i}`) by which a layer past the last one is known to be a
    multi-token prediction module, whose rules are those of a layer; `copies` are the tensors in it that
    repeat the embedding and the head. `aliases` are rules of other names that are read, not written.
    """

    name: str
    claims: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Sequence[Rule] = ()
    aliases: Sequence[Rule] = ()
    dropped: Sequence[str] = field(default=())
    beyond: str | None = None
    copies: Sequence[str] = ()
    files: Sequence[str] = ("config.json",)

    def regions(
        self, name: str, tensor: Tensor, stored: Collection[str] = (), layers: int = 0
    ) -> list[Region]:
        """The file tensors of native parameter `name` as views of `tensor`; no rule keeps the name.

        An alias is taken where its names are `stored`. Prediction module k is layer `layers` + k.
        """
        if self.beyond is not None and (module := re.match(r"mtp\.(\d+)\.(?:layer\.)?", name)):
            name = f"layers.{layers + int(module[1])}.{name[module.end() :]}"
        for rule in self.aliases:
            if match := rule.pattern.match(name):
                layer = match[1] if match.groups() else ""
                regions = rule.regions(layer, tensor) if rule.first(layer) in stored else []
                if regions and all(region.name in stored for region in regions):
                    return regions
        for rule in self.rules:
            if match := rule.pattern.match(name):
                return rule.regions(match[1] if match.groups() else "", tensor)
        return [Region(name, tensor, tuple(tensor.shape))]

    def ignored(self, stored: Collection[str], layers: int) -> set[str]:
        """The stored tensors that have no place in a model of that many layers, and need none.

        Prediction modules that the model has count as layers.
        """
        out = {name for name in stored if any(re.fullmatch(pattern, name) for pattern in self.dropped)}
        i = layers
        while self.beyond is not None and self.beyond.replace("{i}", str(i)) in stored:
            prefix = self.beyond.partition("{i}")[0] + f"{i}."
            out |= {name for name in stored if name.startswith(prefix)}
            i += 1
        return out
