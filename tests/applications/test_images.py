"""Images of a folder or a zip file, and noise, in the shape of a model's input."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_revflip.applications import gaussian_noise, read_images, uniform_noise

REAL = os.environ.get("REVFLIP_DATA")


def write(folder, name, pixels, mode="L"):
    """An image file of pixels given as rows."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, (len(pixels[0]), len(pixels)))
    image.putdata([pixel for row in pixels for pixel in row])
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Four grey images, among other things."""
    found = tmp_path / "images"
    for index, name in enumerate(["b/1.png", "b/0.png", "a.bmp", "c/d/2.PNG"]):
        write(found, name, [[index, 100 + index], [200, 255]])
    (found / "notes.txt").write_text("no image")
    write(found, ".hidden.png", [[1]])
    write(found, "__MACOSX/3.png", [[1]])
    return found


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("pack", [lambda path: path, zipped], ids=["folder", "zip"])
def test_all_images_are_read_by_name(folder, pack):
    found = read_images(pack(folder), (1, 2, 2))
    assert (found.shape, found.dtype) == ((4, 1, 2, 2), torch.float32)
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [2, 1, 0, 3]  # a, b/0, b/1, c/d/2
    torch.testing.assert_close(found[0, 0], torch.tensor([[2.0, 102.0], [200.0, 255.0]]) / 255)


def test_inverted_images_are_the_complement(folder):
    plain, inverted = (read_images(folder, (1, 2, 2), invert=invert) for invert in (False, True))
    torch.testing.assert_close(plain + inverted, torch.ones_like(plain))


def test_images_are_resized_by_averaging(tmp_path):
    write(tmp_path, "board.png", [[0, 255] * 4, [255, 0] * 4] * 4)
    found = read_images(tmp_path, (1, 2, 2))
    torch.testing.assert_close(found, torch.full((1, 1, 2, 2), 0.5), atol=0.02, rtol=0)


def test_colours_are_kept_or_become_grey(tmp_path):
    write(tmp_path, "red.png", [[(255, 0, 0)]], "RGB")
    assert read_images(tmp_path, (3, 1, 1)).flatten().tolist() == [1, 0, 0]
    assert read_images(tmp_path, (1, 1, 1)).item() == pytest.approx(0.299, abs=0.005)


def test_some_images_are_drawn_by_the_seed(folder):
    def drawn(count, seed):
        return [
            round(255 * i[0, 0, 0].item())
            for i in read_images(folder, (1, 2, 2), count=count, seed=seed)
        ]

    assert drawn(2, 0) == drawn(2, 0)
    assert len({tuple(drawn(2, seed)) for seed in range(20)}) > 1
    assert drawn(99, 0) == [2, 1, 0, 3]


def test_noise_has_the_law_that_it_names():
    generator = torch.Generator().manual_seed(0)
    uniform = uniform_noise((100, 1, 20, 20), generator)
    normal = gaussian_noise((100, 1, 20, 20), generator)
    for noise in (uniform, normal):
        assert (noise.min() >= 0, noise.max() <= 1) == (True, True)
        # Standard errors of the mean of 40,000 numbers are below 0.0015.
        assert noise.mean().item() == pytest.approx(0.5, abs=0.0075)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    # Normal numbers beyond two standard deviations are clipped: 2.28 % on each side.
    assert (normal == 0).double().mean().item() == pytest.approx(0.0228, abs=0.005)


def test_what_cannot_be_read_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        read_images(tmp_path / "missing", (1, 2, 2))
    with pytest.raises(ValueError, match="neither a folder nor a zip file"):
        read_images(folder / "notes.txt", (1, 2, 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image"):
        read_images(tmp_path / "empty", (1, 2, 2))
    broken = folder / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(ValueError, match="1.png cannot be read: .* Remove or repair it"):
        read_images(folder, (1, 2, 2))
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="1.png cannot be read"):
        read_images(folder, (1, 2, 2))
    Image.new("I;16", (2, 2)).save(broken)
    with pytest.raises(ValueError, match="not of 8 bits"):
        read_images(folder, (1, 2, 2))


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 4, 4), {}, r"1 channel or 3, got \(2, 4, 4\)"),
        ((4, 4), {}, r"1 channel or 3, got \(4, 4\)"),
        ((1, 4, 4), {"count": 0}, "count must be at least 1, got 0"),
    ],
    ids=["channels", "dimensions", "count"],
)
def test_arguments_that_make_no_sense_are_rejected(folder, shape, settings, message):
    with pytest.raises(ValueError, match=message):
        read_images(folder, shape, **settings)


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_omniglot_becomes_white_on_black():
    (archive,) = (Path(REAL) / "omniglot").glob("*.zip")
    found = read_images(archive, (1, 28, 28), count=200, invert=True)
    assert found.shape == (200, 1, 28, 28)
    # Thin strokes: a few percent of the pixels, none of them much beyond half of white.
    assert 0.02 < found.mean() < 0.1
    assert found.min() == 0
