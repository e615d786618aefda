"""What `SGLDSampler` learns from the Trainer that it is in."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import Trainer

from lightning_revflip.callbacks._configured_optimizer import parts_of
from lightning_revflip.callbacks._num_data import resolve_num_data
from lightning_revflip.sgld import CyclicalSchedule, LangevinOptimizer
from lightning_revflip.strategies import IndependentChainsStrategy, chain_seed


def independent(trainer: Trainer) -> bool:
    """Whether each process has a chain of its own."""
    return isinstance(trainer.strategy, IndependentChainsStrategy)


def sampler_of(trainer: Trainer) -> LangevinOptimizer:
    """The optimizer that samples, once it is made."""
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, LangevinOptimizer)
    return optimizer


def collects(trainer: Trainer) -> bool:
    """Whether cyclical schedules, if there are any, sample in the step just taken."""
    schedules = [part for each in trainer.lr_scheduler_configs for part in parts_of(each.scheduler)]
    return all(each.sampling for each in schedules if isinstance(each, CyclicalSchedule))


def training_examples(trainer: Trainer, num_data: int | Literal["auto"] | None) -> int:
    """The number of training examples, as given or that of the training data loader."""
    # `fit_loop.setup_data` would begin to read, and draw what RNGState restores only later.
    loader = trainer.fit_loop._data_source.dataloader()
    return resolve_num_data(None if num_data == "auto" else num_data, loader, "SGLDSampler")


def noise_seed(trainer: Trainer, seed: int | None) -> int:
    """The same in processes that hold one chain, and different in those that do not.

    Args:
        trainer: about to train.
        seed: as given; None: a draw of torch's global generator.
    """
    if seed is not None:
        seed = chain_seed(seed, trainer.global_rank if independent(trainer) else 0)
        return chain_seed(seed, trainer.global_step)  # another one where `fit` is called again
    drawn = int(torch.randint(2**62, ()))  # independent chains have generators of their own
    return drawn if independent(trainer) else int(trainer.strategy.broadcast(drawn))
