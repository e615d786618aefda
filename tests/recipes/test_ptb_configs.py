"""Every combination of the PTB configurations can be composed, made and run."""

import os
from itertools import product

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn

from lightning_revflip.callbacks import Flipout, MemoryMonitor, ReversibleRNN
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.flipout import DropConnect, FlipoutLSTM, MultiplicativeGaussian
from lightning_revflip.reversible import LinearCrossEntropy
from lightning_revflip.reversible_flipout import FlipoutRevLSTM
from recipes.common.figures import ReversibleFigures
from recipes.common.throughput import TokensPerSecond
from recipes.ptb.writer import TextWriter
from tests.helpers.recipe_runs import RECIPES, composer, config_args

REAL = os.environ.get("REVFLIP_DATA")

SIZES = {
    "small": (["small"], 200, [200]),
    "paper": (["paper"], 650, [650]),
    "paper_2layer": (["paper", "paper_2layer"], 650, [1150, 650]),
}
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
BITS = {
    "rev1": 1,
    "rev2": 2,
    "rev3": 3,
    "rev3_forgetful": 3,
    "rev5": 5,
    "rev_unlimited": None,
    "nf": 0,
}
FLIPOUT = {
    "lstm_flipout_dropconnect": DropConnect(),
    "lstm_flipout_gaussian": MultiplicativeGaussian(0.5),
}
EVERY_RUN = {RichProgressBar, ModelCheckpoint, MemoryMonitor, TokensPerSecond, ReversibleFigures}


@pytest.fixture(scope="module")
def compose():
    return composer("ptb")


@pytest.mark.parametrize(("size", "cell", "bits"), [*product(SIZES, CELLS, [None, *BITS])])
def test_every_choice_of_size_cell_and_forgetting_limit_can_be_composed(compose, size, cell, bits):
    names, embedding_size, hidden_sizes = SIZES[size]
    run = compose("base", *names, cell, *([bits] if bits else []), "csv")

    assert [type(rnn) for rnn in run.model.rnns] == [CELLS[cell]] * len(hidden_sizes)
    assert [rnn.hidden_size for rnn in run.model.rnns] == hidden_sizes
    assert run.model.embedding_size == embedding_size
    expected = set(EVERY_RUN)
    if size != "small":
        expected.add(EarlyStopping)
    if bits:
        expected.add(ReversibleRNN)
        assert run.callbacks[ReversibleRNN].max_forget_bits == BITS[bits]
    assert set(run.callbacks) == expected


def test_no_configuration_is_left_out_of_the_tests():
    others = {"base", "char", "csv", "predict", "sequence", "lstm_weightdrop", *FLIPOUT}
    composed = {name for names, *_ in SIZES.values() for name in names}
    names = {path.stem for path in (RECIPES / "ptb" / "configs").iterdir()}
    assert names == {*others, *composed, *CELLS, *BITS}


def test_paper_size_has_the_hyperparameters_of_the_paper(compose):
    run = compose("base", "paper", "lstm")
    assert run.model.dropouts == {
        "output_dropout": 0.4,
        "hidden_dropout": 0.3,
        "input_dropout": 0.4,
        "embedding_dropout": 0.1,
        "weight_drop": 0.5,
    }
    model = run.model
    assert (model.lr, model.divide_lr_by, model.patience) == (20, 4, 5)
    assert (model.clip_norm, model.weight_decay) == (0.1, 1.2e-6)
    assert run.data.batch_sizes == {"train": 20, "valid": 10, "test": 1}
    assert run.data.bptt == 70
    assert run.data.variable_length
    assert run.trainer.reload_dataloaders_every_n_epochs == 1
    stop = run.callbacks[EarlyStopping]
    assert (stop.monitor, stop.stopping_threshold) == ("train/lr", 0.01)


def test_runs_log_to_wandb_offline_unless_csv_is_chosen(compose):
    logger = compose("base", "small", "lstm").trainer.logger
    assert isinstance(logger, WandbLogger)
    assert logger._offline
    assert isinstance(compose("base", "small", "lstm", "csv").trainer.logger, CSVLogger)


def test_characters_and_prediction_can_be_added(compose):
    run = compose("base", "small", "gru", "rev3", "char", "predict")
    assert run.data.level == "char"
    assert run.trainer.logger is False
    assert {ReversibleRNN, MemoryMonitor, TextWriter} <= set(run.callbacks)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES)
def test_memory_mode_sequence_can_be_added(compose, size, cell):
    names, _, hidden_sizes = SIZES[size]
    plain = compose("base", *names, cell, "rev3").model
    model = compose("base", *names, cell, "rev3", "sequence").model
    assert (plain.memory, model.memory) == ("plain", "sequence")
    assert {**model.hparams, "memory": "plain"} == plain.hparams
    assert [rnn.hidden_size for rnn in model.rnns] == hidden_sizes


@pytest.mark.parametrize("before", [[], ["rev3"]], ids=["lstm", "revlstm"])
def test_recurrent_weights_are_dropped_for_a_batch_or_for_each_sequence(compose, before):
    masked = compose("base", "small", *before, "lstm_weightdrop")
    assert masked.model.dropouts["weight_drop"] == 0.5
    assert Flipout not in masked.callbacks
    for name, perturbation in FLIPOUT.items():
        run = compose("base", "small", *before, name)
        assert run.model.dropouts["weight_drop"] == 0.0
        assert run.callbacks[Flipout].perturbation == perturbation
        others = {key: value for key, value in run.model.hparams.items() if key != "weight_drop"}
        assert others == {k: v for k, v in masked.model.hparams.items() if k != "weight_drop"}


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (["lstm_flipout_dropconnect"], FlipoutLSTM),
        (["lstm_flipout_gaussian", "char"], FlipoutLSTM),
        (["rev3", "lstm_flipout_dropconnect"], FlipoutRevLSTM),
        (["rev3", "lstm_flipout_gaussian", "sequence"], FlipoutRevLSTM),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_only_recurrent_weights_are_perturbed_while_training(cwd, names, layer):
    args = ["fit", *config_args("ptb", "base", "small", *names, "csv"), "--data.source=embedded"]
    args += ["--model.embedding_size=20", "--model.hidden_sizes=[20]"]
    model = RevflipCLI([*args, "--trainer.fast_dev_run=2"]).trainer.lightning_module
    (rnn,) = model.rnns
    assert type(rnn) is layer
    assert list(rnn.perturbed_names()) == ["weight_hh_l0"]
    assert {name.rsplit("_", 1)[-1] for name, _ in rnn.named_parameters()} == {"l0"}


@pytest.mark.parametrize(
    "names",
    [
        ["lstm"],
        ["gru"],
        ["lstm", "rev3"],
        ["gru", "rev3"],
        ["gru", "nf"],
        ["lstm", "nf"],
        ["lstm", "rev3", "sequence"],
        ["gru", "nf", "sequence"],
    ],
)
def test_configuration_trains_and_validates(cwd, names):
    args = ["fit", *config_args("ptb", "base", "small", *names, "csv")]
    args += ["--data.source=embedded", "--model.embedding_size=20", "--model.hidden_sizes=[20]"]
    trainer = RevflipCLI([*args, "--trainer.fast_dev_run=2"]).trainer
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/perplexity"].isfinite()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_paper_size_in_memory_mode_sequence_trains_on_the_real_text(cwd):
    args = ["fit", *config_args("ptb", "base", "paper", "lstm", "rev3", "sequence", "csv")]
    args += ["--data.source=ptb", f"--data.root={REAL}"]
    args += ["--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1"]
    trainer = RevflipCLI([*args, "--trainer.max_steps=2", "--trainer.val_check_interval=2"]).trainer
    assert trainer.global_step == 2
    assert isinstance(trainer.model.softmax, LinearCrossEntropy)
    found = trainer.callback_metrics
    assert found["val/perplexity"] < 12_000
    assert found["train/loss"] < 10
    assert 0 < found["reversible/bits_per_unit_step/rnns.0.l0"] < 3.5
