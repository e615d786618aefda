"""Images of none of the classes, on which a classifier should be uncertain.

notMNIST are the letters A to J in many fonts (Bulatov, 2011), here in MNIST's format and size.
Omniglot are characters of many alphabets, drawn by hand (Lake et al., 2015): black on white, here
inverted and resized, so that they are white on black as MNIST is. The other kinds need no files:
noise, and the test images with black and white exchanged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_revflip.applications import gaussian_noise, read_images, uniform_noise
from recipes.common.folders import candidates
from recipes.mnist.images import TEST_IMAGES, parse_idx, unpack

Kind = Literal["auto", "notmnist", "omniglot", "uniform", "gaussian", "inverted", "none"]

KINDS = get_args(Kind)
NOTMNIST_SIZE = (1, 28, 28)
OMNIGLOT = ("images_background_small1", "images_background", "images_evaluation")

HOW_TO_GET_NOTMNIST = (
    f"Put {TEST_IMAGES} of notMNIST into a folder `notmnist` in the one that --data.root or "
    "REVFLIP_DATA names, or take other images with --data.outliers inverted, uniform or gaussian."
)
HOW_TO_GET_OMNIGLOT = (
    f"Put one of {', '.join(f'{name}.zip' for name in OMNIGLOT)} into a folder `omniglot` in the "
    "one that --data.root or REVFLIP_DATA names, or take other images: inverted, uniform or "
    "gaussian."
)


class Outliers(NamedTuple):
    """Images and what to tell the user about them.

    Attributes:
        description: what they are, for the log.
        images: float32, shape (number of images, channels, height, width).
    """

    description: str
    images: Tensor


def find_outliers(
    kind: Kind,
    test: Tensor,
    scale: float,
    count: int | None,
    seed: int,
    root: str | os.PathLike[str] | None = None,
) -> Outliers:
    """Images in the shape and the scale of those of the test.

    Args:
        kind: `notmnist`; `omniglot`; `uniform` noise in each pixel; `gaussian`, normal noise whose
            mean is half of `scale` and whose standard deviation is a quarter, clipped; `inverted`,
            test images with black and white exchanged; `auto`: notMNIST if it is there and fits,
            else inverted.
        test: images of the test, float32, shape (number of images, channels, height, width).
        scale: the value of a white pixel; black is 0.
        count: how many images; fewer if there are not so many. None: all of notMNIST and Omniglot,
            of the other kinds as many as there are test images.
        seed: of what is drawn.
        root: the folder of MNIST, or with MNIST in `mnist/`, see `notmnist_file`.

    Raises:
        FileNotFoundError: if notMNIST or Omniglot was asked for and is not there.
        ValueError: if images are not of the size of notMNIST, but it was asked for, or if a file is
            damaged.
    """
    if kind == "omniglot":
        return find_omniglot(test.shape[1:], scale, count, seed, root)
    generator = torch.Generator().manual_seed(seed)
    file, fits = notmnist_file(root), test.shape[1:] == NOTMNIST_SIZE
    if kind == "notmnist" and not fits:
        raise ValueError(
            f"Images of notMNIST have the shape {NOTMNIST_SIZE}, those of the test have "
            f"{tuple(test.shape[1:])}. Use --data.source mnist, or other outliers: inverted, "
            "uniform or gaussian."
        )
    if kind == "notmnist" or (kind == "auto" and fits and file is not None):
        if file is None:
            raise FileNotFoundError(f"notMNIST was not found. {HOW_TO_GET_NOTMNIST}")
        pixels = some(read_notmnist(file), count, generator)
        images = pixels.float().div_(255).mul_(scale)
        return Outliers(f"{len(images):,} letters of notMNIST in {file.parent}", images)
    if kind in ("auto", "inverted"):
        images = scale - some(test, count, generator)
        return Outliers(f"{len(images):,} inverted test images", images)
    shape = (len(test) if count is None else count, *test.shape[1:])
    if kind == "uniform":
        noise = uniform_noise(shape, generator)
        return Outliers(f"{len(noise):,} images of uniform noise", scale * noise)
    noise = gaussian_noise(shape, generator)
    return Outliers(f"{len(noise):,} images of Gaussian noise", scale * noise)


def available_kinds(
    image_shape: torch.Size, root: str | os.PathLike[str] | None = None
) -> list[Kind]:
    """All kinds of outliers that can be had for test images of a shape, real images first."""
    kinds: list[Kind] = []
    if image_shape == NOTMNIST_SIZE and notmnist_file(root) is not None:
        kinds.append("notmnist")
    if omniglot_path(root) is not None:
        kinds.append("omniglot")
    return [*kinds, "inverted", "gaussian", "uniform"]


def some(images: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Different images, drawn at random and in their order; all of them if there are no more."""
    if count is None or count >= len(images):
        return images
    return images[torch.randperm(len(images), generator=generator)[:count].sort().values]


# --- notMNIST --------------------------------------------------------------------------------


def notmnist_file(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The images of notMNIST, if they are in a folder `notmnist` beside where MNIST may be.

    For data in `root` these are `root/notmnist` and the neighbour of `root`; without a `root` the
    same of `REVFLIP_DATA`, and of the cache.
    """
    for folder in candidates("mnist", root):
        file = folder.absolute().parent / "notmnist" / TEST_IMAGES
        if file.is_file():
            return file
    return None


def read_notmnist(path: Path) -> Tensor:
    """The images in a file of notMNIST, uint8, shape (number of images, 1, 28, 28).

    Raises:
        ValueError: if it is damaged or has images of another size.
    """
    images = parse_idx(unpack(path, verify=False), path).unsqueeze(1)
    if images.shape[1:] != NOTMNIST_SIZE:
        raise ValueError(
            f"{path} must hold images of 28x28 pixels, got the shape {tuple(images.shape)}. "
            f"{HOW_TO_GET_NOTMNIST}"
        )
    return images


# --- Omniglot --------------------------------------------------------------------------------


def find_omniglot(
    shape: torch.Size,
    scale: float,
    count: int | None,
    seed: int,
    root: str | os.PathLike[str] | None,
) -> Outliers:
    """Characters of Omniglot in a shape, white on black."""
    path = omniglot_path(root)
    if path is None:
        raise FileNotFoundError(f"Omniglot was not found. {HOW_TO_GET_OMNIGLOT}")
    images = read_images(path, shape, count=count, seed=seed, invert=True).mul_(scale)
    return Outliers(f"{len(images):,} characters of Omniglot in {path}", images)


def omniglot_path(root: str | os.PathLike[str] | None = None) -> Path | None:
    """A zip file of Omniglot, or the folder of its content; searched for as `notmnist_file` is."""
    for folder in candidates("mnist", root):
        for name in OMNIGLOT:
            for path in (Path(f"{name}.zip"), Path(name)):
                found = folder.absolute().parent / "omniglot" / path
                if found.exists():
                    return found
    return None
