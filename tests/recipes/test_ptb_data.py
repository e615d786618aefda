"""Text, vocabulary, streams and windows of the PTB recipe."""

import http.server
import os
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.common.folders import cache_folder
from recipes.ptb import corpus as corpus_module
from recipes.ptb.corpus import EMBEDDED, SPLITS, find_corpus
from recipes.ptb.data import PennTreebank
from recipes.ptb.embedded import build
from recipes.ptb.streams import (
    IGNORED,
    Windows,
    columns_of_rank,
    fixed_lengths,
    parallel_streams,
    variable_lengths,
)
from recipes.ptb.vocabulary import Vocabulary

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Three small files that pass for the published ones, in a folder `ptb`."""
    folder = tmp_path / "data" / "ptb"
    folder.mkdir(parents=True)
    texts = {"train": " the n t \n a N \n", "valid": " the a \n", "test": " b \n"}
    for split, text in texts.items():
        (folder / f"ptb.{split}.txt").write_text(text)
        content = text.encode()
        digest = corpus_module.hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(corpus_module.SHA256, split, digest)
        monkeypatch.setitem(corpus_module.BYTES, split, len(content))
    return folder


def data_on(trainer=None, **kwargs) -> PennTreebank:
    """A data module on the embedded text, set up for training as if by a Trainer."""
    data = PennTreebank(**{"source": "embedded", **kwargs})
    defaults = {
        "global_rank": 0,
        "world_size": 1,
        "current_epoch": 0,
        "max_epochs": 2,
        "reload_dataloaders_every_n_epochs": 1,
    }
    data.trainer = SimpleNamespace(**{**defaults, **(trainer or {})})
    data.setup("fit")
    return data


# --- vocabulary ------------------------------------------------------------------------------


def test_vocabulary_has_the_tokens_of_the_training_text_in_order_of_appearance():
    vocabulary = Vocabulary.of("b a\nb c\n", "word")
    assert vocabulary.tokens == ["<eos>", "<unk>", "b", "a", "c"]


@pytest.mark.parametrize("level", ["word", "char"])
def test_decode_inverts_encode(level):
    text = "no it was n't\nblack monday\n"
    vocabulary = Vocabulary.of(text, level)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_unseen_tokens_become_unk():
    vocabulary = Vocabulary.of("a b\n", "word")
    assert vocabulary.encode("a z\n").tolist() == [2, 1, 0]


@pytest.mark.parametrize("tokens", [["a"], ["<eos>", "<unk>", "a", "a"]])
def test_vocabulary_rejects_lists_that_are_none(tokens):
    with pytest.raises(ValueError, match=r"more than once|begins with"):
        Vocabulary(tokens, "word")


# --- the embedded text -----------------------------------------------------------------------


def test_embedded_text_is_a_small_ptb_like_corpus():
    texts = {split: (EMBEDDED / f"{split}.txt").read_text() for split in SPLITS}
    assert 200_000 < sum(map(len, texts.values())) < 300_000
    counts = Counter(texts["train"].split())
    assert 2_000 < len(counts) < 5_000
    assert min(counts.values()) >= 2
    for text in texts.values():
        assert set(text.split()) <= set(counts)  # rare and unseen words are <unk>
        assert "<unk>" in text
        assert not any(line != line.strip() for line in text.splitlines())
        assert "gutenberg" not in text.lower()


def test_build_splits_contiguously_and_drops_rare_words_by_the_training_part():
    lines = [[f"w{n % 10}", "the"] for n in range(99)] + [["rare", "the"]]
    parts = build.split(lines)
    assert [len(parts[split]) for split in SPLITS] == [86, 7, 7]
    assert parts["test"][-1] == ["<unk>", "the"]
    assert parts["train"] + parts["valid"] + parts["test"][:-1] == lines[:-1]


# --- streams and windows ---------------------------------------------------------------------


@given(
    tokens=st.integers(12, 300), batch=st.integers(1, 10), bptt=st.integers(1, 40), data=st.data()
)
def test_concatenated_windows_restore_the_text_in_order(tokens, batch, bptt, data):
    text = torch.arange(tokens)
    keep_all = data.draw(st.booleans())
    streams = parallel_streams(text, batch, keep_all)
    windows = list(Windows(streams, fixed_lengths(len(streams.inputs), bptt), bptt))

    columns = torch.cat([window.targets for window in windows]).t().flatten()
    read = columns[columns != IGNORED]
    expected = text[1:] if keep_all else text[1 : 1 + (tokens - 1) // batch * batch]
    assert torch.equal(read, expected)
    inputs = torch.cat([window.inputs for window in windows]).t().flatten()
    assert torch.equal(inputs[columns != IGNORED], expected - 1)
    assert tokens - 1 - len(read) < batch
    assert [window.starts_stream for window in windows] == [True] + [False] * (len(windows) - 1)


def test_window_tells_its_length_relative_to_the_nominal_one():
    streams = parallel_streams(torch.arange(211), 1, keep_all=True)
    assert [w.lr_scale for w in Windows(streams, [70, 105, 35], 70)] == [1.0, 1.5, 0.5]


def test_text_shorter_than_the_batch_is_rejected():
    with pytest.raises(ValueError, match="5 tokens cannot be cut into 5 columns"):
        parallel_streams(torch.arange(5), 5, keep_all=True)


def test_variable_lengths_follow_the_distribution_of_the_paper():
    lengths = torch.tensor(variable_lengths(1_000_000, 70, seed=3, epoch=0)[:-1], dtype=torch.float)
    short = lengths < 52.5  # 3.5 standard deviations from either mean
    assert short.float().mean().item() == pytest.approx(0.05, abs=0.006)
    # Truncation to whole steps takes half a step from the mean.
    assert lengths[~short].mean().item() == pytest.approx(69.5, abs=0.2)
    assert lengths[short].mean().item() == pytest.approx(34.5, abs=1.0)
    assert lengths[~short].std().item() == pytest.approx(5.0, abs=0.15)


def test_variable_lengths_are_at_least_five_and_cover_all_steps():
    lengths = variable_lengths(10_007, bptt=6, seed=0, epoch=0)
    assert sum(lengths) == 10_007
    assert min(lengths[:-1]) == 5


def test_variable_lengths_depend_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    first = variable_lengths(5_000, 70, seed=1, epoch=2)
    torch.manual_seed(1)
    assert variable_lengths(5_000, 70, seed=1, epoch=2) == first
    assert variable_lengths(5_000, 70, seed=1, epoch=3) != first
    assert variable_lengths(5_000, 70, seed=2, epoch=2) != first


@given(share=st.integers(1, 8), world_size=st.integers(1, 8))
def test_columns_of_all_ranks_are_all_columns_once(share, world_size):
    batch = share * world_size
    parts = [range(batch)[columns_of_rank(batch, rank, world_size)] for rank in range(world_size)]
    assert [column for part in parts for column in part] == list(range(batch))


def test_batch_that_does_not_divide_over_the_processes_is_rejected():
    with pytest.raises(ValueError, match=r"20 columns .* 3 processes.*multiple of 3"):
        columns_of_rank(20, 0, 3)


def test_interrupted_pass_goes_on_with_the_next_window():
    streams = parallel_streams(torch.arange(100), 2, keep_all=True)
    lengths = [10, 20, 5, 15]
    whole = list(Windows(streams, lengths, 10))
    stopped = Windows(streams, lengths, 10)
    for _, _ in zip(range(2), stopped, strict=False):
        pass

    resumed = Windows(streams, lengths, 10)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == 2
    for window, expected in zip(rest, whole[2:], strict=True):
        assert torch.equal(window.inputs, expected.inputs)
        assert not window.starts_stream
    assert len(list(resumed)) == 4  # the pass after that is a whole one


def test_state_after_a_whole_pass_begins_anew():
    streams = parallel_streams(torch.arange(100), 2, keep_all=True)
    windows = Windows(streams, [25, 25], 25)
    assert len(list(windows)) == 2
    windows.load_state_dict(windows.state_dict())
    assert len(list(windows)) == 2


# --- data module -----------------------------------------------------------------------------


def test_ranks_side_by_side_read_what_one_process_reads():
    one = list(data_on().train_dataloader())
    ranks = [list(data_on({"global_rank": r, "world_size": 2}).train_dataloader()) for r in (0, 1)]
    for window, left, right in zip(one, *ranks, strict=True):
        assert torch.equal(window.inputs, torch.cat([left.inputs, right.inputs], 1))
        assert torch.equal(window.targets, torch.cat([left.targets, right.targets], 1))


def test_every_epoch_has_its_own_windows_over_the_same_columns():
    first = list(data_on().train_dataloader())
    second = list(data_on({"current_epoch": 1}).train_dataloader())
    assert [len(w.inputs) for w in first] != [len(w.inputs) for w in second]
    assert torch.equal(torch.cat([w.inputs for w in first]), torch.cat([w.inputs for w in second]))


def test_evaluation_scores_every_token_of_the_text_once():
    data = data_on(eval_batch_size=7)
    scored = sum((w.targets != IGNORED).sum().item() for w in data.val_dataloader())
    text = (EMBEDDED / "valid.txt").read_text()
    assert scored == len(text.split()) + text.count("\n") - 1


def test_character_level_reads_characters():
    data = data_on(level="char", bptt=10)
    window = next(iter(data.train_dataloader()))
    assert data.vocabulary.decode(window.inputs[:, 0]).startswith("well")
    assert len(data.vocabulary) < 60


def test_warns_if_the_windows_would_be_the_same_in_every_epoch():
    data = data_on({"reload_dataloaders_every_n_epochs": 0})
    with pytest.warns(UserWarning, match="reload_dataloaders_every_n_epochs=1"):
        data.train_dataloader()


def test_vocabulary_travels_in_the_checkpoint_so_that_predict_needs_no_text(tmp_path):
    state = data_on().state_dict()
    elsewhere = PennTreebank(root=str(tmp_path / "nothing"), prompts=["the prince"])
    elsewhere.setup("predict")
    elsewhere.load_state_dict(state)
    (prompt,) = elsewhere.predict_dataloader()
    assert elsewhere.vocabulary.decode(prompt.tokens[:, 0]) == "\nthe prince"


def test_checkpoint_with_another_vocabulary_is_rejected():
    state = data_on(level="char").state_dict()
    with pytest.raises(ValueError, match=r"vocabulary of \d+ char tokens.*another one.*word"):
        data_on().load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bptt": -1}, "bptt must be at least 1"),
        ({"temperature": -0.5}, "temperature must be 0 .* or more"),
    ],
)
def test_sizes_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PennTreebank(**kwargs)


# --- where the text comes from ---------------------------------------------------------------


def test_root_may_be_the_folder_or_its_parent(published):
    for root in (published, published.parent):
        assert find_corpus("auto", root, verify=True).files["test"] == published / "ptb.test.txt"


def test_environment_comes_before_the_cache_and_the_cache_before_the_excerpt(
    published, monkeypatch, tmp_path
):
    assert "embedded" in find_corpus("auto", None, verify=True).description
    cache = tmp_path / "cache" / "lightning_revflip" / "ptb"
    cache.mkdir(parents=True)
    for file in published.iterdir():
        (cache / file.name).write_bytes(file.read_bytes())
    assert find_corpus("auto", None, verify=True).files["train"].parent == cache
    monkeypatch.setenv("REVFLIP_DATA", str(published.parent))
    assert find_corpus("auto", None, verify=True).files["train"].parent == published
    assert "embedded" in find_corpus("embedded", None, verify=True).description


def test_ptb_that_is_not_there_says_how_to_get_it():
    with pytest.raises(
        FileNotFoundError, match=r"--data\.root.*REVFLIP_DATA.*--data\.download true"
    ):
        find_corpus("ptb", None, verify=True)


def test_given_root_without_the_files_never_falls_back_on_the_excerpt(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        find_corpus("auto", tmp_path, verify=True)


def test_missing_file_is_named(published):
    (published / "ptb.valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ptb\.valid\.txt"):
        find_corpus("auto", published, verify=True)


@pytest.mark.parametrize(("text", "state"), [(" the", "truncated"), (" the b \n", "altered")])
def test_changed_file_is_named_unless_it_is_to_be_accepted(published, text, state):
    (published / "ptb.valid.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"ptb\.valid\.txt is not .* looks {state}.*verify false"):
        find_corpus("auto", published, verify=True)
    data = PennTreebank(root=str(published), verify=False)
    assert "not verified" in data.corpus.description


def test_unknown_source_is_rejected():
    with pytest.raises(ValueError, match="'auto', 'ptb' or 'embedded', got 'wikitext'"):
        find_corpus("wikitext", None, verify=True)


@pytest.fixture
def mirror(published, monkeypatch):
    """A local server that holds the three files."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        address = f"http://127.0.0.1:{server.server_port}/ptb.{{split}}.txt"
        monkeypatch.setattr(corpus_module, "URL", address)
        yield published
        server.shutdown()


def test_download_happens_only_when_asked_for_and_fills_the_cache(mirror):
    PennTreebank(source="auto").prepare_data()
    assert not cache_folder("ptb").exists()
    data = PennTreebank(source="ptb", download=True)
    data.prepare_data()
    assert data.corpus.files["train"].parent == cache_folder("ptb")
    assert data.vocabulary.tokens == ["<eos>", "<unk>", "the", "n", "t", "a", "N"]


def test_download_of_other_content_is_rejected(mirror, monkeypatch):
    (mirror / "ptb.train.txt").write_text("something else\n")
    with pytest.raises(RuntimeError, match=r"Could not fetch .*hash.*by hand"):
        PennTreebank(source="ptb", download=True).prepare_data()


# --- the real Penn Treebank ------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_penn_treebank_has_its_published_size():
    data = PennTreebank(source="ptb", root=REAL)
    data.setup("fit")
    data.setup("test")
    assert len(data.vocabulary) == 10_000
    sizes = {split: len(text) for split, text in data._texts.items()}
    assert sizes == {"train": 929_589, "valid": 73_760, "test": 82_430}


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_truncated_real_file_is_noticed(tmp_path):
    for file in Path(REAL, "ptb").iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.name == "ptb.test.txt" else None
        (tmp_path / file.name).write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"ptb\.test\.txt .* looks truncated"):
        PennTreebank(root=str(tmp_path)).setup("fit")
