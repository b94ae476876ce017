"""Text generation: greedy and sampled, batched, streamed."""

from archzoo.generation.generate import generate
from archzoo.generation.sampling import probabilities

__all__ = ["generate", "probabilities"]
