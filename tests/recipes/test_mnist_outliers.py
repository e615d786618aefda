"""Images of none of the classes: which ones there are, in which shape and scale."""

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from recipes.common.folders import cache_folder
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.outliers import find_outliers, notmnist_file

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("no_data_of_the_user")
FILE = "t10k-images-idx3-ubyte.gz"


def write(folder: Path, number: int = 5, size: int = 28) -> torch.Tensor:
    """A file of images in idx format; the pixels of image i are i, but for one that is 255."""
    pixels = torch.arange(number, dtype=torch.uint8).view(-1, 1, 1).repeat(1, size, size)
    pixels[:, 0, 1] = 255
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, number, size, size)
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(gzip.compress(header + bytes(pixels.flatten().tolist())))
    return pixels.unsqueeze(1)


def images(number: int = 20, size: int = 28, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.rand(number, 1, size, size, generator=generator)


# --- kinds -----------------------------------------------------------------------------------


def test_letters_have_the_scale_of_the_images(tmp_path):
    pixels = write(tmp_path / "notmnist")
    for kind in ("notmnist", "auto"):
        found = find_outliers(kind, images(), 4.0, None, 0, tmp_path)
        torch.testing.assert_close(found.images, pixels / 255 * 4)
        assert found.description == f"5 letters of notMNIST in {tmp_path / 'notmnist'}"


def test_inverted_images_add_up_with_the_test_images_to_white():
    test = images(scale=3.0)
    for kind in ("inverted", "auto"):
        found = find_outliers(kind, test, 3.0, None, 0)
        torch.testing.assert_close(found.images + test, torch.full_like(test, 3.0))
        assert found.description == "20 inverted test images"


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_noise_has_the_stated_law(scale):
    uniform = find_outliers("uniform", images(), scale, 500, 0).images / scale
    gaussian = find_outliers("gaussian", images(), scale, 500, 0).images / scale
    for noise in (uniform, gaussian):
        assert (noise.shape, noise.dtype) == ((500, 1, 28, 28), torch.float32)
        assert noise.min() >= 0
        assert noise.max() <= 1
        # 392,000 pixels of standard deviation below 0.3: 5 standard errors are 0.0024.
        assert noise.mean().item() == pytest.approx(0.5, abs=0.0025)
    # Of the square of a uniform number the mean is 1/3 and the standard deviation 0.298.
    assert uniform.square().mean().item() == pytest.approx(1 / 3, abs=0.0025)
    # Two standard deviations from the mean it is clipped: 2.275 % of all pixels on either side.
    for value in (0, 1):
        share = (gaussian == value).float().mean().item()
        assert share == pytest.approx(0.02275, abs=5 * (0.02275 / 392_000) ** 0.5)
    inside = (gaussian - 0.5).abs() < 0.25
    assert inside.float().mean().item() == pytest.approx(0.68269, abs=5 * (0.217 / 392_000) ** 0.5)


@pytest.mark.parametrize("kind", ["notmnist", "uniform", "gaussian", "inverted"])
def test_outliers_depend_on_the_seed_alone_and_are_as_many_as_asked_for(tmp_path, kind):
    write(tmp_path / "notmnist", number=40)
    torch.manual_seed(1)
    one = find_outliers(kind, images(), 1.0, 4, 7, tmp_path).images
    torch.manual_seed(2)
    assert torch.equal(one, find_outliers(kind, images(), 1.0, 4, 7, tmp_path).images)
    assert not torch.equal(one, find_outliers(kind, images(), 1.0, 4, 8, tmp_path).images)
    assert len(one) == len(one.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("kind", "count", "number"),
    [
        ("notmnist", None, 5),
        ("notmnist", 6, 5),
        ("inverted", None, 20),
        ("inverted", 21, 20),
        ("uniform", None, 20),
        ("gaussian", 21, 21),
    ],
)
def test_without_enough_images_there_are_fewer_outliers_but_noise_has_no_end(
    tmp_path, kind, count, number
):
    write(tmp_path / "notmnist")
    assert len(find_outliers(kind, images(), 1.0, count, 0, tmp_path).images) == number


# --- where notMNIST is -----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["parent", "beside", "environment", "cache"])
def test_notmnist_is_found_in(tmp_path, monkeypatch, place):
    data = cache_folder("mnist").parent if place == "cache" else tmp_path / "data"
    write(data / "notmnist")
    root = {"parent": data, "beside": data / "mnist"}.get(place)
    if place == "environment":
        monkeypatch.setenv("REVFLIP_DATA", str(data))
    assert notmnist_file(root) == data / "notmnist" / FILE


def test_missing_notmnist_is_an_error_only_where_it_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not found.*notmnist.*--data\.outliers inverted"):
        find_outliers("notmnist", images(), 1.0, None, 0, tmp_path)
    assert "inverted" in find_outliers("auto", images(), 1.0, None, 0, tmp_path).description


def test_images_of_another_size_get_no_letters(tmp_path):
    write(tmp_path / "notmnist")
    with pytest.raises(ValueError, match=r"\(1, 28, 28\), those of the test have \(1, 8, 8\)"):
        find_outliers("notmnist", images(size=8), 1.0, None, 0, tmp_path)
    assert "inverted" in find_outliers("auto", images(size=8), 1.0, None, 0, tmp_path).description


def test_damaged_or_foreign_file_of_notmnist_is_named(tmp_path):
    write(tmp_path / "small" / "notmnist", size=8)
    with pytest.raises(ValueError, match=r"28x28 pixels, got the shape \(5, 1, 8, 8\)"):
        find_outliers("auto", images(), 1.0, None, 0, tmp_path / "small")
    write(tmp_path / "cut" / "notmnist")
    file = tmp_path / "cut" / "notmnist" / FILE
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or no gzip file"):
        find_outliers("auto", images(), 1.0, None, 0, tmp_path / "cut")


# --- data module -----------------------------------------------------------------------------


def test_data_module_gives_the_outliers_that_it_is_asked_for(caplog):
    with caplog.at_level("INFO"):
        data = HandwrittenDigits(source="digits", scale=2.0)
        found = data.outlier_images()
    assert "Outliers: 300 inverted test images" in caplog.text
    assert data.outlier_images() is found
    test = data.test_set()
    torch.testing.assert_close(found + test.images, torch.full_like(found, 2.0))
    assert torch.equal(test.labels, data.found.labels[data.places.test])

    noise = HandwrittenDigits(source="digits", outliers="uniform", num_outliers=17)
    assert noise.outlier_images().shape == (17, 1, 8, 8)
    assert HandwrittenDigits(source="digits", outliers="none").outlier_images() is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"outliers": "cifar"}, "outliers must be one of auto, notmnist, .*, got 'cifar'"),
        ({"num_outliers": 0}, "num_outliers must be at least 1, got 0"),
    ],
    ids=["kind", "number"],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HandwrittenDigits(**kwargs)


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_mnist_is_compared_with_letters():
    data = HandwrittenDigits(source="mnist", root=REAL, num_outliers=None)
    letters = data.outlier_images()
    assert (letters.shape, letters.dtype) == ((10_000, 1, 28, 28), torch.float32)
    assert (letters.min(), letters.max()) == (0, 1)
    # Measured on the file itself. Of MNIST it is 0.13: these are other images.
    assert letters.mean().item() == pytest.approx(0.4266, abs=1e-4)
    assert len(HandwrittenDigits(source="mnist", root=REAL).outlier_images()) == 2000
