"""Checks of what `SGLDSampler` is given, and of the Trainer that it joins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_revflip.callbacks._conversion import callbacks_of
from lightning_revflip.callbacks._sampler_swap import SAMPLERS
from lightning_revflip.callbacks.evolution import EvolutionStrategies
from lightning_revflip.callbacks.flipout import Flipout
from lightning_revflip.modules.evolution import EvolutionModule
from lightning_revflip.posterior.policies import POLICIES
from lightning_revflip.sgld.checks import check_num_data, check_temperature

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LEAST = {"burn_in": 0, "every_n_steps": 1, "max_samples": 1, "chains": 1, "eval_samples": 0}
_CHOICES = {"sampler": tuple(SAMPLERS), "dtype": tuple(DTYPES), "policy": POLICIES}
_OWN_ARGUMENTS = {"params", "lr", "num_data", "temperature", "prior_precision", "generator"}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise unless the arguments of `SGLDSampler`, by name, are in range and fit each other.

    Raises:
        ValueError: naming the argument, what it is and what it may be.
    """
    _check_num_data(settings["num_data"])
    check_temperature(settings["temperature"])
    for name, least in _LEAST.items():
        value = settings[name]
        if name == "max_samples" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}.")
    for name, allowed in _CHOICES.items():
        if settings[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {settings[name]!r}.")
    _check_options(settings)
    if settings["chains"] > 1 and settings["network"] is None:
        raise ValueError(
            f"chains={settings['chains']} needs to know which part of the module to copy. Give its "
            "path, for example network='network'."
        )


def _check_num_data(num_data: Any) -> None:
    if num_data is None:
        raise ValueError(
            "num_data is missing: the number of training examples sets the scale of prior and "
            "noise. Give SGLDSampler(num_data=len(train_dataset)), or num_data='auto' to take it "
            "from the training data loader."
        )
    if num_data != "auto":
        check_num_data(num_data)


def _check_options(settings: Mapping[str, Any]) -> None:
    options = settings["sampler_options"] or {}
    if own := sorted(_OWN_ARGUMENTS & set(options)):
        raise ValueError(
            f"sampler_options has {', '.join(own)}, which SGLDSampler sets: lr is that of the "
            "module's optimizer, the generator follows from seed, and the others are arguments of "
            "SGLDSampler."
        )
    adapts = settings["burn_in"] > 0 or "adaptation_steps" in options
    if settings["sampler"] == "psgld" and not adapts:
        raise ValueError(
            "sampler='psgld' adapts its steps during the burn-in, got burn_in=0. Give a burn-in, "
            "or say how long it adapts: sampler_options={'adaptation_steps': 1000}."
        )


def check_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise unless a Trainer, its callbacks and the way of training fit `SGLDSampler`.

    Raises:
        MisconfigurationException: naming what does not fit.
    """
    if any(isinstance(each, Flipout) for each in callbacks_of(trainer)):
        raise MisconfigurationException(
            "the Trainer has both SGLDSampler, which samples the weights, and Flipout, which "
            "trains a distribution of them. These are two posteriors of one module: use one."
        )
    evolves = any(isinstance(each, EvolutionStrategies) for each in callbacks_of(trainer))
    if evolves or isinstance(pl_module, EvolutionModule):
        raise MisconfigurationException(
            "SGLDSampler samples by the gradient of the loss, and evolution strategies give the "
            "optimizer an estimate of another gradient, so the samples would be of no posterior. "
            "Train by backpropagation."
        )
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"SGLDSampler needs all parameters in each process, got {type(strategy).__name__}. Use "
            "one device, strategy='ddp' or IndependentChainsStrategy()."
        )


def check_schedule(pl_module: LightningModule) -> None:
    """Raise unless Lightning would step a schedule that the callback adds.

    Raises:
        MisconfigurationException: with manual optimization.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "SGLDSampler has a schedule, but with manual optimization the module calls its "
            "schedules itself. Return it from configure_optimizers, and call "
            "self.lr_schedulers().step() after each step."
        )


def warn_of_no_samples(trainer: Trainer, pl_module: LightningModule, first_step: int) -> None:
    """Warn if training will end before the first sample.

    Nothing is said where the number of steps is not known before: of streams of data, and where the
    module steps its optimizer itself.
    """
    planned = trainer.estimated_stepping_batches
    if pl_module.automatic_optimization and 0 < planned < first_step:
        rank_zero_warn(
            f"There will be no samples: training ends at step {planned:.0f}, and the first is "
            f"taken at step {first_step}. Lower burn_in, or train longer."
        )
