"""Batches of images: how they are drawn and divided among processes."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from recipes.mnist.batches import Batches, DividedSampler
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier


def read(sampler: DividedSampler, epoch: int = 0) -> list[list[int]]:
    """Places of the images in each batch."""
    sampler.set_epoch(epoch)
    batches = [places.tolist() for places in sampler]
    assert len(batches) == len(sampler)
    return batches


def numbered(images: int, **kwargs: int | bool) -> Batches:
    """Images whose only pixel is their number."""
    numbers = torch.arange(images)
    sampler = DividedSampler(images, 4, train=True, **kwargs)
    return Batches(numbers.float().view(-1, 1, 1, 1), numbers, sampler)


# --- training --------------------------------------------------------------------------------


def test_epoch_reads_every_image_once_in_an_order_of_its_own():
    sampler = DividedSampler(10, 4, train=True, seed=3)
    first, second = read(sampler, 0), read(sampler, 1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second


def test_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    one = read(DividedSampler(50, 8, train=True, seed=3), 2)
    torch.manual_seed(1)
    assert read(DividedSampler(50, 8, train=True, seed=3), 2) == one
    assert read(DividedSampler(50, 8, train=True, seed=4), 2) != one
    fixed = DividedSampler(50, 8, train=True, seed=3, reshuffle=False)
    assert read(fixed, 0) == read(fixed, 2)


def test_shuffling_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(DividedSampler(50, 8, train=True))
    assert torch.equal(torch.get_rng_state(), before)


@given(world_size=st.integers(1, 4), share=st.integers(1, 5), images=st.integers(4, 60), epoch=...)
def test_processes_divide_each_batch_of_a_single_one(
    world_size: int, share: int, images: int, epoch: bool
):
    batch_size = world_size * share
    single = read(DividedSampler(images, batch_size, train=True), epoch)
    ranks = [
        read(
            DividedSampler(images, batch_size, train=True, rank=rank, world_size=world_size), epoch
        )
        for rank in range(world_size)
    ]
    usable = images // world_size * world_size
    expected = list(chain(*single))[:usable]
    found = []
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
        found.append(sorted(chain(*parts)))
    together = [expected[start : start + batch_size] for start in range(0, usable, batch_size)]
    assert found == [sorted(batch) for batch in together]


# --- evaluation ------------------------------------------------------------------------------


@given(world_size=st.integers(1, 4), share=st.integers(1, 5), images=st.integers(4, 60))
def test_evaluation_reads_every_image_once_in_equally_many_batches(world_size, share, images):
    ranks = [
        read(
            DividedSampler(
                images, world_size * share, train=False, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = list(chain(*ranks))
    assert sorted(chain(*batches)) == list(range(images))
    assert all(batches)
    assert max(map(len, batches)) <= max(share, 2)
    if world_size == 1:
        assert list(chain(*batches)) == list(range(images))
        assert max(map(len, batches)) <= share


# --- loader ----------------------------------------------------------------------------------


def test_batches_hold_images_and_their_labels():
    loader = numbered(10)
    assert len(loader) == 3
    for batch in loader:
        assert batch.images.shape == (len(batch.labels), 1, 1, 1)
        assert batch.images.flatten().tolist() == batch.labels.tolist()


def test_stopped_pass_goes_on_with_the_next_batch():
    loader = numbered(20)
    loader.batch_sampler.set_epoch(1)
    whole = [batch.labels.tolist() for batch in loader]
    passing = iter(loader)
    next(passing), next(passing)

    resumed = numbered(20)
    resumed.load_state_dict(loader.state_dict())
    resumed.batch_sampler.set_epoch(1)
    assert [batch.labels.tolist() for batch in resumed] == whole[2:]
    assert [batch.labels.tolist() for batch in resumed] == whole

    later = numbered(20)
    later.load_state_dict(loader.state_dict())
    later.batch_sampler.set_epoch(2)
    assert len(list(later)) == 5


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (9, 3, "A batch of 3 images cannot be divided evenly over 2 processes. Use a batch size"),
        (1, 2, "1 images cannot be divided over 2 processes. Use more images or fewer"),
    ],
)
def test_what_cannot_be_divided_is_rejected(images, batch_size, message):
    with pytest.raises(ValueError, match=message):
        DividedSampler(images, batch_size, train=True, world_size=2)


# --- under Lightning -------------------------------------------------------------------------


class Reader(Classifier):
    """Keeps the images that it reads, as the sums of their pixels times their places."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, list[list[float]]] = {}

    def _keep(self, part: str, batch) -> None:
        weights = torch.arange(1.0, 65.0).double().sqrt()
        sums = (batch.images.flatten(1).double() @ weights).tolist()
        self.read.setdefault(f"{part}{self.current_epoch}", []).append(sums)

    def training_step(self, batch, batch_idx):
        self._keep("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._keep("val", batch)
        super().validation_step(batch, batch_idx)


def trainer_in(folder: Path, **kwargs) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def test_trainer_shuffles_anew_in_every_epoch_unless_it_overfits(tmp_path):
    for overfit, same in ((0.0, False), (2, True)):
        model, data = Reader(), HandwrittenDigits(source="digits", batch_size=128)
        trainer_in(tmp_path, overfit_batches=overfit).fit(model, data)
        assert (model.read["train0"] == model.read["train1"]) is same


# Started by itself under DDP, where each process writes what it read.
SCRIPT = """
import json, sys
from pathlib import Path
from recipes.mnist.data import HandwrittenDigits
from tests.recipes.test_mnist_batches import Reader, trainer_in

folder = Path(sys.argv[1])
model = Reader()
data = HandwrittenDigits(source="digits", batch_size=64, eval_batch_size=64)
trainer = trainer_in(folder, devices=2, strategy="ddp")
trainer.fit(model, data)
found = {"read": model.read, "accuracy": float(trainer.callback_metrics["val/accuracy"])}
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_divide_the_images_under_the_default_ddp_strategy(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=200)

    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for part, count in (("train0", 1196), ("train1", 1196), ("val0", 300), ("val1", 300)):
        left, right = (rank["read"][part] for rank in ranks)
        assert len(left) == len(right)
        images = [image for batch in left + right for image in batch]
        assert len(images) == count
        assert len(set(images)) == count
    assert ranks[0]["read"]["train0"] != ranks[0]["read"]["train1"]
    assert ranks[0]["accuracy"] == ranks[1]["accuracy"] > 0.1
