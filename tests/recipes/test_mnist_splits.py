"""Which split an image is in."""

import gzip

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.images import find_images
from recipes.mnist.splits import check_balance, divide, draw
from tests.recipes.small_mnist import SMALL, counts, idx, publish

pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Small files that pass for the published ones, in a folder `mnist`."""
    return publish(monkeypatch, tmp_path / "data" / "mnist")


def test_digits_are_divided_by_class_and_each_image_is_used_once():
    data = HandwrittenDigits(source="digits")
    assert [len(part) for part in data.places] == [1197, 300, 300]
    assert torch.cat(data.places).sort().values.tolist() == list(range(1797))
    overall = data.found.labels.bincount().double() / 1797
    for part in data.places:
        # Rounding at both ends of a class makes one image, drawing from what was left another.
        expected = overall * len(part)
        assert (data.found.labels[part].bincount() - expected).abs().max() <= 2


def test_split_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    one = HandwrittenDigits(source="digits").places
    torch.manual_seed(2)
    same, other = (HandwrittenDigits(source="digits", seed=seed).places for seed in (1111, 5))
    for left, right, different in zip(one, same, other, strict=True):
        assert torch.equal(left, right)
        assert not torch.equal(left, different)


@given(st.integers(1, 200), st.data(), st.integers(0, 9))
def test_drawing_takes_the_asked_number_and_each_class_in_proportion(total, data, seed):
    size = data.draw(st.integers(0, total))
    labels = torch.randint(3, (total,), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(total)
    drawn, left = draw(places, labels, size, torch.Generator().manual_seed(seed))
    assert len(drawn) == size
    assert torch.equal(torch.cat([drawn, left]).sort().values, places)
    assert torch.equal(drawn, drawn.sort().values)
    expected = labels.bincount(minlength=3) * size / total
    assert (labels[drawn].bincount(minlength=3) - expected).abs().max() <= 1 + 1e-4


def test_every_image_is_drawn_equally_often():
    labels = torch.tensor([0] * 6 + [1] * 12)
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(18)
    for _ in range(3000):
        drawn, _ = draw(torch.arange(18), labels, 6, generator)
        times[drawn] += 1
    # 1000 each; the standard deviation is sqrt(3000 * 1/3 * 2/3) = 26, and 5 of these are 130.
    assert (times - 1000).abs().max() < 130


def test_last_images_of_the_training_file_are_for_validation_unless_drawn(published):
    last = HandwrittenDigits(root=str(published)).places
    assert [part.tolist() for part in last] == [
        list(range(32)),
        list(range(32, 40)),
        list(range(40, 52)),
    ]
    drawn = HandwrittenDigits(root=str(published), split="random").places
    assert [len(part) for part in drawn] == [32, 8, 12]
    assert drawn.val.tolist() != last.val.tolist()
    assert torch.equal(drawn.test, last.test)
    labels = find_images("mnist", published).labels
    assert labels[drawn.val].bincount().tolist() == [2, 2, 2, 2]


def test_copies_sorted_by_class_are_rejected(published):
    name = "train-labels-idx1-ubyte.gz"
    (published / name).write_bytes(gzip.compress(idx(SMALL[name].sort().values)))
    arguments = {"root": str(published), "verify": False}
    with pytest.raises(ValueError, match=r"Class 3 makes up 6\.2% .* 32 images of the train part"):
        HandwrittenDigits(**arguments).setup("fit")
    HandwrittenDigits(**arguments, split="random").setup("fit")


@pytest.mark.parametrize(
    ("ones", "wrong"),
    [
        (0, "Class 1 makes up 0.0%"),
        (2, "Class 1 makes up 10.0%"),
        (5, None),
        (15, None),
        (20, "Class 0"),
    ],
)
def test_balance_allows_a_factor_of_two_but_no_missing_class(ones, wrong):
    """Of 20 images for validation; with the others, half of all images are of either class."""
    val = torch.tensor([1] * ones + [0] * (20 - ones))
    labels = torch.cat([val, 1 - val])
    parts = {"val": torch.arange(20)}
    if wrong is None:
        check_balance(labels, parts)
    else:
        with pytest.raises(ValueError, match=rf"{wrong}.* of the 20 images of the val .* 50\.0%"):
            check_balance(labels, parts)


def test_training_set_can_be_a_balanced_part():
    data = HandwrittenDigits(source="digits", train_size=100)
    whole = HandwrittenDigits(source="digits")
    assert data.num_train == len(data.places.train) == 100
    assert set(data.places.train.tolist()) < set(whole.places.train.tolist())
    assert torch.equal(data.places.test, whole.places.test)
    assert min(counts(data.found.labels[data.places.train])) >= 9


@pytest.mark.parametrize(
    ("size", "message"),
    [(1198, r"train_size is 1,198, but there are 1,197 images"), (5, r"larger --data\.train_size")],
)
def test_training_set_of_impossible_size_is_rejected(size, message):
    with pytest.raises(ValueError, match=message):
        HandwrittenDigits(source="digits", train_size=size).setup("fit")


def test_too_few_images_to_divide_are_named():
    with pytest.raises(ValueError, match="30 images cannot be divided into 30 for validation"):
        divide(torch.zeros(40, dtype=torch.int64), 30, 30, 0, "last", 0)
