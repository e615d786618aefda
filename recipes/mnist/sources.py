"""Whose predictions are put to the test: one network, dropout, samples, or what they became."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_revflip.apd import DistilledPosterior
from lightning_revflip.applications import (
    DropoutPredictor,
    NetworkPredictor,
    PosteriorPredictor,
    Predictor,
)
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.posterior import Posterior, SampleBank
from recipes.mnist.module import Classifier

Source = Literal["network", "dropout", "sample", "bank", "distilled"]


@dataclass(frozen=True)
class Sources:
    """Which predictions are put to the test.

    Attributes:
        names: `network`, the one under test; `dropout`, passes that drop its units as in training;
            `sample`, the last one that `SGLDSampler` collected, and `bank`, all of them;
            `distilled`, networks of a `DistilledPosterior`. None: all that there are, and `network`
            only without an `SGLDSampler`, which lets the network under test answer for many.
        num_samples: passes; samples of a bank, evenly spread, or all if it has fewer; networks that
            are generated.
        bank: folder of the samples; None: that of the `SGLDSampler` of the same Trainer.
        distilled: folder or file of the `DistilledPosterior`; None: `distilled` beside the bank.
        seed: of what is dropped and generated.
    """

    names: Sequence[Source] | None
    num_samples: int
    bank: str | None
    distilled: str | None
    seed: int

    def __post_init__(self) -> None:
        unknown = set(self.names or ()) - set(get_args(Source))
        if unknown or self.names == []:
            raise ValueError(
                f"sources must be some of {', '.join(get_args(Source))}, got {self.names}."
            )
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}.")

    def check(self, trainer: Trainer) -> None:
        """Raise if samples are asked for, but not where they are."""
        for name in self.names or ():
            needs_bank = name in ("sample", "bank")
            needs_folder = name == "distilled" and self.distilled is None
            if (needs_bank or needs_folder) and self._has_no_bank(trainer):
                raise ValueError(
                    f"It is not known where the {name} is: there is no SGLDSampler among the "
                    f"callbacks. Give {'distilled' if needs_folder else 'bank'}, the path."
                )

    def predictors(self, trainer: Trainer, model: Classifier) -> dict[str, Predictor]:
        """Predictors by source.

        Raises:
            ValueError: if a bank is empty, the network has no dropout, or samples are of another.
            FileNotFoundError: if there is no bank or `DistilledPosterior`.
        """
        names = self._available(trainer, model) if self.names is None else self.names
        return {name: self._predictor(name, trainer, model) for name in names}

    def _available(self, trainer: Trainer, model: Classifier) -> list[Source]:
        names: list[Source] = []
        if self._has_no_bank(trainer):
            names.append("network")
            if model.dropout > 0:
                names.append("dropout")
        else:
            names += ["sample", "bank"]
        if self.distilled is not None or (
            not self._has_no_bank(trainer) and self.distilled_path(trainer).exists()
        ):
            names.append("distilled")
        return names

    def _predictor(self, source: Source, trainer: Trainer, model: Classifier) -> Predictor:
        if source == "network":
            return NetworkPredictor(model)
        if source == "dropout":
            return DropoutPredictor(model, self.num_samples, self.seed)
        # A network of its own, as SGLDSampler may have replaced the one under test by an ensemble.
        network = nn.Sequential(OrderedDict(network=model.new_network())).to(model.device)
        if source == "distilled":
            posterior: Posterior = DistilledPosterior.load(self.distilled_path(trainer))
            random = torch.Generator().manual_seed(self.seed)
            return PosteriorPredictor(posterior, network, self.num_samples, generator=random)
        bank = SampleBank(self.bank_path(trainer))
        if len(bank) == 0:
            raise ValueError(f"{bank.path} has no sample yet. Train for more than burn_in steps.")
        count = 1 if source == "sample" else min(self.num_samples, len(bank))
        return PosteriorPredictor(bank, network, count)

    def _has_no_bank(self, trainer: Trainer) -> bool:
        return self.bank is None and sampler_of(trainer) is None

    def bank_path(self, trainer: Trainer) -> Path:
        """The folder of the samples."""
        if self.bank is not None:
            return Path(self.bank).expanduser()
        sampler = sampler_of(trainer)
        assert sampler is not None
        return sampler.bank_folder(trainer)

    def distilled_path(self, trainer: Trainer) -> Path:
        """The folder, or the file, of the `DistilledPosterior`."""
        if self.distilled is not None:
            return Path(self.distilled).expanduser()
        return self.bank_path(trainer).parent / "distilled"


def sampler_of(trainer: Trainer) -> SGLDSampler | None:
    """The callback that collects samples, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, SGLDSampler)), None)
