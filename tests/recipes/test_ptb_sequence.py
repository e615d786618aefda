"""The memory mode `sequence` of the language model: the plain model in less memory."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.measure import bytes_allocated
from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN
from lightning_revflip.convert import convert, load_from_checkpoint
from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from recipes.common.figures import ran_reversibly
from recipes.ptb.data import PennTreebank
from recipes.ptb.module import LanguageModel
from recipes.ptb.streams import IGNORED
from tests.recipes.random_text import VOCABULARY, RandomText, quiet_trainer

REAL = os.environ.get("REVFLIP_DATA")
MODES = ("plain", "sequence")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NO_DROPOUT = dict.fromkeys(
    ["output_dropout", "hidden_dropout", "input_dropout", "embedding_dropout", "weight_drop"], 0.0
)


def make(memory: str, **kwargs) -> LanguageModel:
    """A model with all its dropout, not yet reversible."""
    defaults = {"embedding_size": 8, "hidden_sizes": [12, 8], "lr": 1.0, "chunk_steps": 4}
    if memory == "plain":
        kwargs["chunk_steps"] = None
    return LanguageModel(VOCABULARY, memory=memory, **{**defaults, **kwargs})


def pair(dtype: torch.dtype = torch.float64, **kwargs) -> list[LanguageModel]:
    """A plain model and one in mode `sequence`, reversible and with the same weights."""
    torch.manual_seed(0)
    models = [make(memory, **kwargs) for memory in MODES]
    for model in models:
        convert(model, {nn.GRU: RevGRU, nn.LSTM: RevLSTM}, max_forget_bits=3.0)
        model.to(dtype)
    models[1].load_state_dict(models[0].state_dict())
    return models


def text(steps: int, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets; one target is to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(VOCABULARY, (2, steps, batch), generator=generator)
    targets[-1, -1] = IGNORED
    return inputs, targets


def flat(states) -> Tensor:
    parts = [part for state in states for part in (state if isinstance(state, tuple) else [state])]
    return torch.cat([part.detach().flatten() for part in parts])


def read(model: LanguageModel, window: tuple[Tensor, Tensor], states=None, seed: int = 1):
    """Loss and states of a window; gradients are added up."""
    torch.manual_seed(seed)
    loss, states = model.negative_log_likelihood(*window, states)
    loss.backward()
    cut = [
        tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        for state in states
    ]
    return loss.detach(), cut


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Equal up to an error relative to the norm."""
    assert expected.norm() > 0
    assert (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def assert_same_gradients(
    plain: LanguageModel, sequence: LanguageModel, dtype: torch.dtype = torch.float64
) -> None:
    for (name, one), (other_name, other) in zip(
        plain.named_parameters(), sequence.named_parameters(), strict=True
    ):
        assert name == other_name
        assert_same(other.grad, one.grad, dtype)


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sizes", [[8], [12, 8], [12, 10, 8]], ids=len)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_loss_state_and_gradients_are_those_of_the_plain_model(cell, sizes, training, dtype):
    plain, sequence = pair(dtype, cell=cell, hidden_sizes=sizes)
    loss, states = read(plain.train(training), text(11))
    other_loss, other_states = read(sequence.train(training), text(11))
    assert_same(other_loss, loss, dtype)
    assert_same(flat(other_states), flat(states), dtype)
    assert_same_gradients(plain, sequence, dtype)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_windows_of_any_length_go_on_where_the_one_before_ended(cell):
    plain, sequence = pair(cell=cell)
    states = other_states = None
    for number, steps in enumerate([11, 4, 1, 9]):
        window = text(steps, seed=number)
        loss, states = read(plain, window, states, seed=number)
        other_loss, other_states = read(sequence, window, other_states, seed=number)
        assert_same(other_loss, loss)
        assert_same(flat(other_states), flat(states))
    assert_same_gradients(plain, sequence)


@pytest.mark.parametrize("chunk_steps", [1, 5, 100, None])
def test_gradients_do_not_depend_on_the_chunks(chunk_steps):
    plain, sequence = pair(chunk_steps=chunk_steps)
    for model in (plain, sequence):
        read(model, text(11))
    assert_same_gradients(plain, sequence)


@pytest.mark.parametrize(
    "only",
    ["output_dropout", "hidden_dropout", "input_dropout", "embedding_dropout", "weight_drop"],
)
def test_every_kind_of_dropout_drops_anew_in_every_window(only):
    _, sequence = pair(**{**NO_DROPOUT, only: 0.5})
    first, again, other = (read(sequence, text(11), seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    sequence.eval()
    assert read(sequence, text(11), seed=1)[0] == read(sequence, text(11), seed=2)[0]


def test_evaluation_gives_the_loss_of_the_plain_model_without_gradients():
    plain, sequence = (model.eval() for model in pair())
    with torch.no_grad():
        found, states = sequence.negative_log_likelihood(*text(11))
        expected, other_states = plain.negative_log_likelihood(*text(11))
    assert not found.requires_grad
    assert_same(found, expected)
    assert_same(flat(states), flat(other_states))


# --- the same model --------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MODES)
def test_parameters_are_registered_once_under_the_names_of_old_checkpoints(memory):
    model = make(memory)
    convert(model, {nn.LSTM: RevLSTM})
    read(model, text(5))
    rnn = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    names = [*(f"rnns.{n}.{name}" for n in range(2) for name in rnn)]
    names += ["embedding.weight", "softmax.weight", "softmax.bias"]
    assert sorted(model.state_dict()) == sorted(names)
    assert len(list(model.parameters())) == len(names) - 1  # embedding and softmax are tied
    assert model.softmax.weight is model.embedding.weight


def test_a_copy_of_a_model_that_has_run_trains_on_its_own():
    _, model = pair()
    read(model, text(5))
    clone = copy.deepcopy(model)
    for one in (model, clone):
        one.zero_grad()
    with torch.no_grad():
        clone.softmax.bias += torch.arange(VOCABULARY)
    loss, _ = read(clone, text(5))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in clone.parameters())
    assert loss != read(model, text(5))[0]


@pytest.mark.parametrize(("saved", "loaded"), [MODES, MODES[::-1]])
def test_checkpoint_of_one_mode_is_continued_in_the_other(tmp_path, saved, loaded):
    def trained(*parts: tuple[str, int]) -> LanguageModel:
        """Trained to the given step in the first mode, then on to the next in the next one."""
        torch.manual_seed(0)
        path = None
        for memory, step in parts:
            model = make(memory, **NO_DROPOUT).double()  # or else it is restored in float32
            saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step)
            run = quiet_trainer(
                tmp_path,
                max_steps=step,
                limit_val_batches=0,
                callbacks=[ReversibleRNN(), saving],
                enable_checkpointing=True,
                precision="64-true",
            )
            run.fit(model, RandomText(), ckpt_path=path, weights_only=True)
            path = saving.best_model_path
        return model

    other = trained((saved, 3), (loaded, 5))
    for name, value in trained((saved, 5)).state_dict().items():
        assert_same(other.state_dict()[name], value)


def test_weights_are_loaded_in_the_mode_that_is_asked_for(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ReversibleRNN()])
    model = make("sequence")
    trainer.fit(model, RandomText())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    for kwargs in ({}, {"memory": "plain", "chunk_steps": None}):
        restored = load_from_checkpoint(
            LanguageModel, tmp_path / "model.ckpt", weights_only=True, **kwargs
        ).eval()
        assert restored.memory == kwargs.get("memory", "sequence")
        assert restored.chunk_steps == kwargs.get("chunk_steps", 4)
        loss, _ = restored.negative_log_likelihood(*text(11))
        assert_same(loss, model.eval().negative_log_likelihood(*text(11))[0], torch.float32)


def test_checkpoint_from_before_there_were_modes_is_a_plain_model(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    model = make("plain")
    trainer.fit(model, RandomText())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    for name in ("memory", "chunk_steps"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    restored = LanguageModel.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert restored.memory == "plain"
    assert torch.equal(restored.rnns[1].weight_hh_l0, model.rnns[1].weight_hh_l0)


# --- in a Trainer ----------------------------------------------------------------------------


class SeedWindows(Callback):
    """The masks of a window depend on its number only."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.current_epoch * 100 + batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_stage_gives_what_the_plain_model_gives(tmp_path, accumulate):
    found = {}
    for memory in MODES:
        torch.manual_seed(0)
        trainer = quiet_trainer(
            tmp_path,
            max_epochs=2,
            callbacks=[ReversibleRNN(), SeedWindows()],
            accumulate_grad_batches=accumulate,
            val_check_interval=2,
            precision="64-true",
        )
        model, data = make(memory), RandomText()
        trainer.fit(model, data)
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        figures |= trainer.validate(model, data, verbose=False)[0]
        figures |= trainer.test(model, data, verbose=False)[0]
        (written,) = trainer.predict(model, data)
        found[memory] = model.state_dict(), figures, written
    (weights, figures, written), (other_weights, other_figures, other_written) = found.values()
    assert {"train/loss", "train/perplexity", "val/perplexity", "test/perplexity"} <= {*figures}
    assert other_figures == pytest.approx(figures, rel=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-11)
    assert torch.equal(other_written.tokens, written.tokens)
    torch.testing.assert_close(other_written.log_probs, written.log_probs)


class Modes(Callback):
    """Records the modes that the sequence is in, which the Trainer does not know."""

    def __init__(self) -> None:
        self.found = {"train": set(), "val": set()}

    def _record(self, stage: str, model: LanguageModel) -> None:
        sequence = model._reader._sequence
        parts = (sequence, sequence.read_in, sequence.read_out, *model.modules())
        self.found[stage] |= {part.training for part in parts}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._record("train", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self._record("val", pl_module)


def test_the_sequence_follows_the_modes_of_the_model(tmp_path):
    modes = Modes()
    callbacks = [ReversibleRNN(), modes]
    quiet_trainer(tmp_path, max_epochs=2, val_check_interval=2, callbacks=callbacks).fit(
        make("sequence"), RandomText()
    )
    assert modes.found == {"train": {True}, "val": {False}}


@pytest.mark.slow
def test_two_processes_in_mode_sequence_end_with_the_weights_of_a_plain_one(tmp_path):
    ends = []
    for processes, memory in [("1", "plain"), ("2", "sequence")]:
        command = [sys.executable, "-m", "tests.recipes.train_ptb", str(tmp_path)]
        subprocess.run([*command, processes, memory], check=True, capture_output=True, timeout=240)
        ends.append(torch.load(tmp_path / f"{memory}{processes}.pt"))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_ordinary_layers_are_explained(tmp_path, stage):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    message = r"are LSTM, LSTM\. Add the callback ReversibleRNN .*rev3\.yaml.*or set memory: plain"
    with pytest.raises(ValueError, match=message):
        getattr(trainer, stage)(make("sequence"), RandomText())


# --- memory ----------------------------------------------------------------------------------


def test_reports_and_figures_show_what_the_recurrent_layers_stored():
    reports = []
    for model in pair():
        assert not ran_reversibly(model)
        read(model, text(40))
        assert ran_reversibly(model)
        reports.append(memory_report(model))
    plain, sequence = reports
    assert [layer.name for layer in sequence.layers] == ["rnns.0.l0", "rnns.1.l0"]
    for one, other in zip(plain.layers, sequence.layers, strict=True):
        assert other.stored_bits == one.stored_bits > 0
        assert torch.equal(other.gate_counts, one.gate_counts)


def test_the_memory_monitor_sees_that_less_is_kept(tmp_path):
    kept = {}
    for memory in MODES:
        logger = CSVLogger(tmp_path, memory)
        callbacks = [ReversibleRNN(), MemoryMonitor()]
        trainer = quiet_trainer(
            tmp_path, max_steps=1, log_every_n_steps=1, callbacks=callbacks, logger=logger
        )
        trainer.fit(make(memory, hidden_sizes=[8]), RandomText(tokens=2001, bptt=400))
        kept[memory] = trainer.callback_metrics["memory/saved_for_backward_bytes"].item()
        assert trainer.callback_metrics["reversible/bits_per_unit_step/rnns.0.l0"] > 0
    assert kept["sequence"] < kept["plain"] / 20


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_peak_memory_does_not_grow_with_the_window(training):
    """But for the information buffer, the window itself and, here, loss and state."""
    growth = []
    for model in pair(torch.float32, hidden_sizes=[8]):
        model.train(training)

        def step(steps, model=model):
            with torch.set_grad_enabled(training):
                loss, _ = model.negative_log_likelihood(*text(steps))
            if training:
                loss.backward()

        step(5)
        peaks = [bytes_allocated(partial(step, steps), "cpu")[1] for steps in (40, 140)]
        growth.append((peaks[1] - peaks[0]) / 100)
    plain, sequence = growth
    assert sequence < plain / 10


# --- the real Penn Treebank ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_model_of_the_paper_reads_the_real_text_as_the_plain_one_does():
    data = PennTreebank(source="ptb", root=REAL)
    data.setup("fit")
    torch.manual_seed(0)
    plain, sequence = (LanguageModel(len(data.vocabulary), memory=memory) for memory in MODES)
    for model in (plain, sequence):
        convert(model, {nn.LSTM: RevLSTM}, max_forget_bits=3.0)
    sequence.load_state_dict(plain.state_dict())
    states = other_states = None
    for _, window in zip(range(2), data.train_dataloader(), strict=False):
        part = window.inputs, window.targets
        loss, states = read(plain, part, states)
        other_loss, other_states = read(sequence, part, other_states)
        assert_same(other_loss, loss, torch.float32)
        assert_same(flat(other_states), flat(states), torch.float32)
    assert_same_gradients(plain, sequence, torch.float32)
