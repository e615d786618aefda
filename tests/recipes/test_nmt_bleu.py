"""Corpus BLEU of the NMT recipe, against sacrebleu on the whole corpus."""

import builtins
import copy
import pickle
from itertools import pairwise

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.nmt.bleu import BLEU

PAIRS = [
    ("Two men are at the stove preparing food.", "Two men are at the stove preparing food."),
    ("A man in a blue shirt, standing on a ladder.", "A man in a blue shirt is on a ladder."),
    ("It's a dog's life - isn't it?", "It is a dog's life, isn't it?"),
    ("", "Nothing was translated here."),
    ("Costs $1,000.50 & more", "It costs $1,000.50 &amp; more."),
    ("a group of people", "A group of people stands in front of an igloo."),
    ("Ein Hund läuft über den Schnee .", "Ein Hund läuft über den Schnee."),
]
words = st.lists(st.sampled_from(["a", "b", "A", "c,", "d.", "ü", "-", "3.5"]), max_size=9)
sentences = words.map(" ".join)
pairs = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=12)


def metric_of(pairs, **kwargs):
    metric = BLEU(**kwargs)
    metric.update([h for h, _ in pairs], [r for _, r in pairs])
    return metric


def of_the_whole(pairs, tokenize="13a", lower_case=False):
    hypotheses, references = zip(*pairs, strict=True)
    return sacrebleu.corpus_bleu(
        hypotheses, [references], tokenize=tokenize, lowercase=lower_case
    ).score


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("tokenize", ["13a", "none", "intl"])
@settings(max_examples=30, deadline=None)
@given(pairs=st.one_of(pairs, st.permutations(PAIRS)), cuts=st.lists(st.integers(0, 12)))
def test_batches_add_up_to_the_bleu_of_the_whole(tokenize, lower_case, pairs, cuts):
    metric = BLEU(tokenize, lower_case)
    bounds = sorted([0, *cuts, len(pairs)])
    for first, last in pairwise(bounds):
        metric.update([h for h, _ in pairs[first:last]], [r for _, r in pairs[first:last]])
    score = metric.compute()
    assert score.dtype == torch.float64
    assert score.shape == ()
    assert score.item() == pytest.approx(of_the_whole(pairs, tokenize, lower_case), abs=1e-6)


@pytest.mark.parametrize("cut", range(1, len(PAIRS)))
def test_processes_add_up_to_the_bleu_of_the_whole(cut):
    first, second = metric_of(PAIRS[:cut]), metric_of(PAIRS[cut:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(of_the_whole(PAIRS), abs=1e-6)


def test_states_are_summed_over_processes():
    # What torchmetrics does after gathering: stack the states of all processes and reduce them.
    parts = [metric_of(PAIRS[:2]), metric_of(PAIRS[2:6]), metric_of(PAIRS[6:])]
    whole = BLEU()
    for name, reduce in whole._reductions.items():
        setattr(whole, name, reduce(torch.stack([getattr(part, name) for part in parts])))
    whole._update_count = 1
    assert whole.compute().item() == pytest.approx(of_the_whole(PAIRS), abs=1e-6)


def test_forward_returns_the_bleu_of_the_batch_and_keeps_that_of_all():
    metric = metric_of(PAIRS[1:])
    assert metric(*map(list, zip(*PAIRS[:1], strict=True))).item() == pytest.approx(100)
    assert metric.compute().item() == pytest.approx(of_the_whole(PAIRS), abs=1e-6)


def test_reset_forgets_and_copies_remember():
    metric = metric_of(PAIRS)
    for again in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.half()):
        assert again.compute().item() == pytest.approx(of_the_whole(PAIRS), abs=1e-6)
    metric.reset()
    metric.update(["a b c d"], ["a b c d"])
    assert metric.compute().item() == pytest.approx(100)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric BLEU was called before")
def test_nothing_has_a_bleu_of_zero():
    assert BLEU().compute().item() == 0
    assert metric_of([]).compute().item() == 0
    assert metric_of([("", "a b c d"), ("", "")]).compute().item() == 0


def test_tokenised_text_is_meant_where_no_tokenizer_is(caplog):
    pairs = [("it is so .", "it is so .")] * 100
    metric_of(pairs, tokenize="none")
    assert not caplog.records
    metric_of(pairs)
    assert "forgot to detokenize" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({}, {"nrefs:1", "case:mixed", "tok:13a", "smooth:exp"}),
        ({"tokenize": "none", "lower_case": True}, {"nrefs:1", "case:lc", "tok:none"}),
    ],
)
def test_signature_is_that_of_sacrebleu_and_changes_nothing(kwargs, parts):
    metric = BLEU(**kwargs)
    assert parts <= set(metric.signature.split("|"))
    metric.update(["a b c d"], ["a b c d"])
    before = metric.compute()
    assert f"version:{sacrebleu.__version__}" in metric.signature
    assert metric.compute() == before


def test_as_many_references_as_hypotheses_are_needed():
    with pytest.raises(ValueError, match="got 2 hypotheses and 1 references"):
        BLEU().update(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="Put it into a list"):
        BLEU().update("a", "a")


def test_an_unknown_tokenizer_is_rejected():
    with pytest.raises(ValueError, match="13a, .*got 'moses'"):
        BLEU("moses")


def test_error_without_sacrebleu_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("sacrebleu"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-revflip\[recipes\]'"):
        BLEU()
