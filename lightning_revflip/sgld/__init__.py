"""Stochastic gradient Markov chain Monte Carlo: samples of the posterior at the cost of training.

Knows tensors only; the Lightning face is `lightning_revflip.callbacks.SGLDSampler`.
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
