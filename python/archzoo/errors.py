"""The one hierarchy of errors: each message names the thing, what was expected and what was found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArchzooError(Exception):
    """Base of every error that archzoo raises on purpose."""


class UnknownNameError(ArchzooError, KeyError):
    """A name that the zoo does not know."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(names[:12])}"
        super().__init__(f"unknown {what} '{name}'{hint}")

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(ArchzooError, ValueError):
    """A configuration that cannot be built."""


class InputError(ArchzooError, ValueError):
    """Arguments of a call that do not fit the model."""


class CacheError(ArchzooError, RuntimeError):
    """A cache operation that the state does not allow."""


class CheckpointError(ArchzooError, OSError):
    """A checkpoint folder or file that is damaged or does not fit the model."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class PackError(ArchzooError, OSError):
    """A folder of packed tokens that is damaged or that cannot take what is written to it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TokenizerError(ArchzooError, ValueError):
    """A tokenizer file that is damaged or asks for something that is not supported."""
