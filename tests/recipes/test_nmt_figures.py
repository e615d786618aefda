"""What the translator's loggers are shown: attention maps and sample translations."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.utils import parameters_to_vector

from lightning_revflip.callbacks import ReversibleRNN
from recipes.nmt.batches import collate, select
from recipes.nmt.data import ParallelText
from recipes.nmt.figures import TranslationSamples, attention_figure
from recipes.nmt.vocabulary import END
from tests.helpers.loggers import RecordingTensorBoard, RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import random_pairs, small_model, write_text

# --- the parts -------------------------------------------------------------------------------


def test_attention_figure_has_a_row_for_each_target_and_a_column_for_each_source_token():
    weights = torch.rand(2, 3)
    (axes,) = attention_figure(weights, ["ein", "hund", "<eos>"], ["a", "dog"]).axes
    torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data), weights)
    assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ein", "hund", "<eos>"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("source", "translation")


@pytest.mark.parametrize("words", [["$x_", "\\", "%", " "], ["$", "a$b", "$$", "^{"]])
def test_attention_figure_can_be_drawn_whatever_the_words(words):
    figure = attention_figure(torch.rand(4, 4), words, words[::-1])
    FigureCanvasAgg(figure).draw()  # fails on a word that is read as a formula
    (axes,) = figure.axes
    shown = [label.get_text().replace(r"\$", "$") for label in axes.get_xticklabels()]
    assert shown == words


def test_tokens_that_do_not_fit_the_weights_are_rejected():
    with pytest.raises(ValueError, match=r"2 target tokens .* 3 source tokens, got shape \(3, 2\)"):
        attention_figure(torch.rand(3, 2), ["a", "b", "c"], ["d", "e"])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_selected_sentences_are_a_batch_of_their_own(count):
    pairs = random_pairs()
    found, expected = select(collate(pairs), range(count)), collate(pairs[:count])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# --- the callback ----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> ParallelText:
    return ParallelText(**write_text(tmp_path), batch_size=8, eval_batch_size=4)


def middle_batch(data):
    """The validation batch from which samples are taken."""
    batches = list(data.val_dataloader())
    return batches[len(batches) // 2]


def fit(tmp_path, data, memory="plain", loggers=(), count=3, **kwargs):
    """Two epochs of two steps, each followed by a validation; one before that."""
    torch.manual_seed(0)
    model = small_model(memory, source_vocab_size=None, dropout=0.3, max_extra_length=2)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        limit_train_batches=2,
        num_sanity_val_steps=1,
        logger=list(loggers),
        callbacks=[ReversibleRNN(), TranslationSamples(count), *kwargs.pop("callbacks", [])],
        **kwargs,
    )
    trainer.fit(model, data)
    return model.eval()


@pytest.mark.parametrize("memory", ["plain", "sequence"])
def test_translations_and_attention_are_logged_after_every_validation(tmp_path, data, memory):
    wandb, tensorboard = RecordingWandb(), RecordingTensorBoard()
    model = fit(tmp_path, data, memory, [wandb, tensorboard])
    for texts in (wandb.tables, tensorboard.texts):
        assert [entry[:2] for entry in texts] == [("nmt/translations", 2), ("nmt/translations", 4)]
    for logger in (wandb, tensorboard):
        figures = [entry[:2] for entry in logger.figures]
        assert figures == [("nmt/attention", 2), ("nmt/attention", 4)]

    # What the trained model says now, after the last validation.
    batch = middle_batch(data)
    sources, references = data.corpus.read("val")
    found = model.translate(batch)
    vocabulary, tokenizer = data.target_vocabulary, data.target_tokenizer
    expected = [
        [sources[line], tokenizer.detokenize(vocabulary.decode(one.tokens)), references[line]]
        for line, one in list(zip(batch.lines, found, strict=True))[:3]
    ]
    _, _, columns, rows = wandb.tables[1]
    assert columns == ["source", "translation", "reference"]
    assert rows == expected
    table = [line.split(" | ") for line in tensorboard.texts[1][2].split("\n")]
    assert table == [columns, ["---"] * 3, *expected]

    for logger in (wandb, tensorboard):
        (figure,) = logger.figures[1][2]
        assert type(figure) is Figure
        (axes,) = figure.axes
        words = sources[batch.lines[0]].split()
        assert [label.get_text() for label in axes.get_xticklabels()] == [*words, "<eos>"]
        assert [label.get_text() for label in axes.get_yticklabels()] == vocabulary.decode(
            found[0].tokens
        )
        (weights,) = model.attention_weights(select(batch, [0]), [found[0].tokens])
        torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data), weights)


def test_an_empty_translation_has_no_attention(tmp_path, data):
    class Silent(Callback):
        def on_validation_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.generator.bias[END] = 1e4

    wandb = RecordingWandb()
    fit(tmp_path, data, loggers=[wandb], callbacks=[Silent()])
    assert wandb.figures == []
    assert len(wandb.tables) == 2
    assert [row[1] for row in wandb.tables[0][3]] == [""] * 3


def test_fewer_sentences_than_asked_for_are_all_there_are(tmp_path, data):
    wandb = RecordingWandb()
    fit(tmp_path, data, loggers=[wandb], count=100)
    assert len(wandb.tables[0][3]) == len(middle_batch(data).lines)


def test_training_is_the_same_with_and_without_samples(tmp_path, data):
    weights = [
        parameters_to_vector(fit(tmp_path, data, loggers=loggers).parameters())
        for loggers in ([], [RecordingWandb()])
    ]
    assert torch.equal(*weights)


def test_other_loggers_and_other_processes_are_left_alone(tmp_path):
    trainer = SimpleNamespace(
        loggers=[CSVLogger(tmp_path)],
        datamodule=None,
        sanity_checking=False,
        is_global_zero=True,
        num_val_batches=[1],
    )
    TranslationSamples().on_validation_batch_end(trainer, None, None, None, 0)
    trainer.loggers, trainer.is_global_zero = [RecordingWandb()], False
    TranslationSamples().on_validation_batch_end(trainer, None, None, None, 0)


def test_models_and_data_of_another_kind_are_rejected():
    trainer = SimpleNamespace(
        loggers=[RecordingWandb()],
        datamodule=None,
        sanity_checking=False,
        is_global_zero=True,
        num_val_batches=[1],
    )
    with pytest.raises(TypeError, match="got BoringModel and NoneType"):
        TranslationSamples().on_validation_batch_end(trainer, BoringModel(), None, None, 0)


def test_at_least_one_sentence_must_be_wanted():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        TranslationSamples(0)
