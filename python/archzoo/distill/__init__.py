"""Distillation: losses, stages of a recipe, and the training loop."""

from archzoo.distill.losses import hidden_loss, linear_distill_loss, token_loss
from archzoo.distill.stages import ILD, KD, Recipe
from archzoo.distill.trainer import distill, perplexity

__all__ = ["ILD", "KD", "Recipe", "distill", "hidden_loss", "linear_distill_loss", "perplexity", "token_loss"]
