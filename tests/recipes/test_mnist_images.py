"""Where the images of the MNIST recipe come from."""

import gzip
import sys
from pathlib import Path

import pooch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from recipes.common.folders import cache_folder
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.images import download_mnist, find_images, parse_idx
from tests.recipes.small_mnist import SMALL, idx, publish, write

pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Small files that pass for the published ones, in a folder `mnist`."""
    return publish(monkeypatch, tmp_path / "data" / "mnist")


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
        cache_folder("mnist").parent.mkdir(parents=True)
        published.rename(cache_folder("mnist"))
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
