"""Stochastic gradient Markov chain Monte Carlo: samples of the posterior at the cost of training.

Plain torch, without Lightning. `base.py` states what is sampled, `optimizers.py` has the samplers
and `schedules.py` their step sizes, `chains.py` runs many chains of a small network at once, and
`diagnostics.py` says how well chains have mixed.
"""

from lightning_revflip.sgld.base import LangevinOptimizer, Moving
from lightning_revflip.sgld.chains import ParallelChains, log_mean_softmax
from lightning_revflip.sgld.optimizers import PSGLD, SGHMC, SGLD
from lightning_revflip.sgld.schedules import CyclicalSchedule, PolynomialSchedule

__all__ = [
    "PSGLD",
    "SGHMC",
    "SGLD",
    "CyclicalSchedule",
    "LangevinOptimizer",
    "Moving",
    "ParallelChains",
    "PolynomialSchedule",
    "log_mean_softmax",
]
