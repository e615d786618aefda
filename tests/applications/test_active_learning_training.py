"""`LightningTraining`: any LightningModule trains anew in each round, with a Trainer of its own."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revflip.applications import (
    ActiveLearning,
    DropoutPredictor,
    LightningTraining,
    NetworkPredictor,
    Pool,
    PosteriorPredictor,
)
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.posterior import LowRankGaussian, SampleBank

SIZE = 80
STEPS = 60


class Classifier(LightningModule):
    """A small network of the points below."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(SIZE) % 3
    generator = torch.Generator().manual_seed(3)
    centres = torch.tensor([[0.0, 0], [3, 0], [0, 3]])
    return centres[labels] + 0.5 * torch.randn(SIZE, 2, generator=generator), labels


def loader(inputs, labels) -> DataLoader:
    return DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        max_epochs=-1,
        max_steps=STEPS,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[SGLDSampler(folder / "bank", num_data="auto", burn_in=20, every_n_steps=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def bank_of(trainer: Trainer) -> SampleBank:
    return SampleBank(Path(trainer.default_root_dir) / "bank")


PREDICTIVES = {
    "network": lambda trainer, module: NetworkPredictor(trainer.lightning_module),
    "dropout": lambda trainer, module: DropoutPredictor(trainer.lightning_module, 5),
    "bank": lambda trainer, module: PosteriorPredictor(bank_of(trainer), module, 10),
    "gaussian": lambda trainer, module: PosteriorPredictor(
        LowRankGaussian.fit(bank_of(trainer), 3),
        module,
        10,
        generator=torch.Generator().manual_seed(0),
    ),
}


def learner(folder: Path, predictive: str, path: Path | None = None) -> ActiveLearning:
    inputs, labels = examples()
    return ActiveLearning(
        LightningTraining(Classifier, loader, trainer, PREDICTIVES[predictive], folder),
        inputs,
        labels,
        Pool(SIZE, range(6)),
        acquisition="entropy",
        labels_per_round=5,
        evaluate={"all": (inputs, labels)},
        path=path,
    )


@pytest.mark.parametrize("predictive", PREDICTIVES)
def test_rounds_repeat_and_resume_bit_by_bit(tmp_path, predictive):
    whole = learner(tmp_path / "a", predictive).run(3)
    path = tmp_path / "state.json"
    learner(tmp_path / "b", predictive, path).run(1)
    resumed = learner(tmp_path / "b", predictive, path)
    assert len(resumed.rounds) == 1
    assert resumed.run(3) == whole
    assert whole[-1].accuracy["all"] > 0.7


def test_each_training_starts_from_scratch_in_an_empty_folder(tmp_path):
    found = []

    def predictive(trainer, module):
        bank = bank_of(trainer)
        found.append((len(bank), bank.steps[0][-1], bank.metadata["num_data"], module))
        return NetworkPredictor(trainer.lightning_module)

    training = LightningTraining(Classifier, loader, trainer, predictive, tmp_path)
    inputs, labels = examples()
    (tmp_path / "mine.txt").write_text("kept")
    training(inputs[:10], labels[:10], 1)
    training(inputs[:20], labels[:20], 2)
    assert [each[:3] for each in found] == [(10, 60, 10), (10, 60, 20)]
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_predictive_gets_a_module_with_the_weights_before_training(tmp_path):
    made = []

    def model():
        made.append(Classifier())
        return made[-1]

    def predictive(trainer, module):
        assert module is made[1]
        assert trainer.lightning_module is made[0]
        return NetworkPredictor(module)

    inputs, labels = examples()
    LightningTraining(model, loader, trainer, predictive, tmp_path)(inputs, labels, 7)
    torch.manual_seed(7)
    fresh = Classifier()
    for name, value in fresh.state_dict().items():
        assert made[1].state_dict()[name].equal(value)
        assert not made[0].state_dict()[name].equal(value)
