"""Where the sentence pairs of the translation recipe come from."""

import gzip
import hashlib
import http.server
import os
import pickle
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.common.folders import cache_folder
from recipes.nmt import corpus as corpus_module
from recipes.nmt.corpus import find_corpus, read_lines
from recipes.nmt.data import ParallelText
from recipes.nmt.numbers import LARGEST, SIZES, number_splits, number_words, read_numbers

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Small files in three languages that pass for the published ones, in a folder `multi30k`."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    for stem in ("train", "val", *corpus_module.TEST_SETS):
        for language in ("de", "en", "fr"):
            content = gzip.compress(f"{stem} one\n{language}\n".encode())
            (folder / f"{stem}.{language}.gz").write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            monkeypatch.setitem(corpus_module.SHA256, f"{stem}.{language}", digest)
    return folder


# --- lines -----------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))))
def test_lines_are_cut_at_line_breaks_and_nowhere_else(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines.gz"
    for line_break in ("\n", "\r\n"):
        text = "".join(line + line_break for line in lines).encode()
        path.write_bytes(gzip.compress(text))
        if text.startswith(b"\xef\xbb\xbf"):  # a byte order mark belongs to no line
            continue
        assert read_lines(path) == lines


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n\nb", ["a", "", "b"]),
        ("a\u2028b\x85c\x0bd\n".encode(), ["a\u2028b\x85c\x0bd"]),
        (b"a\rb\r\n", ["a\rb"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
    ],
)
def test_final_line_break_begins_no_line_and_unicode_separators_are_text(tmp_path, content, lines):
    (tmp_path / "text").write_bytes(content)
    assert read_lines(tmp_path / "text") == lines


def test_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "text").write_bytes(b"one\ntwo\nM\xe4nner\n")
    with pytest.raises(ValueError, match=r"text, line 3: byte 0xe4 is not UTF-8.*iconv"):
        read_lines(tmp_path / "text")


@pytest.mark.parametrize(
    "content",
    [b"plain text", gzip.compress(b"a\n" * 99, mtime=0)[:-9], b"\x1f\x8b\x08"],
    ids=["text", "cut off", "header"],
)
def test_broken_gzip_file_is_named(tmp_path, content):
    (tmp_path / "text.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.gz is not a whole gzip file"):
        read_lines(tmp_path / "text.gz")


# --- number words ----------------------------------------------------------------------------


def test_number_splits_are_disjoint_and_the_same_every_time():
    splits = number_splits()
    numbers = [number for split in splits.values() for number in split]
    assert {split: len(own) for split, own in splits.items()} == SIZES
    assert len(set(numbers)) == len(numbers) == 13_000
    assert 0 <= min(numbers) <= max(numbers) <= LARGEST
    number_splits.cache_clear()
    assert number_splits() == splits
    assert number_splits(seed=2) != splits


def test_short_numbers_are_covered_well_and_so_is_every_split():
    splits = number_splits()
    share = {split: sum(n < 1_000 for n in own) / len(own) for split, own in splits.items()}
    assert all(0.04 < value < 0.11 for value in share.values())  # 0.01 if drawn uniformly
    assert sum(n < 1_000 for own in splits.values() for n in own) > 900
    assert sum(n > 50_000 for n in splits["train"]) > 3_000


def test_numbers_are_read_in_two_languages():
    german, english = read_numbers("de", "en", "val")
    assert german == number_words(number_splits()["val"], "de")
    assert len(english) == 500
    assert number_words([21], "fr") == ["vingt et un"]


def test_missing_num2words_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-revflip\[recipes\]'"):
        number_words([1], "en")


# --- files of your own -----------------------------------------------------------------------


def pair_of_files(folder: Path, split: str, source: str = "a\n", target: str = "b\n") -> dict:
    names = {}
    for side, text in (("source", source), ("target", target)):
        path = folder / f"{split}.{side}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        names[f"{split}_{side}"] = str(path)
    return names


def test_files_are_taken_whatever_else_there_is(tmp_path, published, monkeypatch):
    monkeypatch.setenv("REVFLIP_DATA", str(published.parent))
    data = ParallelText(pair="pt-nl", **pair_of_files(tmp_path, "train"))
    assert data.source == "files"
    assert data.corpus.read("train") == (["a"], ["b"])
    assert (data.corpus.source_lang, data.corpus.target_lang) == ("pt", "nl")
    assert "pt-nl files" in data.corpus.description
    assert pickle.loads(pickle.dumps(data.corpus)).read("train") == (["a"], ["b"])


def test_files_of_different_lengths_are_rejected_with_both_counts(tmp_path):
    data = ParallelText(pair="de-en", **pair_of_files(tmp_path, "test", "a\n\n", "b\nc\nd"))
    with pytest.raises(ValueError, match=r"test\.source\.gz has 2 lines, but .*target\.gz has 3"):
        data.setup("test")


def test_split_without_files_is_named_when_it_is_needed(tmp_path):
    data = ParallelText(pair="de-en", **pair_of_files(tmp_path, "train"))
    with pytest.raises(ValueError, match=r"no val text.*--data\.val_source and --data\.val_target"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "wmt"}, "'auto', 'multi30k', 'files' or 'numbers', got 'wmt'"),
        ({"source": "files"}, "source is 'files', but no file is given"),
        ({"source": "numbers", "train_source": "a"}, "source is 'numbers', but train_source"),
        ({"source": "multi30k", "val_target": "a"}, "source is 'multi30k', but val_target"),
        ({"source": "numbers", "root": "a"}, "root would have no effect.*source is 'numbers'"),
        ({"source": "numbers", "download": True}, "download would have no effect"),
        ({"source": "numbers", "test_set": "test_2018_flickr"}, "test_set would have no effect"),
        ({"train_source": "a", "train_target": "b", "root": "c"}, "root would have no effect"),
        ({"train_source": "a"}, "train needs two files of sentences, but train_target is missing"),
        ({"test_set": "test_2019"}, "test_set must be one of .*, got 'test_2019'"),
    ],
)
def test_contradictions_are_rejected_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ParallelText(**kwargs)


def test_files_need_languages_and_must_be_there(tmp_path):
    names = pair_of_files(tmp_path, "train")
    with pytest.raises(ValueError, match=r"languages of your files.*--data\.pair"):
        _ = ParallelText(**names).corpus
    Path(names["train_target"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"target\.gz, given as train_target"):
        _ = ParallelText(pair="de-en", **names).corpus


# --- Multi30k --------------------------------------------------------------------------------


def test_root_may_be_the_folder_or_its_parent(published):
    for root in (published, published.parent):
        corpus = find_corpus("auto", root=root)
        assert corpus.read("test") == (
            ["test_2016_flickr one", "de"],
            ["test_2016_flickr one", "en"],
        )
        assert (corpus.source_lang, corpus.target_lang, corpus.target_level) == ("de", "en", "word")


@pytest.mark.parametrize("pair", ["de-en", "en-de", "fr-de", "en-fr"])
@pytest.mark.parametrize("test_set", corpus_module.TEST_SETS)
def test_languages_go_in_any_direction_and_the_test_set_can_be_chosen(published, pair, test_set):
    corpus = find_corpus("multi30k", pair, published, test_set=test_set)
    source, target = corpus.read("test")
    assert source[0] == target[0] == f"{test_set} one"
    assert f"{source[1]}-{target[1]}" == pair


def test_environment_comes_before_the_cache_and_the_cache_before_number_words(
    published, monkeypatch
):
    numbers = find_corpus("auto")
    assert "number words en-de" in numbers.description
    assert len(numbers.read("val")[0]) == 500
    cache = cache_folder("multi30k")
    cache.mkdir(parents=True)
    for file in published.iterdir():
        (cache / file.name).write_bytes(file.read_bytes())
    assert str(cache) in find_corpus("auto").description
    monkeypatch.setenv("REVFLIP_DATA", str(published.parent))
    assert str(published) in find_corpus("auto").description
    assert "number words" in find_corpus("numbers").description


def test_what_was_found_is_said(published, caplog):
    with caplog.at_level("INFO"):
        _ = ParallelText(root=str(published)).corpus
    assert f"Text: Multi30k de-en in {published}" in caplog.text


def test_multi30k_that_is_not_there_says_how_to_get_it(tmp_path):
    for arguments in (
        {"source": "multi30k"},
        {"source": "auto", "root": tmp_path},
        {"source": "auto", "test_set": "test_2018_flickr"},
    ):
        with pytest.raises(
            FileNotFoundError, match=r"--data\.root.*REVFLIP_DATA.*--data\.download true.*numbers"
        ):
            find_corpus(**arguments)


@pytest.mark.parametrize("source", ["multi30k", "numbers"])
@pytest.mark.parametrize("pair", ["cs-en", "de-de"])
def test_other_languages_are_rejected(source, pair):
    with pytest.raises(ValueError, match=f"two of de, en, fr, got '{pair}'.*--data.train_source"):
        find_corpus(source, pair)


def test_missing_file_is_named(published):
    (published / "val.en.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks val\.en\.gz\. "):
        find_corpus("auto", root=published)
    assert find_corpus("auto", "fr-de", published).read("val")[1][1] == "de"  # needs no English


def test_changed_file_is_named_unless_it_is_to_be_accepted(published):
    (published / "val.en.gz").write_bytes(gzip.compress(b"x\ny\n"))
    with pytest.raises(ValueError, match=r"val\.en\.gz is not the published.*verify false"):
        find_corpus("auto", root=published)
    corpus = find_corpus("auto", root=published, verify=False)
    assert "not verified" in corpus.description
    assert corpus.read("val")[1] == ["x", "y"]


@pytest.fixture
def mirror(published, monkeypatch):
    """A local server that holds the files."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        address = f"http://127.0.0.1:{server.server_port}/{{name}}.gz"
        monkeypatch.setattr(corpus_module, "URL", address)
        yield published
        server.shutdown()


def test_download_happens_only_when_asked_for_and_fills_the_cache(mirror):
    ParallelText().prepare_data()
    assert not cache_folder("multi30k").exists()
    data = ParallelText(pair="fr-en", download=True)
    data.prepare_data()
    assert {file.name for file in cache_folder("multi30k").iterdir()} == {
        f"{stem}.{language}.gz"
        for stem in ("train", "val", "test_2016_flickr")
        for language in ("fr", "en")
    }
    assert data.corpus.read("train")[0] == ["train one", "fr"]


def test_download_goes_to_the_root_and_adds_what_is_missing(mirror, tmp_path):
    root = tmp_path / "mine"
    ParallelText(root=str(root), download=True).prepare_data()
    data = ParallelText(root=str(root), download=True, test_set="test_2018_flickr")
    data.prepare_data()
    assert data.references("test") == ["test_2018_flickr one", "en"]


def test_download_of_other_content_is_rejected(mirror):
    (mirror / "train.de.gz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"Could not fetch .*hash.*by hand"):
        ParallelText(download=True).prepare_data()


# --- the real Multi30k -----------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
@pytest.mark.parametrize("pair", ["de-en", "fr-de"])
def test_real_multi30k_has_its_published_size(pair):
    sizes = {"test_2016_flickr": 1_000, "test_2017_flickr": 1_000, "test_2018_flickr": 1_071}
    for test_set, size in sizes.items():
        corpus = find_corpus("multi30k", pair, REAL, test_set=test_set)
        lines = {split: corpus.read(split) for split in ("train", "val", "test")}
        assert {split: len(both[0]) for split, both in lines.items()} == {
            "train": 29_000,
            "val": 1_014,
            "test": size,
        }


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_multi30k_is_read_in_full():
    data = ParallelText(source="multi30k", root=REAL)
    data.setup("fit")
    assert (len(data.source_vocabulary), len(data.target_vocabulary)) == (18_678, 10_215)
    batches = list(data.train_dataloader())
    assert sorted(line for batch in batches for line in batch.lines) == list(range(29_000))
    padding = sum((batch.source == 0).sum().item() for batch in batches)
    assert padding < 0.03 * sum(batch.source.numel() for batch in batches)


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_truncated_real_file_is_noticed(tmp_path):
    for file in Path(REAL, "multi30k").iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.name == "val.de.gz" else None
        (tmp_path / file.name).write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"val\.de\.gz is not the published .* truncated"):
        ParallelText(root=str(tmp_path)).setup("fit")
