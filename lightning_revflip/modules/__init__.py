"""LightningModules that train in ways of their own."""

from lightning_revflip.modules.evolution import EvolutionModule

__all__ = ["EvolutionModule"]
