"""Batches of sentence pairs: columns, buckets, processes and epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.nmt.batches import Batches, BucketSampler, Pair, collate, parts, warn_of_long_lines
from recipes.nmt.data import ParallelText
from recipes.nmt.vocabulary import BEGIN, END, PAD

TOKENS = st.lists(st.integers(4, 50), max_size=12)
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=120)

# --- columns ---------------------------------------------------------------------------------


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8))
def test_columns_hold_the_sentences_with_their_ends_and_padding(sentences):
    batch = collate([Pair(10 + n, *pair) for n, pair in enumerate(sentences)])
    assert batch.lines == tuple(range(10, 10 + len(sentences)))
    assert batch.source.dtype == batch.targets.dtype == batch.target_inputs.dtype == torch.int64
    assert batch.source.shape == (max(batch.source_lengths), len(sentences))
    assert batch.targets.shape == batch.target_inputs.shape
    assert batch.targets.shape == (max(batch.target_lengths), len(sentences))
    for column, (source, target) in enumerate(sentences):
        length = batch.source_lengths[column]
        assert batch.source[:length, column].tolist() == [*source, END]
        assert (batch.source[length:, column] == PAD).all()
        length = batch.target_lengths[column]
        assert batch.target_inputs[:length, column].tolist() == [BEGIN, *target]
        assert batch.targets[:length, column].tolist() == [*target, END]
        assert (batch.target_inputs[length:, column] == PAD).all()
        assert (batch.targets[length:, column] == PAD).all()


def test_batch_without_a_pair_is_rejected():
    with pytest.raises(ValueError, match="at least one sentence pair, got none"):
        collate([])


# --- buckets ---------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 3))
def test_training_reads_every_sentence_once_in_equally_many_batches(lengths, share, ranks, epoch):
    if len(lengths) < ranks:
        return
    samplers = [
        BucketSampler(lengths, share * ranks, train=True, seed=3, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    for side_by_side in zip(*batches, strict=True):
        assert len({len(batch) for batch in side_by_side}) == 1  # every gradient weighs the same
        assert 1 <= len(side_by_side[0]) <= share
    read = [place for own in batches for batch in own for place in batch]
    assert len(set(read)) == len(read) == len(lengths) - len(lengths) % ranks


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
def test_evaluation_reads_every_sentence_once_in_equally_many_batches(lengths, batch_size, ranks):
    samplers = [
        BucketSampler(lengths, batch_size, train=False, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert [len(own) for own in batches] == [len(sampler) for sampler in samplers]
    assert sorted(place for own in batches for batch in own for place in batch) == list(
        range(len(lengths))
    )
    if len(lengths) >= ranks:
        assert len({len(own) for own in batches}) == 1
    assert all(batch for own in batches for batch in own)
    share = -(-batch_size // ranks)
    assert all(len(batch) <= max(share, 2) for own in batches for batch in own)
    for own in batches:
        read = [lengths[place] for batch in own for place in batch]
        assert read == sorted(read)


def test_ranks_side_by_side_read_the_batches_of_one_process():
    lengths = [(n % 17, n % 5) for n in range(400)]
    one = list(BucketSampler(lengths, 8, train=True))
    ranks = [
        list(BucketSampler(lengths, 8, train=True, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    for batch, left, right in zip(one, *ranks, strict=True):
        assert sorted(batch) == sorted(left + right)


def test_training_batches_hold_sentences_of_similar_length():
    generator = torch.Generator().manual_seed(0)
    lengths = [(n, n) for n in torch.randint(1, 60, (5_000,), generator=generator).tolist()]
    spread = [
        max(lengths[place] for place in batch)[0] - min(lengths[place] for place in batch)[0]
        for batch in BucketSampler(lengths, 20, train=True)
    ]
    assert sum(spread) / len(spread) < 2  # of 58 at random


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, **kwargs):
        sampler = BucketSampler([(1, 1)] * 50, 4, train=True, seed=seed, **kwargs)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(1, 2)
    torch.manual_seed(7)
    assert order(1, 2) == first
    assert order(1, 3) != first
    assert order(2, 2) != first
    assert order(1, 2, reshuffle=False) == order(1, 3, reshuffle=False)


def test_batch_that_does_not_divide_over_the_processes_is_rejected():
    with pytest.raises(ValueError, match=r"20 sentences .* 3 processes.*multiple of 3"):
        BucketSampler([(1, 1)] * 50, 20, train=True, world_size=3)


def test_fewer_training_sentences_than_processes_are_rejected():
    with pytest.raises(ValueError, match=r"3 sentence pairs cannot be divided over 4 processes"):
        BucketSampler([(1, 1)] * 3, 4, train=True, world_size=4)


def test_interrupted_pass_goes_on_with_the_next_batch_of_its_epoch():
    def batches(epoch):
        pairs = [Pair(n, [5] * (n % 4), [6]) for n in range(30)]
        loader = Batches(pairs, BucketSampler([(0, 0)] * 30, 4, train=True))
        loader.batch_sampler.set_epoch(epoch)
        return loader

    whole = [batch.lines for batch in batches(1)]
    stopped = batches(1)
    for _, _ in zip(range(3), stopped, strict=False):
        pass
    resumed = batches(1)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.lines for batch in resumed] == whole[3:]
    assert [batch.lines for batch in resumed] == whole  # the pass after that is a whole one
    later = batches(2)
    later.load_state_dict(stopped.state_dict())
    assert len(list(later)) == len(whole)


# --- under a Trainer -------------------------------------------------------------------------


class Reader(LightningModule):
    """Trains nothing to speak of, and remembers which lines each step got."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read = {}

    def note(self, kind, batch):
        self.read.setdefault((kind, self.current_epoch), []).append(batch.lines)

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight * batch.source.sum()

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)
        count = float(len(batch.lines))
        self.log("pairs", count, on_epoch=True, sync_dist=True, reduce_fx="sum", batch_size=1)

    def test_step(self, batch, batch_idx):
        self.note("test", batch)

    def predict_step(self, batch, batch_idx):
        return batch.lines

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def text_files(folder: Path) -> dict[str, str]:
    """Arguments of a data module on small files: 43 training, 11 validation and 7 test pairs."""
    names = {}
    for split, count in (("train", 43), ("val", 11), ("test", 7)):
        for side in ("source", "target"):
            path = folder / f"{split}.{side}"
            if not path.exists():  # another process may be reading it
                path.write_text("".join(f"{'a ' * (n % 6)}{side} {n}\n" for n in range(count)))
            names[f"{split}_{side}"] = str(path)
    return names


def text_on(folder: Path, **kwargs) -> ParallelText:
    defaults = {"pair": "de-en", "batch_size": 4, "eval_batch_size": 4, **text_files(folder)}
    return ParallelText(**{**defaults, **kwargs})


def trainer_in(folder: Path, **kwargs) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "max_epochs": 2,
    }
    return Trainer(**{**defaults, **kwargs})


def reading(folder: Path, ckpt_path=None, seed: int = 1, **kwargs) -> dict:
    model = Reader()
    trainer_in(folder, **kwargs).fit(model, text_on(folder, seed=seed), ckpt_path=ckpt_path)
    return {epoch: lines for (kind, epoch), lines in model.read.items() if kind == "train"}


def test_epochs_differ_and_runs_with_the_same_seed_do_not(tmp_path):
    first = reading(tmp_path)
    assert sorted(line for batch in first[1] for line in batch) == list(range(43))
    assert first[0] != first[1]
    assert reading(tmp_path) == first
    assert reading(tmp_path, seed=2)[0] != first[0]


def test_overfitting_reads_the_same_batches_in_every_epoch(tmp_path):
    epochs = reading(tmp_path, overfit_batches=2)
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 2


@pytest.mark.parametrize(
    ("when", "limit"),
    [
        ({"save_on_train_epoch_end": True}, 1.0),
        ({"save_on_train_epoch_end": False}, 1.0),  # after validation
        ({"save_on_train_epoch_end": True}, 5),
    ],
)
def test_run_resumed_at_an_epoch_end_reads_what_an_uninterrupted_one_reads(tmp_path, when, limit):
    kwargs = {"max_epochs": 3, "limit_train_batches": limit}
    whole = reading(tmp_path, **kwargs)
    checkpoint = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1, **when)
    reading(tmp_path, **kwargs, callbacks=[checkpoint], enable_checkpointing=True)
    resumed = reading(tmp_path, tmp_path / "saved" / "epoch=0.ckpt", **kwargs)
    assert {epoch: lines for epoch, lines in resumed.items() if lines} == {
        epoch: whole[epoch] for epoch in (1, 2)
    }


def test_run_resumed_within_an_epoch_goes_on_with_the_next_batch(tmp_path):
    whole = reading(tmp_path)
    checkpoint = ModelCheckpoint(
        tmp_path / "saved", "{step}", every_n_train_steps=14, save_top_k=-1
    )
    reading(tmp_path, callbacks=[checkpoint], enable_checkpointing=True)
    resumed = reading(tmp_path, tmp_path / "saved" / "step=14.ckpt")
    assert resumed == {1: whole[1][3:]}  # 11 batches in epoch 0


def test_prediction_gets_every_line_once_with_its_number(tmp_path):
    data = text_on(tmp_path)
    trainer_in(tmp_path, max_epochs=1).fit(Reader(), data)
    (tmp_path / "input").write_text("source 3\n\na a a\nunseen")
    elsewhere = ParallelText(input=str(tmp_path / "input"), eval_batch_size=3)
    elsewhere.load_state_dict(data.state_dict())
    predicted = trainer_in(tmp_path).predict(Reader(), elsewhere)
    assert [line for batch in predicted for line in batch] == [1, 3, 0, 2]  # short ones first


# Started by itself under DDP, where each process writes what it read.
SCRIPT = """
import json, sys
from pathlib import Path
from tests.recipes.test_nmt_batches import Reader, text_on, trainer_in

folder = Path(sys.argv[1])
model, data = Reader(), text_on(folder, input=str(folder / "val.source"))
trainer = trainer_in(folder, devices=2, strategy="ddp")
trainer.fit(model, data)
model.read["pairs", 0] = [[int(trainer.callback_metrics["pairs"])]]
trainer.test(model, data)
model.read["predict", 0] = trainer.predict(model, data)
text = json.dumps({f"{kind}{epoch}": lines for (kind, epoch), lines in model.read.items()})
(folder / f"rank{trainer.global_rank}.json").write_text(text)
"""


@pytest.mark.slow
def test_two_processes_divide_the_sentences_under_the_default_ddp_strategy(tmp_path):
    text_files(tmp_path)
    script = tmp_path / "read.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=200)

    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for kind, count in (("train0", 43), ("train1", 43), ("val0", 11), ("predict0", 11)):
        left, right = (rank[kind] for rank in ranks)
        assert len(left) == len(right)
        read = [line for batch in left + right for line in batch]
        assert len(set(read)) == len(read) == count - (count % 2 if "train" in kind else 0)
    assert ranks[0]["train0"] != ranks[0]["train1"]
    assert ranks[0]["pairs0"] == ranks[1]["pairs0"] == [[11]]
    tested = [batch for rank in ranks for kind in rank if "test" in kind for batch in rank[kind]]
    assert sorted(line for batch in tested for line in batch) == list(range(7))


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), padded_tokens=st.integers(1, 90)
)
def test_parts_of_a_batch_hold_every_sentence_once_and_few_tokens(lengths, padded_tokens):
    batch = collate([Pair(i, [5] * length, []) for i, length in enumerate(lengths)])
    found = list(parts(batch, padded_tokens))
    assert sorted(line for part in found for line in part.lines) == list(batch.lines)
    for part in found:
        assert part.source_lengths == tuple(lengths[line] + 1 for line in part.lines)
        assert part.source.shape == (max(part.source_lengths), len(part.lines))
        assert part.source.numel() <= padded_tokens or len(part.lines) == 1


def test_long_lines_are_named():
    with pytest.warns(UserWarning, match=r"Line 8 has 1,001 tokens.*one sentence per line"):
        warn_of_long_lines([Pair(3, [5] * 1000, []), Pair(7, [5] * 1001, [])])
