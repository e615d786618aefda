"""`DistillationReport`: what the networks of an `APDModule` predict, and how they look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_revflip.callbacks._distillation_figures import marginals_figure, projections_figure
from lightning_revflip.callbacks.loggers import figure_loggers, log_figure
from lightning_revflip.modules.apd import APDModule
from lightning_revflip.posterior import negative_log_likelihood, predictive_entropy

_SEED = 0


class DistillationReport(Callback):
    """Looks at the networks that an `APDModule` generates, after each validation.

    Given a network and data it logs `apd/accuracy`, `apd/nll` and `apd/entropy` of the mean
    prediction of `num_networks` generated networks, the latter two in nats. Loggers that take
    figures (WandbLogger, TensorBoardLogger) get `apd/projections`, generated codes against those
    held out, and `apd/marginals`, the same for single weights; that needs matplotlib.

    Args:
        network: a classifier with the parameters that were sampled, which computes with the
            generated ones; None: nothing is predicted.
        data: a loader of inputs and classes, or a data module, of which the validation data are
            used.
        num_networks: number of generated networks, the same in each validation.

    Raises:
        ValueError: for only one of `network` and `data`; at the start of training, for a network of
            another architecture.
        MisconfigurationException: at the start of training, for another module than `APDModule`.

    Examples:
        >>> network = Classifier(network="mlp", hidden=[100])  # doctest: +SKIP
        >>> report = DistillationReport(network, test_loader)  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[report])  # doctest: +SKIP
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        # Not any iterable: in a configuration file that would be a class with its arguments, too.
        data: LightningDataModule | DataLoader[Any] | None = None,
        num_networks: int = 20,
    ) -> None:
        if (network is None) != (data is None):
            given = "a network without data" if data is None else "data without a network"
            raise ValueError(f"DistillationReport got {given}, and predicts with both or neither.")
        if num_networks < 1:
            raise ValueError(f"num_networks must be at least 1, got {num_networks}.")
        self.network = network
        self.data = data
        self.num_networks = num_networks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, APDModule):
            raise MisconfigurationException(
                f"DistillationReport reports on an APDModule, got {type(pl_module).__name__}."
            )
        if self.network is not None:
            pl_module.codec.layout.check_module(self.network)
        if isinstance(self.data, LightningDataModule):
            self.data.prepare_data()
            self.data.setup("validate")
            self.data = self.data.val_dataloader()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.network is None:
            return
        assert isinstance(pl_module, APDModule)
        assert self.data is not None
        assert not isinstance(self.data, LightningDataModule)
        metrics = evaluate(pl_module, self.network, self.data, self.num_networks)
        logged = {f"apd/{name}": value for name, value in metrics.items()}
        pl_module.log_dict(logged, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        loggers = figure_loggers(trainer)
        if not loggers:
            return
        assert isinstance(pl_module, APDModule)
        assert pl_module.validation_codes is not None
        real, generated = pl_module.validation_codes
        random = torch.Generator().manual_seed(_SEED)
        samples, networks = (pl_module.codec.decode(codes, random) for codes in (real, generated))
        figures = {
            "apd/projections": projections_figure(real, generated),
            "apd/marginals": marginals_figure(samples, networks, pl_module.codec.layout),
        }
        for logger in loggers:
            for name, figure in figures.items():
                log_figure(logger, name, figure, trainer.global_step)


def evaluate(
    module: APDModule, network: nn.Module, data: Iterable[Any], num_networks: int
) -> dict[str, float]:
    """How well generated networks predict together.

    Args:
        module: generates them, the same ones at each call as long as it is not trained.
        network: computes with their parameters, on its own device.
        data: batches of inputs and classes.
        num_networks: how many to generate.

    Returns:
        `accuracy`, `nll` (of the mean of their probabilities, in nats) and `entropy` (of that mean,
        in nats): means over the examples.
    """
    posterior = module.posterior()
    device = next(network.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)
    examples = 0
    for x, y in data:
        random = torch.Generator().manual_seed(_SEED)
        probs = posterior.predict(network, x.to(device), num_networks, generator=random).cpu()
        totals += _sums(probs, y.cpu())
        examples += len(y)
    if examples == 0:
        raise ValueError("the data of DistillationReport have no examples.")
    names = ("accuracy", "nll", "entropy")
    return dict(zip(names, (totals / examples).tolist(), strict=True))


def _sums(probs: Tensor, y: Tensor) -> Tensor:
    correct = (probs.double().mean(0).argmax(1) == y).sum()
    nll = negative_log_likelihood(probs, y).sum()
    return torch.stack([correct, nll, predictive_entropy(probs).sum()]).double()
