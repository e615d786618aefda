"""The translator: metrics, search, attention, unknown words, errors."""

from itertools import product

import pytest
import sacrebleu
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from lightning_revflip.callbacks import ReversibleRNN
from lightning_revflip.convert import convert
from recipes.nmt.batches import Batch, Pair, collate, columns
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator
from recipes.nmt.search import length_penalty_of
from recipes.nmt.vocabulary import BEGIN, END, PAD, UNKNOWN
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import (
    CONTEXTS,
    MODES,
    REVERSIBLE,
    far_from_uniform,
    random_batch,
    random_pairs,
    small_model,
    write_text,
)

# --- data, trained model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, str]:
    """Arguments of a data module; what is validated and tested on is learned as well."""
    arguments = write_text(tmp_path_factory.mktemp("text"))
    for split in ("val", "test"):
        for side in ("source", "target"):
            arguments[f"{split}_{side}"] = arguments[f"train_{side}"]
    return arguments


def data_of(text: dict[str, str], **kwargs) -> ParallelText:
    return ParallelText(**{**text, "batch_size": 8, "eval_batch_size": 7, **kwargs})


@pytest.fixture(scope="module", params=MODES)
def trained(request, tmp_path_factory, text) -> tuple[Translator, ParallelText]:
    """A reversible model that knows some of the sentences by now."""
    torch.manual_seed(0)
    model = small_model(
        request.param,
        source_vocab_size=None,
        target_vocab_size=None,
        embedding_size=12,
        hidden_size=24,
        context="embedding+slice:6",
        optimizer="adam",
        lr=0.02,
        max_length_ratio=1.0,
        max_extra_length=4,
    )
    data = data_of(text)
    folder = tmp_path_factory.mktemp("run")
    quiet_trainer(folder, max_epochs=12, callbacks=[ReversibleRNN()]).fit(model, data)
    return model.eval(), data


class Seen(Callback):
    """Keeps the batches of an evaluation."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.batches.append(batch)

    on_test_batch_end = on_validation_batch_end


def logged(tmp_path, stage: str, model: Translator, data: ParallelText):
    """What an evaluation logs, and its batches."""
    seen = Seen()
    trainer = quiet_trainer(tmp_path, callbacks=[seen])
    found = getattr(trainer, stage)(model, data, verbose=False)[0]
    return found, seen.batches


# --- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_perplexity_is_that_of_a_direct_count_over_all_target_tokens(tmp_path, trained, split):
    model, data = trained
    found, _ = logged(tmp_path, {"val": "validate", "test": "test"}[split], model, data)
    total = count = 0
    for source, target in zip(*data.corpus.read(split), strict=True):
        read = data.source_vocabulary.encode(data.source_tokenizer.tokenize(source))
        said = data.target_vocabulary.encode(data.target_tokenizer.tokenize(target))
        with torch.no_grad():
            log_probs = model(collate([Pair(0, read, said)]))[:, 0].double().log_softmax(-1)
        for step, token in enumerate([*said, END]):
            total -= log_probs[step, token].item()
            count += 1
    assert found[f"{split}/perplexity"] == pytest.approx(
        torch.tensor(total / count).exp().item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("stage", "split", "beam_size"), [("validate", "val", 1), ("test", "test", 3)]
)
def test_scores_are_those_of_the_translations(tmp_path, trained, stage, split, beam_size):
    """Greedy ones in validation, by beam search in the test; one sentence at a time here."""
    model, data = trained
    model.hparams["beam_size"] = 3
    found, batches = logged(tmp_path, stage, model, data)
    references = data.corpus.read(split)[1]
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    for batch in batches:
        for column, line in enumerate(batch.lines):
            length = batch.source_lengths[column]
            alone = batch._replace(
                source=batch.source[:length, column : column + 1], source_lengths=(length,)
            )
            (translation,) = model.translate(alone, beam_size)
            tokens[line] = [data.target_vocabulary.tokens[n] for n in translation.tokens]
            texts[line] = data.target_tokenizer.detokenize(tokens[line])
    hypotheses = [texts[line] for line in range(len(references))]
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], lowercase=True)
    tokenized = sacrebleu.corpus_bleu(
        [" ".join(tokens[line]) for line in range(len(references))],
        [[" ".join(data.target_tokenizer.tokenize(line)) for line in references]],
        tokenize="none",
        force=True,
    )
    pairs = zip(hypotheses, references, strict=True)
    exact = [hypothesis == reference.lower() for hypothesis, reference in pairs]
    assert found[f"{split}/bleu"] == pytest.approx(bleu.score, rel=1e-5)
    assert found[f"{split}/bleu_tokenized"] == pytest.approx(tokenized.score, rel=1e-5)
    assert found[f"{split}/exact_match"] == pytest.approx(sum(exact) / len(exact))
    assert 5 < bleu.score < 100
    assert 0 < sum(exact) < len(exact)
    other = [model.translate(batch, 4 - beam_size) for batch in batches]
    assert any(
        [data.target_vocabulary.tokens[n] for n in translation.tokens] != tokens[line]
        for batch, translations in zip(batches, other, strict=True)
        for line, translation in zip(batch.lines, translations, strict=True)
    )


def test_training_logs_its_loss_perplexity_and_rate(tmp_path, text):
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.fit(small_model(source_vocab_size=None, lr=0.01), data_of(text))
    found = trainer.callback_metrics
    assert found["train/lr"] == pytest.approx(0.01)
    # nearly untrained: about as likely as any other word
    size = len(trainer.datamodule.target_vocabulary)
    assert found["train/perplexity"] == pytest.approx(size, rel=0.2)
    assert found["train/loss"].exp() == pytest.approx(size, rel=0.2)


# --- search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("converted", [False, True], ids=["ordinary", "reversible"])
def test_translate_takes_the_likeliest_word_after_all_words_so_far(cell, converted):
    model = small_model(cell=cell, num_layers=2, context="embedding+slice:4", max_extra_length=3)
    if converted:
        convert(model, REVERSIBLE)
    far_from_uniform(model)
    sentences = random_pairs()
    found = model.translate(collate(sentences))
    for one, translation in zip(sentences, found, strict=True):
        tokens: list[int] = []
        limit = 2 * (len(one.source) + 1) + 3
        while len(tokens) < limit:
            logits = model(collate([one._replace(target=tokens)]))[-1, 0]
            logits[[PAD, BEGIN]] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == END:
                break
        assert translation.finished == (tokens[-1] == END)
        assert translation.tokens == [token for token in tokens if token != END]
    assert len({tuple(translation.tokens) for translation in found}) > 2


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_beam_search_finds_the_best_of_all_short_translations(cell, alpha):
    size = 7  # three words
    model = small_model(
        cell=cell,
        target_vocab_size=size,
        context="embedding+slice:4",
        max_length_ratio=0.0,
        max_extra_length=3,
        length_penalty=alpha,
    )
    convert(model, REVERSIBLE)
    with torch.no_grad():
        far_from_uniform(model).generator.bias[END] -= 6.0
    sentences = random_pairs()
    found = model.translate(collate(sentences), beam_size=size**3)
    words = [UNKNOWN, *range(END + 1, size)]
    for one, translation in zip(sentences, found, strict=True):
        scores = {}
        for tokens in [list(w) for length in range(3) for w in product(words, repeat=length)]:
            with torch.no_grad():
                logits = model(collate([one._replace(target=tokens)]))[:, 0]
            chosen = one_hot(torch.tensor([*tokens, END]), size).bool()
            total = logits.log_softmax(-1)[chosen].sum().item()
            scores[tuple(tokens)] = total / length_penalty_of(len(tokens) + 1, alpha)
        best = max(scores, key=scores.__getitem__)
        assert translation.tokens == list(best)
        assert translation.score == pytest.approx(scores[best], rel=1e-4)
    if alpha:  # or else the empty translation is the likeliest
        assert len({tuple(translation.tokens) for translation in found}) > 1


def test_translations_are_as_long_as_the_limits_allow():
    model = far_from_uniform(small_model(max_length_ratio=1.5, max_extra_length=2))
    with torch.no_grad():
        model.generator.bias[END] = -1e9
    lengths = [len(t.tokens) for beam in (1, 2) for t in model.translate(random_batch(), beam)]
    steps = [6, 2, 8, 1, 4]  # of the source, with its end
    assert lengths == [int(1.5 * length) + 2 for length in steps] * 2


# --- attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
def test_attention_weights_are_shares_of_the_source_steps_for_each_token(context):
    model = far_from_uniform(small_model(context=context))
    batch = random_batch()
    translations = [[5, 6, 7], [4], [8, 9], [], [4, 5, 6, 7, 8]]
    found = model.attention_weights(batch, translations)
    steps = [6, 2, 8, 1, 4]
    assert [tuple(weights.shape) for weights in found] == [
        (len(tokens), length) for tokens, length in zip(translations, steps, strict=True)
    ]
    for weights, one, tokens in zip(found, random_pairs(), translations, strict=True):
        torch.testing.assert_close(weights.sum(1), torch.ones(len(tokens)))
        (alone,) = model.attention_weights(collate([one]), [tokens])
        torch.testing.assert_close(weights, alone)

    source, state = model.encode(batch.source, batch.source_lengths)
    _, weights, _ = model.decode(batch.target_inputs, batch.target_lengths, source, state)
    real = torch.arange(8) < torch.tensor(steps)[:, None]
    assert (weights[:, ~real] == 0).all()
    assert (weights[:, real] > 0).any()


def test_an_unknown_word_becomes_the_source_word_it_attended_to_most(tmp_path, text):
    lines = ["eins Zebra drei", "vier", "Yak Zebra Gnu fünf Yak", "Gnu sechs", ""]
    (tmp_path / "input").write_text("\n".join(lines) + "\n")
    data = data_of(text, input=str(tmp_path / "input"))
    sizes = len(data.source_vocabulary), len(data.target_vocabulary)
    model = far_from_uniform(
        small_model(
            source_vocab_size=sizes[0],
            target_vocab_size=sizes[1],
            context="embedding",
            max_length_ratio=0.0,
            max_extra_length=3,
            beam_size=2,
        )
    )
    word = data.target_vocabulary.encode(["two"])[0]
    with torch.no_grad():  # `<unk>` or "two", and never the end
        model.generator.bias.fill_(-100.0)
        model.generator.bias[[UNKNOWN, word]] = 0.0
    predicted = quiet_trainer(tmp_path).predict(model, data)
    found = {line: text for part in predicted for line, text in zip(*part, strict=True)}

    copied = set()
    for number, line in enumerate(lines[:-1]):
        source = line.lower().split()
        encoded = data.source_vocabulary.encode(source)
        batch = collate([Pair(0, encoded, [])])
        (translation,) = model.translate(batch, 2)
        embedded = model.source_embedding(batch.source)[:, 0]
        read = columns([[BEGIN, *translation.tokens[:-1]]])
        with torch.no_grad():
            _, state = model.encoder(embedded.unsqueeze(1))
            hidden, _ = model.decoder(model.target_embedding(read), state)
            scores = model.attention.query(hidden[:, 0]) @ embedded.T
        closest = scores[:, : len(source)].argmax(1).tolist()  # the end is no word
        words = [
            source[step] if token == UNKNOWN else "two"
            for token, step in zip(translation.tokens, closest, strict=True)
        ]
        assert found[number] == " ".join(words)
        copied |= set(words)
    assert found[4] == ""
    assert copied & {"zebra", "yak", "gnu"}
    assert "two" in copied


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cell": "rnn"}, "'lstm' or 'gru', got 'rnn'"),
        ({"optimizer": "adamw"}, "'sgd' or 'adam', got 'adamw'"),
        ({"memory": "little"}, "'plain' or 'sequence', got 'little'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"divide_lr_by": 1.0}, "divide_lr_by must be above 1 for rates to fall, got 1.0"),
        ({"context": "all"}, "context must be 'hidden' .* got 'all'"),
        ({"context": "slice:9"}, "asks for 9 units, .* has 8. Use 'hidden'"),
        ({"memory": "sequence", "chunk_steps": 0}, "at least 1, or None to choose.*got 0"),
        ({"chunk_steps": 8}, "needs memory='sequence'; got 8 with memory='plain'"),
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0, got -1.0"),
        ({"max_length_ratio": -1.0}, "max_length_ratio must be at least 0, got -1.0"),
        ({"max_extra_length": 0}, "max_extra_length must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"embedding_size": 0}, "embedding_size must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


@pytest.mark.parametrize("memory", MODES)
def test_layers_that_do_not_exist_yet_are_explained(memory):
    model = small_model(memory, target_vocab_size=None)
    for use in (model.negative_log_likelihood, model.translate, model.forward):
        with pytest.raises(RuntimeError, match=r"do not exist yet. Give .*vocab_size=\.\.\."):
            use(random_batch())


class Other(LightningDataModule):
    """No ParallelText."""

    def train_dataloader(self):
        return DataLoader([random_batch()], batch_size=None)

    val_dataloader = predict_dataloader = train_dataloader


def test_other_data_modules_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"not known: .* not a ParallelText. Give Translator\(sou"):
        quiet_trainer(tmp_path).fit(small_model(source_vocab_size=None), Other())
    for stage in ("validate", "predict"):
        with pytest.raises(RuntimeError, match="needs a ParallelText as data module"):
            getattr(quiet_trainer(tmp_path), stage)(small_model(), Other())
