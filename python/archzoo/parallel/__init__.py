"""Expert parallelism: the bookkeeping of its all-to-all, where experts go, and what a routing trace costs."""

from archzoo.parallel.dispatch import Layout, dispatch_layout, expert_parallel_splits, regroup
from archzoo.parallel.placement import Placement, eplb
from archzoo.parallel.traffic import Link, Traffic, decode_bound, simulate

__all__ = [
    "Layout",
    "Link",
    "Placement",
    "Traffic",
    "decode_bound",
    "dispatch_layout",
    "eplb",
    "expert_parallel_splits",
    "regroup",
    "simulate",
]
