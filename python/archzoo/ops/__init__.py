"""The functions that blocks call: a reference definition each, and a choice of faster backends."""

from archzoo.ops.backend import backend, why

__all__ = ["backend", "why"]
