"""Text generation: greedy and sampled, batched, streamed."""

from archzoo.generation.decode import generate
from archzoo.generation.sampling import probabilities

__all__ = ["generate", "probabilities"]
