"""Tokens, vocabularies and the data module of the translation recipe."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.nmt.data import ParallelText
from recipes.nmt.tokenization import Tokenizer
from recipes.nmt.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary

pytestmark = pytest.mark.usefixtures("no_data_of_the_user")

FILES = [f"{split}_{side}" for split in ("train", "val", "test") for side in ("source", "target")]


@pytest.fixture
def own(tmp_path):
    """Arguments of a data module on six small files; `own(train_source="a\n")` changes one."""

    def arguments(**contents: str | bytes) -> dict[str, str]:
        names = {"pair": "de-en"}
        for name in FILES:
            content = contents.get(name, f"Ein {name}.\nzwei\n")
            path = tmp_path / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            names[name] = str(path)
        return names

    return arguments


# --- tokens ----------------------------------------------------------------------------------


def test_words_are_those_of_moses_in_lower_case_and_unescaped():
    tokenizer = Tokenizer("de")
    line = 'Mr. Müller & "drei" Kinder, z.B. hier.'
    tokens = tokenizer.tokenize(line)
    assert tokens[:5] == ["mr.", "müller", "&", '"', "drei"]
    assert tokens[-4:] == [",", "z.b.", "hier", "."]
    assert tokenizer.detokenize(tokens) == line.lower()
    assert Tokenizer("de", lower_case=False).detokenize(["a", "&amp;", "B", "."]) == "a &amp; B."


@given(st.text(), st.booleans())
def test_characters_are_put_together_to_the_normalised_line(line, lower_case):
    tokenizer = Tokenizer("en", "char", lower_case)
    assert tokenizer.detokenize(tokenizer.tokenize(line)) == tokenizer.normalize(line)


@given(st.text())
def test_tokens_of_any_line_hold_no_blanks_at_word_level(line):
    tokens = Tokenizer("en").tokenize(line)
    assert all(token and not token.isspace() for token in tokens)


@pytest.mark.parametrize("level", ["word", "char"])
def test_very_long_lines_are_tokenized(level):
    line = " ".join(["don't", "stop,"] * 10_000)
    tokenizer = Tokenizer("en", level)
    assert tokenizer.detokenize(tokenizer.tokenize(line)) == line


def test_language_unknown_to_moses_has_english_abbreviations():
    assert Tokenizer("xx").tokenize("Mr. Á, don't") == ["mr.", "á", ",", "don", "'", "t"]


def test_tokenizer_can_be_pickled_and_made_again_from_its_state():
    tokenizer = Tokenizer("fr", "word", False)
    tokenizer.tokenize("L'un, l'autre.")  # now it holds the rules
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize("L'un") == ["L'", "un"]
    assert Tokenizer(**tokenizer.state_dict()) == tokenizer
    assert Tokenizer("de", "word", False) != tokenizer


def test_missing_sacremoses_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    assert Tokenizer("en", "char").tokenize("ab") == ["a", "b"]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-revflip\[recipes\]'"):
        Tokenizer("en").tokenize("a")


# --- vocabulary ------------------------------------------------------------------------------


def test_vocabulary_has_the_most_frequent_tokens_first_and_ties_as_they_appear():
    sentences = [["c", "b"], ["a", "b"], ["d"]]
    assert Vocabulary.of(sentences).tokens[4:] == ["b", "c", "a", "d"]
    assert Vocabulary.of(sentences, min_count=2).tokens[4:] == ["b"]
    assert Vocabulary.of(sentences, max_size=6).tokens[4:] == ["b", "c"]


def test_tokens_that_look_special_are_unknown():
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = Vocabulary.of([[*special, "a"]] * 2)
    assert vocabulary.tokens == [*special, "a"]
    assert vocabulary.encode([*special, "a"]) == [UNKNOWN] * 4 + [4]


def test_decode_inverts_encode_and_stops_at_the_end():
    vocabulary = Vocabulary.of([["a", "b"]])
    numbers = vocabulary.encode(["b", "a", "z"])
    assert numbers == [5, 4, UNKNOWN]
    assert vocabulary.decode([BEGIN, *numbers, PAD, 4, END, 5]) == ["b", "a", "<unk>", "a"]
    assert Vocabulary(**vocabulary.state_dict()) == vocabulary


@pytest.mark.parametrize("tokens", [["a"], ["<pad>", "<unk>", "<bos>", "<eos>", "a", "a"]])
def test_vocabulary_rejects_lists_that_are_none(tokens):
    with pytest.raises(ValueError, match=r"more than once|begins with"):
        Vocabulary(tokens)


def test_vocabulary_without_room_for_tokens_is_rejected():
    with pytest.raises(ValueError, match=r"at most 4 tokens has no room.*Use 5 or more"):
        Vocabulary.of([["a"]], max_size=4)


# --- data module -----------------------------------------------------------------------------


def test_training_pairs_are_limited_filtered_counted_and_keep_their_lines(own, caplog):
    source = "\nEin Satz.\n \nein langer Satz mit Wörtern\nzwei\ndrei\n"
    target = "one\nA sentence.\nx\na long sentence\ntwo\nthree\n"
    data = ParallelText(
        **own(train_source=source, train_target=target, val_source="\nb\n", val_target="\nc\n"),
        max_train_pairs=5,
        max_length=4,
    )
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "2 of 5; left out: 2 with an empty side, 1 longer than 4 tokens" in caplog.text
    (batch,) = data.train_dataloader()
    assert sorted(batch.lines) == [1, 4]
    assert data.target_vocabulary.tokens[4:] == ["a", "sentence", ".", "two"]
    (batch,) = data.val_dataloader()
    assert (batch.lines, batch.source_lengths) == ((0, 1), (1, 2))  # nothing is left out
    assert data.references("val") == ["", "c"]


def test_references_are_the_raw_lines_in_the_order_of_the_file(own):
    data = ParallelText(**own(test_target="A  long, LONG one\nshort\n"))
    assert data.references("test") == ["A  long, LONG one", "short"]


def test_number_words_are_translated_into_characters():
    data = ParallelText(source="numbers", pair="de-fr", max_train_pairs=50)
    data.setup("fit")
    assert (data.source_tokenizer.level, data.target_tokenizer.level) == ("word", "char")
    assert (data.source_tokenizer.lang, data.target_tokenizer.lang) == ("de", "fr")
    assert "z" in data.target_vocabulary.tokens
    assert ParallelText(source="numbers", target_level="word").target_tokenizer.level == "word"


def test_each_split_is_tokenized_once_and_only_when_needed(own, monkeypatch):
    seen = []
    tokenize = Tokenizer.tokenize
    monkeypatch.setattr(
        Tokenizer, "tokenize", lambda s, line: seen.append(line) or tokenize(s, line)
    )
    data = ParallelText(**own())
    for _ in range(2):
        data.setup("fit")
        data.train_dataloader()
        data.val_dataloader()
    assert len(seen) == 8
    data.setup("test")
    data.test_dataloader()
    assert len(seen) == 12


def test_checkpoint_brings_all_that_predict_and_test_need(own, tmp_path):
    arguments = own()
    state = ParallelText(**arguments, source_level="char").state_dict()
    (tmp_path / "input").write_bytes(b"zwei\n\nEin")
    for name in ("train_source", "train_target"):
        Path(arguments[name]).unlink()
        del arguments[name]
    elsewhere = ParallelText(input=str(tmp_path / "input"))
    elsewhere.setup("predict")
    elsewhere.load_state_dict(state)
    (batch,) = elsewhere.predict_dataloader()
    assert (batch.lines, batch.source_lengths) == ((1, 2, 0), (1, 4, 5))
    assert elsewhere.input_lines == ["zwei", "", "Ein"]
    assert elsewhere._corpus is None

    tested = ParallelText(**arguments)
    tested.setup("test")
    tested.load_state_dict(state)
    assert len(tested.test_dataloader()) == 1
    with pytest.raises(ValueError, match="There is no train text. Give it as --data.train_source"):
        tested.setup("fit")


def test_checkpoint_of_another_text_is_rejected(own):
    state = ParallelText(**own(train_target="x\ny\n")).state_dict()
    data = ParallelText(**own())
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"6 tokens by Tokenizer\(en, word, .*the text has other ones"
    ):
        data.load_state_dict(state)
    data.load_state_dict(data.state_dict())


def test_checkpoint_of_other_languages_is_rejected(own):
    state = ParallelText(**own()).state_dict()
    with pytest.raises(ValueError, match="translates de-en, but the data module is set to fr-en"):
        ParallelText(pair="fr-en").load_state_dict(state)
    numbers = ParallelText(source="numbers")
    numbers.setup("test")
    with pytest.raises(ValueError, match="set to en-de"):
        numbers.load_state_dict(state)


def test_ranks_get_their_share_of_every_split(own):
    text = "".join(f"w{n}\n" for n in range(11))
    loaders = []
    for rank in (0, 1):
        data = ParallelText(**own(**dict.fromkeys(FILES, text)), batch_size=4, eval_batch_size=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, overfit_batches=0.0)
        data.setup("fit")
        loaders.append((data.train_dataloader(), data.val_dataloader()))
    for split, count in ((0, 10), (1, 11)):
        lines = [line for own in loaders for batch in own[split] for line in batch.lines]
        assert len(set(lines)) == len(lines) == count


def test_evaluation_of_fewer_pairs_than_processes_is_rejected(own):
    data = ParallelText(**own())
    data.trainer = SimpleNamespace(global_rank=0, world_size=3, overfit_batches=0.0)
    with pytest.raises(ValueError, match="The 2 sentence pairs of val .* over 3 processes"):
        data.val_dataloader()


def test_data_module_can_be_pickled(own):
    data = ParallelText(**own())
    data.setup("fit")
    assert pickle.loads(pickle.dumps(data)).corpus.read("val") == data.corpus.read("val")


def test_prediction_of_an_empty_file_has_no_batch(own, tmp_path):
    (tmp_path / "input").write_text("")
    data = ParallelText(**own(), input=str(tmp_path / "input"))
    assert len(data.predict_dataloader()) == len(list(data.predict_dataloader())) == 0


def test_input_that_cannot_be_read_is_named_before_the_model_runs(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to translate.*--data\.input"):
        ParallelText().setup("predict")
    with pytest.raises(FileNotFoundError, match="no file absent, given as input"):
        ParallelText(input="absent").setup("predict")
    (tmp_path / "input").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="line 2: byte 0xff is not UTF-8"):
        ParallelText(input=str(tmp_path / "input")).setup("predict")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"pair": "de"}, "such as 'de-en', got 'de'"),
        ({"target_level": "bpe"}, "target_level must be 'word', 'char' or None, got 'bpe'"),
    ],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ParallelText(**kwargs)
