"""What a user writes: each of the four methods in miniature, with its types.

It is trained against an installed wheel, and checked by `mypy --strict`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_revflip
from lightning_revflip import (
    FLIPOUT_LAYERS,
    SGLD,
    CyclicalSchedule,
    DistilledPosterior,
    EvolutionStrategies,
    Flipout,
    FlipoutES,
    FlipoutLinear,
    Gaussian,
    LowRankGaussian,
    MemoryMonitor,
    MemoryReport,
    MultiplicativeGaussian,
    PosteriorDistillation,
    ReversibleRNN,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    RNGState,
    SampleBank,
    SGLDSampler,
    convert,
    distil,
    elbo_loss,
    kl,
    load_from_checkpoint,
    memory_report,
    mutual_information,
    predictive_entropy,
    sample_n,
    sampling,
)
from lightning_revflip.convert import ConversionSpec
from lightning_revflip.metrics import EnsembleCalibrationError, MutualInformation
from lightning_revflip.modules import APDModule

Batch = tuple[Tensor, Tensor]


class Classifier(L.LightningModule):
    """Says of 6 steps of 4 numbers of which class they are."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(inputs), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Recurrent(Classifier):
    def __init__(self, hidden_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rnn = nn.GRU(4, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output, _ = self.rnn(inputs)
        logits: Tensor = self.head(output[:, -1])
        return logits


class FeedForward(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits


class SumOfSquares(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.square().sum()


def data() -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(32, 6, 4)
    labels = (inputs.mean(dim=(1, 2)) > 0).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def train(model: L.LightningModule, folder: Path, *callbacks: Callback) -> Path:
    """One epoch.

    Returns:
        A checkpoint.
    """
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger(str(folder)),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data(), data())
    checkpoint = folder / "end.ckpt"
    trainer.save_checkpoint(checkpoint)
    return checkpoint


def reversible(folder: Path) -> None:
    model = Recurrent()
    checkpoint = train(model, folder, ReversibleRNN(max_forget_bits=2.0), MemoryMonitor())
    report: MemoryReport = memory_report(model)
    assert report.stored_bits < report.float_state_bits
    loaded: Recurrent = load_from_checkpoint(Recurrent, checkpoint)
    assert isinstance(loaded.rnn, RevGRU)

    plain = nn.Sequential(nn.LSTM(4, 8))
    spec: ConversionSpec = convert(plain, {nn.LSTM: RevLSTM, nn.GRU: RevGRU}, chunk_steps=4)
    assert spec.conversions[0].paths == ["0"]

    sequence = ReversibleSequence(nn.Linear(4, 4), RevGRU(4, 8), SumOfSquares())
    loss, _ = sequence(torch.randn(5, 2, 4))
    loss.backward()


def flipout(folder: Path) -> None:
    model = FeedForward()
    perturbation = Gaussian(init_std=0.05, prior_std=1.0)
    train(model, folder, Flipout(["network.*"], perturbation, predict_samples=3), RNGState())
    loss: Tensor = elbo_loss(torch.tensor(1.0), model, num_data=32, kl_weight=0.5)
    assert loss > 1
    assert kl(model) > 0
    with sampling(model, "mean"):
        model(torch.randn(2, 6, 4))

    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    convert(layers, FLIPOUT_LAYERS, perturbation=MultiplicativeGaussian(std=0.1))
    assert isinstance(layers[0], FlipoutLinear)
    draws: Tensor = sample_n(layers, torch.randn(3, 4), n=5)
    assert draws.shape == (5, 3, 2)


def evolution(folder: Path) -> None:
    train(
        FeedForward(),
        folder,
        EvolutionStrategies(
            sigma=0.05,
            population=8,
            targets=["network.*"],
            loss=nn.CrossEntropyLoss(reduction="none"),
        ),
    )
    model = nn.Linear(2, 1)
    strategy = FlipoutES(model, sigma=0.1, population=8)
    with strategy.members():
        outputs: Tensor = model(strategy.repeat(torch.randn(4, 2)))
    fitness: Tensor = strategy.gradient(-outputs.view(8, -1).mean(1))
    assert fitness.shape == (8,)
    strategy.next_generation()


def langevin(folder: Path) -> None:
    sampler = SGLDSampler(folder / "bank", num_data=32, burn_in=0, every_n_steps=1, max_samples=4)
    distillation = PosteriorDistillation(
        folder / "distilled",
        rank=1,
        buffer_size=3,
        every_n_samples=1,
        steps=2,
        module=APDModule(hidden=(4,)),
    )
    model = FeedForward()
    train(model, folder, sampler, distillation)
    bank = SampleBank(folder / "bank")
    inputs = torch.randn(5, 6, 4)
    probabilities: Tensor = bank.predict(model, inputs, 4)
    assert probabilities.shape == (4, 5, 3)
    uncertainty: Tensor = predictive_entropy(probabilities) - mutual_information(probabilities)
    assert uncertainty.shape == (5,)
    calibration, information = EnsembleCalibrationError(num_classes=3), MutualInformation()
    calibration.update(probabilities, torch.zeros(5, dtype=torch.long))
    information.update(probabilities)
    assert float(information.compute()) >= 0

    weights = nn.Parameter(torch.zeros(3))
    optimizer = SGLD([weights], lr=0.1, num_data=32, prior_precision=1.0)
    CyclicalSchedule(optimizer, cycle_steps=10)
    torch.autograd.backward(weights.square().sum())
    optimizer.step()


def distillation(folder: Path) -> None:
    bank = SampleBank(folder / "bank")
    gaussian = LowRankGaussian.fit(bank, rank=1)
    gaussian.save(folder / "gaussian")
    posterior: DistilledPosterior = distil(bank, rank=1, steps=2)
    posterior.export(folder / "posterior.safetensors")
    again = DistilledPosterior.load(folder / "posterior.safetensors")
    network = FeedForward()
    for each in (gaussian, again, DistilledPosterior.load(folder / "distilled")):
        assert each.predict(network, torch.randn(2, 6, 4), 3).shape == (3, 2, 3)


def main(folder: Path) -> None:
    """Run all of them.

    Args:
        folder: for what they write.
    """
    missing = [name for name in lightning_revflip.__all__ if not hasattr(lightning_revflip, name)]
    assert not missing, missing
    torch.manual_seed(0)
    reversible(folder / "reversible")
    flipout(folder / "flipout")
    evolution(folder / "evolution")
    langevin(folder / "langevin")
    distillation(folder / "langevin")
    print(f"lightning_revflip {lightning_revflip.__version__} in {lightning_revflip.__file__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
