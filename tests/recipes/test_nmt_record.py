"""What a test of the translator leaves: its translations, in order, for reading and for W&B."""

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from recipes.nmt.batches import select
from recipes.nmt.data import ParallelText
from recipes.nmt.record import TranslationRecord
from tests.helpers.loggers import RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import far_from_uniform, small_model, write_text


@pytest.fixture
def data(tmp_path) -> ParallelText:
    return ParallelText(**write_text(tmp_path), batch_size=8, eval_batch_size=4)


def test_record_has_a_line_for_each_sentence_of_the_test(tmp_path, data):
    data.setup("test")
    sizes = {
        "source_vocab_size": len(data.source_vocabulary),
        "target_vocab_size": len(data.target_vocabulary),
    }
    model = far_from_uniform(small_model(beam_size=1, **sizes))
    loggers = [CSVLogger(tmp_path, "name", "version"), RecordingWandb(tmp_path)]
    trainer = quiet_trainer(tmp_path, logger=loggers, callbacks=[TranslationRecord()])
    trainer.test(model, data, verbose=False)

    header, *rows = (tmp_path / "name" / "version" / "translations.tsv").read_text().splitlines()
    assert header == "source\ttranslation\treference"
    sources, references = data.corpus.read("test")
    expected = {}
    for batch in data.test_dataloader():
        for place, line in enumerate(batch.lines):
            (translation,) = model.translate(select(batch, [place]))
            words = data.target_vocabulary.decode(translation.tokens)
            expected[line] = data.target_tokenizer.detokenize(words)
    lines = [(sources[i], expected[i], references[i]) for i in range(len(sources))]
    assert [tuple(row.split("\t")) for row in rows] == lines
    assert len({translation for _, translation, _ in lines}) > 1

    (artifact,) = loggers[1].artifacts
    assert (artifact.name, artifact.type) == ("translations-x1", "translations")
    assert set(artifact.manifest.entries) == {"translations.tsv"}


def test_models_and_data_of_another_kind_are_rejected(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[TranslationRecord()])
    with pytest.raises(TypeError, match="got BoringModel and NoneType"):
        trainer.test(BoringModel(), verbose=False)
