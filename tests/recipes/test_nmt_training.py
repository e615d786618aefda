"""How the translator learns: rate, steps, gradient clipping, resume."""

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from lightning_revflip.callbacks import ReversibleRNN
from lightning_revflip.convert import convert
from recipes.nmt.data import ParallelText
from recipes.nmt.module import PAPER_RATES
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import (
    MODES,
    REVERSIBLE,
    learn,
    pair,
    random_batch,
    small_model,
    write_text,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, str]:
    """Arguments of a data module."""
    return write_text(tmp_path_factory.mktemp("text"))


def rate(trainer) -> float:
    return trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rate_of_sgd_is_that_of_the_paper_for_each_layer(tmp_path, text, cell, reversible):
    assert PAPER_RATES == {"LSTM": 1.0, "RevLSTM": 0.5, "GRU": 0.2, "RevGRU": 0.2}
    callbacks = [ReversibleRNN()] if reversible else []
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(small_model(source_vocab_size=None, cell=cell), ParallelText(**text, batch_size=8))
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert rate(trainer) == {"lstm": [1.0, 0.5], "gru": [0.2, 0.2]}[cell][reversible]


@pytest.mark.parametrize(
    ("kwargs", "kind", "expected"),
    [
        ({"lr": 0.7}, torch.optim.SGD, 0.7),
        ({"optimizer": "adam"}, torch.optim.Adam, 0.002),
        ({"optimizer": "adam", "lr": 0.1}, torch.optim.Adam, 0.1),
    ],
)
def test_rate_and_optimizer_can_be_given(kwargs, kind, expected):
    optimizer = small_model(**kwargs).configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == expected


class Rates(Callback):
    """Records perplexity and rate after every validation of a training."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            perplexity = trainer.callback_metrics["val/perplexity"].item()
            self.found.append((perplexity, rate(trainer)))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        # Steps so small that perplexity stays the same:
        ({"clip_norm": 1e-12, "lr": 0.8}, [0.8, 0.4, 0.2, 0.1]),
        ({"clip_norm": 1e-12, "lr": 0.8, "divide_lr_by": 4.0}, [0.8, 0.2, 0.05, 0.0125]),
        ({"lr": 0.1}, [0.1] * 4),
    ],
)
def test_rate_falls_when_perplexity_does_not(tmp_path, text, kwargs, expected):
    torch.manual_seed(0)
    rates = Rates()
    trainer = quiet_trainer(tmp_path, max_epochs=5, callbacks=[rates])
    trainer.fit(small_model(source_vocab_size=None, **kwargs), ParallelText(**text, batch_size=8))
    perplexities, found = zip(*rates.found, strict=True)
    assert found == pytest.approx(expected)
    assert (len(set(perplexities)) == 1) == ("clip_norm" in kwargs)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"max_epochs": 2, "val_check_interval": 2}, 0.8 / 2**3),  # 2 validations in each epoch
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, 0.8 / 2),
        ({"max_epochs": 2, "num_sanity_val_steps": 1}, 0.8 / 2),
    ],
)
def test_rate_falls_after_validations_not_after_epochs(tmp_path, text, kwargs, expected):
    trainer = quiet_trainer(tmp_path, **kwargs)
    model = small_model(source_vocab_size=None, clip_norm=1e-12, lr=0.8)
    trainer.fit(model, ParallelText(**text, batch_size=8))
    assert rate(trainer) == pytest.approx(expected)
    trainer.validate(model, ParallelText(**text, batch_size=8), verbose=False)
    assert rate(trainer) == pytest.approx(expected)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, text):
    """From within an epoch and from its end, before and after the learning rate has fallen."""

    def run(callbacks, ckpt_path=None):
        seed_everything(0, verbose=False)
        model = small_model(source_vocab_size=None, lr=50.0, clip_norm=1.0)
        trainer = quiet_trainer(
            tmp_path, max_epochs=4, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        trainer.fit(
            model, ParallelText(**text, batch_size=8), ckpt_path=ckpt_path, weights_only=True
        )
        return parameters_to_vector(model.parameters()), rate(trainer)

    every_step = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    # as in base.yaml, which saves at the end of an epoch
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val/perplexity")
    weights, fallen = run([every_step, every_epoch])
    assert fallen < 50.0
    for name in ["step=2", "step=8", "step=13", "step=17", "epoch=0", "epoch=1", "epoch=2"]:
        resumed_weights, resumed_rate = run([], tmp_path / f"{name}.ckpt")
        assert torch.equal(resumed_weights, weights), name
        assert resumed_rate == fallen, name


class OneBatch(LightningDataModule):
    """A single training batch."""

    def train_dataloader(self):
        return DataLoader([random_batch()], batch_size=None)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("trainer_norm", "expected"), [(None, 0.1), (0.02, 0.02)])
def test_gradient_is_clipped_by_the_model_unless_the_trainer_says_otherwise(
    tmp_path, trainer_norm, expected, memory
):
    torch.manual_seed(0)
    model = small_model(memory, lr=1.0, clip_norm=0.1)
    convert(model, REVERSIBLE)
    before = parameters_to_vector(model.parameters()).detach()
    trainer = quiet_trainer(tmp_path, max_steps=1, gradient_clip_val=trainer_norm)
    trainer.fit(model, OneBatch())
    moved = parameters_to_vector(model.parameters()) - before
    assert moved.norm().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("memory", MODES)
def test_a_step_follows_the_loss_summed_over_tokens_and_averaged_over_sentences(tmp_path, memory):
    model = pair()[MODES.index(memory)]
    model.hparams.update(lr=0.3, clip_norm=1e9)
    before = copy.deepcopy(model)
    learn(before, random_batch())
    quiet_trainer(tmp_path, max_steps=1, precision="64-true").fit(model, OneBatch())
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.3 * old.grad / 5)
