"""Where the images of the MNIST recipe come from, and which split they are in."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pooch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from recipes.mnist import data as data_module
from recipes.mnist import images as images_module
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.images import cache_folder, download_mnist, find_images, parse_idx
from recipes.mnist.splits import check_balance, divide, draw

REAL = os.environ.get("REVFLIP_DATA")
SMALL = {  # of a small MNIST: images are of 2x3 pixels
    "train-images-idx3-ubyte.gz": (torch.arange(40 * 6) % 256).view(40, 2, 3),
    "train-labels-idx1-ubyte.gz": torch.arange(40) % 4,
    "t10k-images-idx3-ubyte.gz": (torch.arange(12 * 6) + 16 + 7).view(12, 2, 3),
    "t10k-labels-idx1-ubyte.gz": torch.arange(12) % 4,
}


@pytest.fixture(autouse=True)
def no_data_of_the_user(monkeypatch, tmp_path):
    """Neither the environment nor the user's cache decides what a test finds."""
    monkeypatch.delenv("REVFLIP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def idx(values: torch.Tensor) -> bytes:
    """A file of the idx format, by its definition."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + bytes(values.to(torch.uint8).flatten().tolist())


def write(folder: Path, **changed: torch.Tensor) -> Path:
    """The four files of the small MNIST; `write(folder, train_labels=...)` changes one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in SMALL.items():
        key = "_".join(name.split("-")[:2])
        (folder / name).write_bytes(gzip.compress(idx(changed.get(key, values))))
    return folder


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Small files that pass for the published ones, in a folder `mnist`."""
    for name, values in SMALL.items():
        digest = hashlib.md5(idx(values), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(images_module.MD5, name, digest)
    monkeypatch.setattr(data_module, "MNIST_VALIDATION", 8)
    return write(tmp_path / "data" / "mnist")


# --- where the images come from --------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_their_order():
    digits, found = load_digits(), find_images("auto")
    assert found.pixels.shape == (1797, 1, 8, 8)
    assert torch.equal(found.pixels[:, 0].double(), torch.from_numpy(digits.images))
    assert found.labels.tolist() == digits.target.tolist()
    assert (found.white, found.pixels.max()) == (16, 16)
    assert "do not compare with those on MNIST" in found.description


def test_mnist_has_the_training_file_before_the_test_file(published):
    found = find_images("mnist", published)
    images = [SMALL[name] for name in SMALL if "images" in name]
    labels = [SMALL[name] for name in SMALL if "labels" in name]
    assert torch.equal(found.pixels[:, 0], torch.cat(images).to(torch.uint8))
    assert torch.equal(found.labels, torch.cat(labels))
    assert (found.white, found.first_test) == (255, 40)


@pytest.mark.parametrize("place", ["root", "parent", "environment", "subfolder", "cache"])
def test_mnist_is_found_in(published, monkeypatch, place):
    root = {"root": published, "parent": published.parent}.get(place)
    if place in ("environment", "subfolder"):
        folder = published if place == "environment" else published.parent
        monkeypatch.setenv("REVFLIP_DATA", str(folder))
    if place == "cache":
        cache_folder().parent.mkdir(parents=True)
        published.rename(cache_folder())
    assert "MNIST in" in find_images("auto", root).description


def test_root_is_searched_alone(published, monkeypatch, tmp_path):
    monkeypatch.setenv("REVFLIP_DATA", str(published))
    with pytest.raises(FileNotFoundError, match=r"No file of MNIST in any of: .*empty.*--data\."):
        find_images("auto", tmp_path / "empty")


def test_missing_mnist_is_an_error_only_where_it_was_asked_for():
    with pytest.raises(FileNotFoundError, match=r"REVFLIP_DATA; or .*--data\.source digits"):
        find_images("mnist")
    assert find_images("auto").first_test is None


def test_files_packed_anew_are_the_published_ones_and_changed_ones_are_not(published):
    path = published / "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content, compresslevel=1))
    find_images("mnist", published)
    path.write_bytes(gzip.compress(content[:-1] + b"\x00"))
    with pytest.raises(ValueError, match=r"not the published file of MNIST.*--data\.verify false"):
        find_images("mnist", published)
    assert "not verified" in find_images("mnist", published, verify=False).description


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (gzip.compress(idx(torch.arange(12)))[:-9], "truncated or no gzip"),
        (b"no gzip", "truncated or no gzip"),
        (gzip.compress(b"text"), r"not an idx file of unsigned bytes: it begins with b'text'"),
        (gzip.compress(b""), "not an idx file"),
        (gzip.compress(b"\x00\x00\x08\x01"), "not an idx file"),
        (gzip.compress(idx(torch.arange(12))[:-1]), "should hold 12 values .* it has 11"),
        (gzip.compress(idx(torch.zeros(0))), "should hold 0 values"),
        (gzip.compress(idx(torch.arange(11))), r"one label for each, .*\(12, 2, 3\) and \(11,\)"),
    ],
    ids=["cut", "plain", "text", "empty", "header", "short", "none", "labels"],
)
def test_broken_file_is_named(tmp_path, packed, message):
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=rf"t10k-.*{message}"):
        find_images("mnist", tmp_path, verify=False)


def test_images_of_two_sizes_are_rejected(tmp_path):
    write(tmp_path, t10k_images=torch.zeros(12, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"differ in size: \(2, 3\) and \(2, 2\)"):
        find_images("mnist", tmp_path, verify=False)


def test_missing_file_is_named(published):
    (published / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"mnist lacks train-labels-idx1-ubyte\.gz\. Give"):
        find_images("mnist", published)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_arrays_of_any_shape_are_read(shape):
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    found = parse_idx(idx(values), Path("file"))
    assert found.dtype == torch.uint8
    assert torch.equal(found, values.to(torch.uint8))


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-revflip\[recipes\]'"):
        find_images("digits")


def test_download_fetches_what_is_missing_and_checks_it(published, monkeypatch, tmp_path):
    fetched = []

    def retrieve(url: str, fname: str, path: Path, **kwargs: object) -> None:
        fetched.append(url)
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((published / fname).read_bytes())

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    data = HandwrittenDigits(download=True, root=str(tmp_path / "new"))
    data.prepare_data()
    data.prepare_data()
    assert [url.rpartition("/")[2] for url in fetched] == list(SMALL)
    assert data.num_train == 32

    (published / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(12))))
    missing = tmp_path / "new" / "t10k-labels-idx1-ubyte.gz"
    missing.unlink()
    with pytest.raises(RuntimeError, match=r"Could not fetch https.*not the published file"):
        download_mnist(missing.parent)
    assert not missing.exists()
    assert len(fetched) == 5


def test_nothing_is_downloaded_unasked(monkeypatch):
    monkeypatch.setattr(pooch, "retrieve", pytest.fail)
    data = HandwrittenDigits()
    data.prepare_data()
    assert data.num_train == 1197


# --- splits ----------------------------------------------------------------------------------


def counts(labels: torch.Tensor) -> list[int]:
    return labels.bincount(minlength=10).tolist()


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


# --- data module -----------------------------------------------------------------------------


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
