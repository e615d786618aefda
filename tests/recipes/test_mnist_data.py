"""The data module of the MNIST recipe."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from recipes.mnist.data import HandwrittenDigits
from tests.recipes.small_mnist import counts, publish

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Small files that pass for the published ones, in a folder `mnist`."""
    return publish(monkeypatch, tmp_path / "data" / "mnist")


@pytest.mark.parametrize("scale", [1.0, 0.25, 16.0])
def test_images_are_scaled_from_zero_to_the_given_number(scale):
    data = HandwrittenDigits(source="digits", scale=scale, eval_batch_size=300)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert (batch.images.dtype, batch.images.shape) == (torch.float32, (300, 1, 8, 8))
    places = data.places.test
    expected = torch.from_numpy(load_digits().images)[places] / 16 * scale
    torch.testing.assert_close(batch.images[:, 0].double(), expected, rtol=1e-6, atol=0)
    assert batch.images.max() == scale
    assert batch.labels.tolist() == load_digits().target[places.numpy()].tolist()


def test_shape_and_numbers_are_known_without_setup():
    data = HandwrittenDigits(source="digits")
    assert (data.image_shape, data.num_classes, data.num_train) == ((1, 8, 8), 10, 1197)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_stage_prepares_the_splits_that_it_needs(stage):
    data = HandwrittenDigits(source="digits")
    data.setup(stage)
    parts = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["test"]}
    assert list(data._images) == parts[stage]


def test_what_was_found_is_logged(caplog):
    with caplog.at_level("INFO"):
        HandwrittenDigits(source="digits").setup("fit")
    assert "Images: scikit-learn's digits" in caplog.text
    assert "Split: 1,197 train, 300 val, 300 test" in caplog.text


def ranks(**strategy: int) -> list[HandwrittenDigits]:
    """The data modules of two processes."""
    found = []
    for rank in (0, 1):
        data = HandwrittenDigits(source="digits", batch_size=64, eval_batch_size=128)
        share = {"rank": rank, "num_replicas": 2, **strategy}
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, overfit_batches=0.0)
        data.setup("fit")
        found.append(data)
    return found


def test_two_processes_share_every_training_batch_of_one():
    loaders = [data.train_dataloader() for data in ranks()]
    alone = HandwrittenDigits(source="digits", batch_size=64)
    alone.setup("fit")
    for left, right, whole in zip(*loaders, alone.train_dataloader(), strict=True):
        images = torch.cat([left.images, right.images]).flatten(1)
        expected = whole.images.flatten(1)[: len(images)]
        assert len(left.labels) == len(right.labels)
        assert sorted(images.tolist()) == sorted(expected.tolist())


def test_independent_chains_read_everything_each():
    left, right = (data.train_dataloader() for data in ranks(rank=0, num_replicas=1))
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.images, other.images)
    assert sum(len(batch.labels) for batch in left) == 1197


def test_data_module_can_be_pickled():
    data = HandwrittenDigits(source="digits")
    data.setup("fit")
    assert torch.equal(pickle.loads(pickle.dumps(data)).places.train, data.places.train)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"scale": 0.0}, r"scale must be a positive number, got 0\.0"),
        ({"scale": float("nan")}, "scale must be a positive number, got nan"),
        ({"split": "first"}, "split must be 'last' or 'random', got 'first'"),
        ({"source": "digits", "root": "x"}, "root and download would have no effect"),
        ({"source": "digits", "download": True}, "root and download would have no effect"),
    ],
    ids=["batch", "eval", "train", "zero", "nan", "split", "root", "download"],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HandwrittenDigits(**kwargs)


def test_unknown_source_is_rejected():
    with pytest.raises(ValueError, match="source must be 'auto', 'mnist' or 'digits', got 'cifar'"):
        HandwrittenDigits(source="cifar").setup("fit")


# --- the real MNIST --------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_mnist_has_the_known_numbers_of_each_digit():
    data = HandwrittenDigits(source="mnist", root=REAL)
    data.setup("fit")
    assert (data.image_shape, data.num_classes, data.num_train) == ((1, 28, 28), 10, 50_000)
    labels = data.found.labels
    train_file = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_file = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert counts(labels[:60_000]) == train_file
    assert counts(labels[data.places.test]) == test_file
    assert data.places.val.tolist() == list(range(50_000, 60_000))
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    # Mean and deviation of the training file are known to be 0.1307 and 0.3081.
    pixels = torch.cat([data._images["train"], data._images["val"]])
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_mnist_can_be_drawn_from_in_proportion():
    data = HandwrittenDigits(source="mnist", root=REAL, split="random", train_size=1000)
    labels, places = data.found.labels, data.places
    assert [len(part) for part in places] == [1000, 10_000, 10_000]
    assert max(places.train.max(), places.val.max()) < 60_000
    share = labels[:60_000].bincount() / 60_000
    for part in (places.train, places.val):
        # Once rounded for the part, once for what it was drawn from.
        assert (labels[part].bincount() - share * len(part)).abs().max() <= 2
