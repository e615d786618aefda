"""Evolution strategies whose members are perturbed by flipout: `strategy.py` has the method."""

from lightning_revflip.flipout.evolution.fitness import shape_fitness
from lightning_revflip.flipout.evolution.strategy import FlipoutES

__all__ = ["FlipoutES", "shape_fitness"]
