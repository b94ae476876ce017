"""Text generation: greedy and sampled, batched, streamed, routed between two models."""

from archzoo.generation.decode import generate
from archzoo.generation.r2r import R2RRouter, r2r_generate
from archzoo.generation.sampling import probabilities

__all__ = ["R2RRouter", "generate", "probabilities", "r2r_generate"]
