"""The memory mode `sequence` of the translator: the plain model in less memory."""

import copy
import subprocess
import sys
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN
from lightning_revflip.convert import convert, load_from_checkpoint
from lightning_revflip.reversible import memory_report
from recipes.nmt.batches import Batch, collate
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator
from recipes.nmt.vocabulary import PAD
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import (
    CONTEXTS,
    MODES,
    REVERSIBLE,
    SOURCE_SIZE,
    TARGET_SIZE,
    assert_close,
    gradients,
    learn,
    pair,
    random_batch,
    random_pairs,
    small_model,
    write_text,
)

# --- both memory modes are the same model ----------------------------------------------------


@pytest.mark.parametrize(("cell", "num_layers"), [*product(["lstm", "gru"], [1, 2])])
@pytest.mark.parametrize("context", CONTEXTS)
def test_sequence_has_loss_and_gradients_of_plain(cell, num_layers, context):
    """But for the kept units of the encoder, which are rounded differently."""
    models = pair(cell=cell, num_layers=num_layers, context=context)
    exact = context == "embedding"
    (loss, expected), (other_loss, found) = (
        (learn(model, random_batch()), gradients(model)) for model in models
    )
    assert_close(other_loss, loss, 1e-12 if exact else 1e-6)
    assert_close(found, expected, 1e-12 if exact else 1e-6)
    for (name, one), (other_name, other) in zip(
        *(model.named_parameters() for model in models), strict=True
    ):
        assert name == other_name
        assert one.grad.norm() > 0
        assert_close(other.grad, one.grad, 1e-12 if exact else 1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("chunk_steps", [1, 100, None])
def test_loss_depends_neither_on_chunks_nor_on_the_mode_of_a_model_without_dropout(
    chunk_steps, training
):
    plain, sequence = (model.train(training) for model in pair(context="embedding"))
    sequence.hparams["chunk_steps"] = chunk_steps
    for batch in (random_batch(), random_batch([2], [1]), random_batch(seed=1)):
        assert_close(learn(sequence, batch), learn(plain, batch), 1e-12)
        assert_close(gradients(sequence), gradients(plain), 1e-12)  # of all batches so far
    with torch.no_grad():
        loss = sequence.negative_log_likelihood(batch)
        assert not loss.requires_grad
        assert_close(loss, plain.negative_log_likelihood(batch), 1e-12)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_batch_is_no_more_than_its_sentences(cell, memory):
    model = pair(cell=cell)[MODES.index(memory)]
    alone = [learn(model, collate([one])) for one in random_pairs()]
    summed = gradients(model)
    model.zero_grad()
    assert_close(learn(model, random_batch()), sum(alone), 1e-6)
    assert_close(gradients(model), summed, 1e-6)


@pytest.mark.parametrize("memory", MODES)
def test_padding_does_not_matter(memory):
    model = pair()[MODES.index(memory)]
    batch = random_batch()
    padded = batch._replace(
        source=batch.source.where(batch.source != PAD, torch.tensor(SOURCE_SIZE - 1)),
        target_inputs=batch.target_inputs.where(batch.target_inputs != PAD, torch.tensor(7)),
    )
    assert not torch.equal(padded.source, batch.source)
    longer = Batch(
        *(
            torch.cat([part, torch.full((2, part.shape[1]), PAD)])
            if isinstance(part, torch.Tensor)
            else part
            for part in batch
        )
    )
    loss = learn(model, batch)
    assert learn(model, padded) == loss
    assert_close(learn(model, longer), loss, 1e-12)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_state_dict_has_every_parameter_once_under_the_same_names(cell, memory):
    model = pair(cell=cell)[MODES.index(memory)]
    learn(model, random_batch())  # the reversible passes exist now
    rnn = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    names = [f"{part}.{name}" for part in ("encoder", "decoder") for name in rnn]
    names += ["attention.query.weight", "attention.combine.weight", "generator.weight"]
    names += ["generator.bias", "source_embedding.weight", "target_embedding.weight"]
    assert sorted(model.state_dict()) == sorted(names)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)


def test_both_modes_begin_with_the_same_weights():
    weights = []
    for memory in MODES:
        torch.manual_seed(0)
        weights.append(parameters_to_vector(small_model(memory).parameters()))
    assert torch.equal(*weights)


def test_a_copy_of_a_model_that_has_run_learns_on_its_own():
    _, model = pair()
    loss = learn(model, random_batch())
    clone = copy.deepcopy(model)
    for one in (model, clone):
        one.zero_grad()
    with torch.no_grad():
        clone.generator.bias += torch.arange(TARGET_SIZE)
    assert learn(clone, random_batch()) != loss
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in clone.parameters())
    assert learn(model, random_batch()) == loss


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("part", ["source_dropout", "target_dropout", "output_dropout"])
def test_every_kind_of_dropout_drops_in_training_only(part, memory):
    model = pair()[MODES.index(memory)]
    getattr(model, part).p = 0.5
    first, again, other = (learn(model, random_batch(), seed) for seed in (1, 1, 2))
    assert first == again != other
    model.eval()
    assert learn(model, random_batch(), 1) == learn(model, random_batch(), 2)


@pytest.mark.parametrize("memory", MODES)
def test_dropout_between_layers_is_that_of_the_recurrent_layers(memory):
    model = pair(num_layers=2, dropout=0.5)[MODES.index(memory)]
    for part in (model.source_dropout, model.target_dropout, model.output_dropout):
        part.p = 0.0
    assert learn(model, random_batch(), 1) != learn(model, random_batch(), 2)
    assert small_model(dropout=0.5).encoder.dropout == 0  # of a single layer: no warning of torch


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "loaded"), [MODES, MODES[::-1]])
def test_checkpoint_of_one_mode_is_continued_in_the_other(tmp_path, saved, loaded):
    text = write_text(tmp_path)

    def trained(*parts: tuple[str, int]) -> Translator:
        """Trained to the given step in the first mode, then on to the next in the next one."""
        path = None
        for memory, step in parts:
            torch.manual_seed(0)
            model = small_model(memory, source_vocab_size=None, context="embedding").double()
            saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step)
            trainer = quiet_trainer(
                tmp_path,
                max_steps=step,
                limit_val_batches=0,
                callbacks=[ReversibleRNN(), saving],
                enable_checkpointing=True,
                precision="64-true",
            )
            data = ParallelText(**text, batch_size=8)
            trainer.fit(model, data, ckpt_path=path, weights_only=True)
            path = saving.best_model_path
        return model

    other = trained((saved, 2), (loaded, 4))
    for name, value in trained((saved, 4)).state_dict().items():
        assert_close(other.state_dict()[name], value, 1e-12)


def test_weights_are_loaded_in_the_mode_that_is_asked_for(tmp_path):
    """And with the sizes of the vocabularies, which the data had given."""
    data = ParallelText(**write_text(tmp_path))
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ReversibleRNN()])
    model = small_model("sequence", source_vocab_size=None)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    batch = next(iter(data.train_dataloader()))
    expected = model.eval().negative_log_likelihood(batch)
    for kwargs in ({}, {"memory": "plain", "chunk_steps": None}):
        restored = load_from_checkpoint(
            Translator, tmp_path / "model.ckpt", weights_only=True, **kwargs
        ).eval()
        assert restored.hparams["memory"] == kwargs.get("memory", "sequence")
        assert restored.hparams["source_vocab_size"] == len(data.source_vocabulary)
        assert restored.hparams["target_vocab_size"] == len(data.target_vocabulary)
        assert_close(restored.negative_log_likelihood(batch), expected, 1e-5)


# --- in a Trainer ----------------------------------------------------------------------------


class Modes(Callback):
    """Records the modes that the reversible passes are in, which the Trainer does not know."""

    def __init__(self) -> None:
        self.found = {"train": set(), "val": set()}

    def _record(self, stage: str, model: Translator) -> None:
        parts = (*model.twin.encoder.modules(), *model.twin.decoder.modules(), *model.modules())
        self.found[stage] |= {part.training for part in parts}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._record("train", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self._record("val", pl_module)


def test_the_reversible_passes_follow_the_modes_of_the_model(tmp_path):
    modes = Modes()
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, val_check_interval=2, callbacks=[ReversibleRNN(), modes]
    )
    model = small_model("sequence", source_vocab_size=None, max_extra_length=2)
    trainer.fit(model, ParallelText(**write_text(tmp_path), batch_size=8))
    assert modes.found == {"train": {True}, "val": {False}}


def test_every_stage_gives_what_the_plain_model_gives(tmp_path):
    (tmp_path / "input").write_text("eins zwei\n\nZebra vier eins\n")
    data = ParallelText(**write_text(tmp_path), batch_size=8, input=str(tmp_path / "input"))
    found = []
    for memory in MODES:
        torch.manual_seed(0)
        model = small_model(memory, source_vocab_size=None, lr=0.5, beam_size=2, max_extra_length=2)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, callbacks=[ReversibleRNN()], precision="64-true"
        )
        trainer.fit(model, data)
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        figures |= trainer.validate(model, data, verbose=False)[0]
        figures |= trainer.test(model, data, verbose=False)[0]
        found.append((figures, trainer.predict(model, data)))
    (figures, written), (other_figures, other_written) = found
    scores = ("perplexity", "bleu", "bleu_tokenized", "exact_match")
    expected = {f"{split}/{name}" for split in ("val", "test") for name in scores}
    assert {*expected, "train/loss", "train/perplexity", "train/lr"} == set(figures)
    assert other_figures == pytest.approx(figures, rel=1e-4)
    assert other_written == written


@pytest.mark.slow
def test_two_processes_in_either_mode_end_with_the_weights_and_scores_of_one(tmp_path):
    ends = {}
    for processes, memory in [("1", "plain"), ("2", "plain"), ("2", "sequence")]:
        command = [sys.executable, "-m", "tests.recipes.train_nmt", str(tmp_path)]
        subprocess.run([*command, processes, memory], check=True, capture_output=True, timeout=240)
        ends[processes, memory] = torch.load(tmp_path / f"{memory}{processes}.pt")
    expected = ends.pop(("1", "plain"))
    for end in ends.values():
        assert end["weights"].keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            assert_close(end["weights"][name], value, 1e-12)
        assert end["scores"] == pytest.approx(expected["scores"], rel=1e-6)
        assert end["predicted"] == expected["predicted"]


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_ordinary_layers_in_mode_sequence_are_explained(tmp_path, stage):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    message = r"are LSTM, LSTM\. Add the callback ReversibleRNN .*rev3\.yaml.*or set memory: plain"
    with pytest.raises(ValueError, match=message):
        getattr(trainer, stage)(
            small_model("sequence", source_vocab_size=None), ParallelText(**write_text(tmp_path))
        )


def test_mode_sequence_wants_both_layers_reversible():
    model = small_model("sequence")
    convert(model, REVERSIBLE, targets=["encoder"])
    with pytest.raises(ValueError, match=r"are RevLSTM, LSTM\. Add the callback"):
        model.negative_log_likelihood(random_batch())


# --- memory ----------------------------------------------------------------------------------


def test_the_memory_monitor_sees_that_less_is_kept(tmp_path):
    kept = {}
    for memory in MODES:
        model = small_model(memory, context="embedding+slice:1", hidden_size=32)
        convert(model, REVERSIBLE)
        monitor = MemoryMonitor()
        trainer = quiet_trainer(
            tmp_path,
            max_steps=1,
            callbacks=[monitor],
            logger=CSVLogger(tmp_path, memory),
            log_every_n_steps=1,
        )
        trainer.fit(model, DataLoader([random_batch([200] * 4, [200] * 4)], batch_size=None))
        kept[memory] = trainer.callback_metrics["memory/saved_for_backward_bytes"].item()
        report = memory_report(model)
        assert [layer.name for layer in report.layers] == ["encoder.l0", "decoder.l0"]
        assert all(layer.stored_bits > 0 for layer in report.layers)
    assert kept["sequence"] < kept["plain"] / 5
