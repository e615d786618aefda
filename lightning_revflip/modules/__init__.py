"""LightningModules that train in ways of their own."""

from lightning_revflip.modules.apd import APDModule
from lightning_revflip.modules.codes import SampleBankCodes, fit_codec
from lightning_revflip.modules.evolution import EvolutionModule

__all__ = ["APDModule", "EvolutionModule", "SampleBankCodes", "fit_codec"]
