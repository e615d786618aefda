"""The Lightning face: callbacks to attach to a `Trainer`."""

from lightning_revflip.callbacks.distillation import PosteriorDistillation
from lightning_revflip.callbacks.distillation_report import DistillationReport
from lightning_revflip.callbacks.evolution import EvolutionStrategies
from lightning_revflip.callbacks.flipout import Flipout
from lightning_revflip.callbacks.memory import MemoryMonitor
from lightning_revflip.callbacks.reversible import ReversibleRNN
from lightning_revflip.callbacks.rng_state import RNGState
from lightning_revflip.callbacks.sampling import SGLDSampler

__all__ = [
    "DistillationReport",
    "EvolutionStrategies",
    "Flipout",
    "MemoryMonitor",
    "PosteriorDistillation",
    "RNGState",
    "ReversibleRNN",
    "SGLDSampler",
]
