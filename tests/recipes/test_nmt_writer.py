"""What `revflip predict` writes with the NMT recipe, under a real Trainer."""

import multiprocessing
import random
import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from recipes.nmt.writer import Translated, TranslationWriter, in_order, write_atomically

INPUT = ["guten Tag", "", "ja", "ein Hund läuft", "", "nein", "so"]


class Lines(LightningDataModule):
    """Gives (line, sentence) pairs, in an order that is not the input's."""

    def __init__(self, sentences, batch_size=3):
        super().__init__()
        self.sentences = sentences
        self.batch_size = batch_size

    def setup(self, stage):
        self.input_lines = list(self.sentences)

    def teardown(self, stage):
        del self.input_lines

    def predict_dataloader(self):
        pairs = list(enumerate(self.sentences))
        random.Random(0).shuffle(pairs)
        return DataLoader(pairs, batch_size=self.batch_size, collate_fn=list)


class Upper(LightningModule):
    """Translates into upper case."""

    def predict_step(self, batch):
        lines, sentences = zip(*batch, strict=True)
        return Translated(lines, [sentence.upper() for sentence in sentences])


def predict(writer, sentences=INPUT, model=None, data=None, **kwargs):
    """Run a prediction; returns the Trainer."""
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, **kwargs},
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.predict(model or Upper(), datamodule=data or Lines(sentences), return_predictions=False)
    return trainer


def expected(sentences=INPUT):
    return "".join(f"{sentence.upper()}\n" for sentence in sentences).encode()


# --- what is written -------------------------------------------------------------------------


def test_every_input_line_has_its_line_in_the_output(tmp_path):
    path = tmp_path / "new folder" / "out.txt"
    predict(TranslationWriter(str(path)))
    assert path.read_bytes() == expected()
    assert list(path.parent.iterdir()) == [path]


def test_without_a_path_translations_are_printed(capsys):
    predict(TranslationWriter())
    assert capsys.readouterr().out.encode() == expected()


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize("path", [None, "out.txt"])
def test_no_input_has_an_empty_output(tmp_path, capsys, path):
    writer = TranslationWriter(path and str(tmp_path / path))
    predict(writer, [])
    if path:
        assert (tmp_path / path).read_bytes() == b""
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_a_writer_serves_one_prediction_after_another(tmp_path):
    writer = TranslationWriter(str(tmp_path / "out.txt"), overwrite=True)
    for sentences in (INPUT, [], ["eins"], INPUT[::-1]):
        predict(writer, sentences)
        assert (tmp_path / "out.txt").read_bytes() == expected(sentences)


def test_line_breaks_within_a_translation_become_spaces():
    texts = ["a\nb", "c\r\nd", "e\rf", "g\u2028h", "\n", "i j"]
    assert in_order(list(enumerate(texts)), 6) == ["a b", "c d", "e f", "g h", "", "i j"]


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin",
    reason="starts its processes by fork",
)
@pytest.mark.parametrize("sentences", [INPUT, INPUT[:2], []], ids=len)
def test_the_first_process_writes_what_all_have_translated(tmp_path, monkeypatch, sentences):
    path = tmp_path / "out.txt"

    def recorded(*args):
        write_atomically(*args)
        with (tmp_path / "writes").open("a") as file:
            file.write("written\n")

    monkeypatch.setattr("recipes.nmt.writer.write_atomically", recorded)
    predict(
        TranslationWriter(str(path)),
        data=Lines(sentences, batch_size=1),
        strategy="ddp_fork",
        devices=2,
    )
    assert path.read_bytes() == expected(sentences)
    assert (tmp_path / "writes").read_text() == "written\n"


# --- files that exist ------------------------------------------------------------------------


class Untouched(Upper):
    """Fails if it is asked for anything."""

    def predict_step(self, batch):
        raise AssertionError("translation has started")


def test_an_existing_file_is_refused_before_translating(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out.txt exists. Give .* or overwrite=True"):
        predict(TranslationWriter(str(path)), model=Untouched())
    assert path.read_text() == "precious"
    predict(TranslationWriter(str(path), overwrite=True))
    assert path.read_bytes() == expected()


def test_only_files_are_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="is not a file. Give TranslationWriter another path"):
        predict(TranslationWriter(str(tmp_path), overwrite=True), model=Untouched())


def test_a_link_is_kept_and_its_file_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real.txt")
    predict(TranslationWriter(str(link), overwrite=True))
    assert link.is_symlink()
    assert (tmp_path / "real.txt").read_bytes() == expected()


def test_a_failed_prediction_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(AssertionError, match="translation has started"):
        predict(TranslationWriter(str(path), overwrite=True), model=Untouched())
    assert path.read_text() == "old"


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a \ud800 character")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- errors ----------------------------------------------------------------------------------


def test_lines_without_a_translation_are_named(tmp_path):
    path = tmp_path / "out.txt"
    first = [line for line, _ in next(iter(Lines(INPUT).predict_dataloader()))]
    missing = min(set(range(len(INPUT))) - set(first))
    with pytest.raises(RuntimeError, match=f"Line {missing} .*; 4 of 7 lines have none"):
        predict(TranslationWriter(str(path)), limit_predict_batches=1)
    with pytest.raises(RuntimeError, match="Line 0 .*; 7 of 7 lines have none"):
        predict(TranslationWriter(str(path)), limit_predict_batches=0)
    assert not path.exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [([0, 2, 1, 2], "Line 2 .* twice"), ([0, 1, 2, 3], "Line 3 .* the input has 3 lines")],
)
def test_lines_that_are_not_of_the_input_or_come_twice_are_named(lines, message):
    with pytest.raises(RuntimeError, match=message):
        in_order([(line, "") for line in lines], 3)


def test_predictions_of_another_type_are_rejected():
    class Shapes(Upper):
        def predict_step(self, batch):
            return torch.zeros(3)

    with pytest.raises(TypeError, match="of type Translated, got .* of type Tensor from Shapes"):
        predict(TranslationWriter(), model=Shapes())


def test_predictions_with_more_lines_than_texts_are_rejected():
    class Forgetful(Upper):
        def predict_step(self, batch):
            return Translated((0, 1, 2), ["a", "b"])

    with pytest.raises(ValueError, match="got 3 lines and 2 texts"):
        predict(TranslationWriter(), model=Forgetful())


def test_a_data_module_without_input_lines_is_rejected():
    class Other(Lines):
        def setup(self, stage):
            self.input_lines = None

    with pytest.raises(TypeError, match="`input_lines` after its setup, got Other with NoneType"):
        predict(TranslationWriter(), data=Other(INPUT), model=Untouched())


def test_other_stages_are_left_alone(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("precious")
    writer = TranslationWriter(str(path))
    for stage in ("fit", "validate", "test"):
        writer.setup(None, None, stage)
        writer.teardown(None, None, stage)
    assert path.read_text() == "precious"
