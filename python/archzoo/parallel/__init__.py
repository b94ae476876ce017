"""Expert parallelism without a cluster: where experts go, and what a routing trace costs there."""

from archzoo.parallel.placement import Placement, eplb
from archzoo.parallel.traffic import Link, Traffic, decode_bound, simulate

__all__ = ["Link", "Placement", "Traffic", "decode_bound", "eplb", "simulate"]
