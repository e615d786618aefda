"""Bayesian regression as an ordinary LightningModule, and the same training as a plain loop."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_revflip.callbacks import Flipout
from lightning_revflip.callbacks._noise import stream_seed
from lightning_revflip.flipout import NoiseSource, PerturbedLayer
from tests.helpers.models import quiet_trainer

Batch = Sequence[Tensor]

SEED = 3


class Regressor(LightningModule):
    """A small network, half the mean squared error as negative log-likelihood."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return 0.5 * F.mse_loss(self(x), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def data(examples: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Stream(IterableDataset):
    """The examples without a length."""

    def __iter__(self):
        return iter(data())


def loader(batch_size: int = 4, examples: int = 16) -> DataLoader:
    return DataLoader(data(examples), batch_size=batch_size)


def weights(model: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fitted(
    folder: Path, callback: Flipout, make: Callable[[], Regressor] = Regressor, **kwargs: object
) -> Regressor:
    """A model that a Trainer fitted, seeded with SEED."""
    seed_everything(SEED)
    model = make()
    quiet_trainer(folder, callbacks=[callback], **kwargs).fit(model, loader())
    return model


def assert_same_weights(model: LightningModule, other: LightningModule, atol=1e-6) -> None:
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=atol)


def explicit_divergence(model: nn.Module, prior_std: float = 1.0) -> Tensor:
    """The divergence by torch.distributions, every weight of the model once."""
    weights = {
        weight.mean: weight.spread[0]
        for layer in perturbed_layers(model)
        for weight in layer.perturbed_weights()
    }
    return torch.stack(
        [
            kl_divergence(Normal(mean, F.softplus(rho)), Normal(0.0, prior_std)).sum()
            for mean, rho in weights.items()
        ]
    ).sum()


def perturbed_layers(model: nn.Module) -> list[PerturbedLayer]:
    return [module for module in model.modules() if isinstance(module, PerturbedLayer)]


def draw_from(model: nn.Module, seed: int, rank: int = 0) -> NoiseSource:
    """Give a model the noise that it has in a Trainer seeded with `seed`."""
    source = NoiseSource(torch.Generator().manual_seed(stream_seed(seed, rank)))
    for layer in perturbed_layers(model):
        layer.noise_source = source
    return source


def train_explicitly(
    model: Regressor,
    windows: Sequence[Sequence[Batch]],
    kl_weights: Sequence[float],
    num_data: int,
    clip: float | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Descend on mean loss + kl_weight * KL / num_data, with one step for each window of batches.

    Args:
        model: converted, drawing from the source wanted.
        windows: the batches over which gradients are accumulated.
        kl_weights: of each step.
        num_data: as for the callback.
        clip: norm to which the gradient of the sum is clipped.
        context: the precision in which losses are computed.
    """
    model.train()
    optimizer = model.configure_optimizers()
    for batches, weight in zip(windows, kl_weights, strict=True):
        optimizer.zero_grad()
        with context():
            losses = [model.loss(batch) for batch in batches]
        total = torch.stack(losses).mean() + explicit_divergence(model) * weight / num_data
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
