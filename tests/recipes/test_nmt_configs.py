"""Every combination of the NMT configurations can be composed, made and run."""

import os
from itertools import product

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn

from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.reversible import RevGRU, RevLSTM
from recipes.common.figures import ReversibleFigures
from recipes.common.throughput import TokensPerSecond
from recipes.nmt.figures import TranslationSamples
from recipes.nmt.record import TranslationRecord
from recipes.nmt.writer import TranslationWriter
from tests.helpers.recipe_runs import RECIPES, composer, config_args
from tests.recipes.small_nmt import write_text

REAL = os.environ.get("REVFLIP_DATA")

SIZES = {"small": 128, "paper": 300}
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
CONTEXTS = {
    "20h": "slice:20",
    "100h": "slice:100",
    "300h": "slice:300",
    "emb": "embedding",
    "emb20h": "embedding+slice:20",
    "emb60h": "embedding+slice:60",
}
BITS = {"rev1": 1, "rev2": 2, "rev3": 3, "rev5": 5, "rev_unlimited": None}
EVERY_RUN = {
    RichProgressBar,
    ModelCheckpoint,
    MemoryMonitor,
    TokensPerSecond,
    ReversibleFigures,
    TranslationSamples,
    TranslationRecord,
}


@pytest.fixture(scope="module")
def compose():
    return composer("nmt")


@pytest.mark.parametrize("context", [None, *CONTEXTS])
@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize(("size", "cell"), [*product(SIZES, CELLS)])
def test_every_choice_of_size_cell_context_and_forgetting_limit_can_be_composed(
    compose, size, cell, context, bits
):
    names = ["base", size, cell, *([context] if context else []), *([bits] if bits else []), "csv"]
    if (size, context) == ("small", "300h"):
        with pytest.raises(ValueError, match="asks for 300 units, .* has 128. Use 'hidden'"):
            compose(*names)
        return
    run = compose(*names)

    units = SIZES[size]
    for layer in (run.model.encoder, run.model.decoder):
        assert type(layer) is CELLS[cell]
        assert (layer.input_size, layer.hidden_size, layer.num_layers) == (units, units, 1)
    assert run.model.hparams["context"] == CONTEXTS.get(context, "hidden")
    assert run.model.hparams["memory"] == ("sequence" if bits else "plain")
    expected = set(EVERY_RUN)
    if size == "paper":
        expected.add(EarlyStopping)
    if bits:
        expected.add(ReversibleRNN)
        assert run.callbacks[ReversibleRNN].max_forget_bits == BITS[bits]
    assert set(run.callbacks) == expected


def test_no_configuration_is_left_out_of_the_tests():
    others = {"base", "csv", "iwslt", "plain", "predict"}
    names = {path.stem for path in (RECIPES / "nmt" / "configs").iterdir()}
    assert names == {*others, *SIZES, *CELLS, *CONTEXTS, *BITS}


def test_paper_size_has_the_hyperparameters_of_the_paper(compose):
    run = compose("base", "paper", "lstm")
    expected = {
        "embedding_size": 300,
        "hidden_size": 300,
        "num_layers": 1,
        "dropout": 0.4,
        "optimizer": "sgd",
        "lr": None,  # that of the layer, see PAPER_RATES
        "divide_lr_by": 2,
        "clip_norm": 5,
    }
    assert {name: run.model.hparams[name] for name in expected} == expected
    assert run.data.batch_size == 64
    stop = run.callbacks[EarlyStopping]
    assert (stop.monitor, stop.stopping_threshold) == ("train/lr", 0.001)


@pytest.mark.parametrize("bits", [None, "rev3"])
@pytest.mark.parametrize("cell", CELLS)
def test_iwslt_size_is_made_for_files_of_your_own(compose, tmp_path, cell, bits):
    text = write_text(tmp_path)
    args = tuple(f"--data.{name}={value}" for name, value in text.items())
    run = compose("base", "iwslt", cell, *([bits] if bits else []), "csv", args=args)
    for layer in (run.model.encoder, run.model.decoder):
        assert (layer.input_size, layer.hidden_size, layer.num_layers) == (600, 600, 2)
        assert layer.dropout == 0.4
    assert run.model.hparams["context"] == "embedding+slice:60"
    assert (ReversibleRNN in run.callbacks) == bool(bits)
    assert run.data.source == "files"
    assert (run.data.max_length, run.data.min_count) == (50, 5)
    run.data.setup("fit")
    assert "eins" in run.data.source_vocabulary.tokens


def test_iwslt_size_without_files_says_what_to_give(compose):
    with pytest.raises(ValueError, match=r"--data\.train_source"):
        compose("base", "iwslt", "lstm", "csv")


def test_reversible_layers_can_stay_in_an_ordinary_model(compose):
    sequence = compose("base", "small", "lstm", "emb20h", "rev3")
    plain = compose("base", "small", "lstm", "emb20h", "rev3", "plain")
    assert plain.model.hparams == {**sequence.model.hparams, "memory": "plain"}
    assert plain.callbacks[ReversibleRNN].max_forget_bits == 3


def test_runs_log_to_wandb_offline_unless_csv_is_chosen(compose):
    logger = compose("base", "small", "lstm").trainer.logger
    assert isinstance(logger, WandbLogger)
    assert logger._offline
    assert isinstance(compose("base", "small", "lstm", "csv").trainer.logger, CSVLogger)


def test_prediction_can_be_added(compose):
    args = ("--trainer.callbacks.path=out.txt",)
    run = compose("base", "small", "gru", "rev3", "predict", args=args)
    assert run.trainer.logger is False
    assert {ReversibleRNN, MemoryMonitor, TranslationWriter} <= set(run.callbacks)
    assert run.callbacks[TranslationWriter].path.name == "out.txt"


# --- a few steps -----------------------------------------------------------------------------


@pytest.fixture
def fit(cwd):
    """Runs `revflip fit`."""

    def run(*names: str, args: tuple[str, ...]):
        return RevflipCLI(["fit", *config_args("nmt", "base", *names, "csv"), *args]).trainer

    return run


@pytest.mark.parametrize(
    ("names", "layer", "memory"),
    [
        (["lstm"], nn.LSTM, "plain"),
        (["gru", "20h"], nn.GRU, "plain"),
        (["lstm", "rev1"], RevLSTM, "sequence"),
        (["gru", "emb", "rev_unlimited"], RevGRU, "sequence"),
        (["lstm", "emb20h", "rev3", "plain"], RevLSTM, "plain"),
    ],
)
def test_configuration_trains_and_validates(fit, names, layer, memory):
    trainer = fit(
        "small",
        *names,
        args=(
            "--model.embedding_size=8",
            "--model.hidden_size=20",
            "--model.max_extra_length=2",
            "--data.max_train_pairs=200",
            "--data.eval_batch_size=8",
            "--trainer.fast_dev_run=2",
        ),
    )
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/perplexity"].isfinite()
    assert trainer.callback_metrics["val/bleu"] >= 0
    assert (type(trainer.model.encoder), type(trainer.model.decoder)) == (layer, layer)
    assert trainer.model.hparams["memory"] == memory


@pytest.mark.parametrize("bits", [None, "rev3"])
def test_iwslt_size_trains_and_validates(fit, tmp_path, bits):
    args = [f"--data.{name}={value}" for name, value in write_text(tmp_path).items()]
    args += ["--model.embedding_size=8", "--model.hidden_size=60", "--trainer.fast_dev_run=2"]
    trainer = fit("iwslt", "lstm", *([bits] if bits else []), args=tuple(args))
    assert trainer.callback_metrics["val/perplexity"].isfinite()
    assert type(trainer.model.encoder) is (RevLSTM if bits else nn.LSTM)
    assert trainer.model.encoder.num_layers == 2


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_paper_size_trains_on_the_real_text(fit):
    args = ["--data.source=multi30k", f"--data.root={REAL}", "--trainer.limit_val_batches=1"]
    args += ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    args += ["--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"]
    args += ["--data.eval_batch_size=4"]
    trainer = fit("paper", "lstm", "emb20h", "rev3", args=tuple(args))
    assert trainer.global_step == 2
    found = trainer.callback_metrics
    assert found["val/perplexity"].isfinite()
    assert found["train/loss"] < 12
    assert found["val/bleu"] >= 0
    for part in ("encoder", "decoder"):
        assert 0 < found[f"reversible/bits_per_unit_step/{part}.l0"] < 3.5
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
