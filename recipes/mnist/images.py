"""Where the images come from: your files, the cache, a download, or scikit-learn's digits.

MNIST is the set of LeCun, Cortes and Burges; the digits of scikit-learn are the test part of the
UCI set "Optical Recognition of Handwritten Digits", and come with scikit-learn itself.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recipes.common.folders import candidates

Source = Literal["auto", "mnist", "digits"]

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/{name}"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
# Of the unpacked bytes: the same images are found in packed files that differ.
MD5 = {
    TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
    TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
    TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
    TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
}

HOW_TO_GET_IT = (
    "Give the folder that holds train-images-idx3-ubyte.gz and the other three files of MNIST (or "
    "has them in mnist/) as --data.root or in the environment variable REVFLIP_DATA; or let the "
    "recipe fetch them with --data.download true; or train on the digits of scikit-learn with "
    "--data.source digits."
)


class Images(NamedTuple):
    """Labelled grey images and what to tell the user about them.

    Attributes:
        description: what was found and where, for the log.
        pixels: uint8, shape (number of images, 1, height, width).
        labels: int64, shape (number of images,): classes from 0.
        white: the value of the brightest pixel there can be.
        first_test: the images from this one on are the test set; None if there is no such division.
    """

    description: str
    pixels: Tensor
    labels: Tensor
    white: int
    first_test: int | None


# --- choosing --------------------------------------------------------------------------------


def find_images(
    source: Source, root: str | os.PathLike[str] | None = None, verify: bool = True
) -> Images:
    """Choose the images, in this order: MNIST in `root`, REVFLIP_DATA or the cache, the digits.

    Args:
        source: `mnist` never falls back on the digits of scikit-learn, `digits` always takes them,
            `auto` takes them if there is no `root` and MNIST is not found elsewhere.
        root: a folder with the four files, or whose subfolder `mnist` has them. Searched alone.
        verify: compare the files with the published ones. False accepts files of your own in the
            same format.

    Raises:
        FileNotFoundError: if some of the four files, or under `mnist` all of them, are missing.
        ValueError: if a file is not the published one and `verify` is true, if it is not in the
            idx format, or if `source` is unknown.
        ModuleNotFoundError: if the digits are needed and scikit-learn is not installed.
    """
    if source not in ("auto", "mnist", "digits"):
        raise ValueError(f"source must be 'auto', 'mnist' or 'digits', got {source!r}.")
    if source == "digits":
        return read_digits()
    for folder in candidates("mnist", root):
        if any((folder / name).exists() for name in MD5):
            return read_mnist(folder, verify)
    if source == "mnist" or root is not None:
        searched = ", ".join(str(folder) for folder in candidates("mnist", root))
        raise FileNotFoundError(f"No file of MNIST in any of: {searched}. {HOW_TO_GET_IT}")
    return read_digits()


# --- reading ---------------------------------------------------------------------------------


def read_digits() -> Images:
    """The 1,797 images of scikit-learn, 8x8 pixels of 17 levels, in the order of the file."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The small digits come with scikit-learn: pip install 'lightning-revflip[recipes]'. "
            "Or train on MNIST, see --data.root and --data.download."
        ) from error
    digits = load_digits()
    return Images(
        "scikit-learn's digits, 8x8 (accuracies do not compare with those on MNIST)",
        torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1),
        torch.from_numpy(digits.target).to(torch.int64),
        white=16,
        first_test=None,
    )


def read_mnist(folder: Path, verify: bool) -> Images:
    """The images of the training file, then those of the test file.

    Raises:
        FileNotFoundError: if one of the four files is missing.
        ValueError: as for `find_images`, or if images and labels do not belong together.
    """
    missing = [name for name in MD5 if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. {HOW_TO_GET_IT}")
    train, train_labels, test, test_labels = (
        parse_idx(unpack(folder / name, verify), folder / name) for name in MD5
    )
    for images, labels, name in (
        (train, train_labels, TRAIN_IMAGES),
        (test, test_labels, TEST_IMAGES),
    ):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder / name} must hold images (number, height, width) and the file of labels "
                f"one label for each, got shapes {tuple(images.shape)} and {tuple(labels.shape)}."
            )
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"The images for training and for the test in {folder} differ in size: "
            f"{tuple(train.shape[1:])} and {tuple(test.shape[1:])}."
        )
    return Images(
        f"{'MNIST' if verify else 'images (not verified)'} in {folder}",
        torch.cat([train, test]).unsqueeze(1),
        torch.cat([train_labels, test_labels]).to(torch.int64),
        white=255,
        first_test=len(train),
    )


def unpack(path: Path, verify: bool) -> bytes:
    """The content of a gzip file; if `verify`, only that of the published file."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated or no gzip file ({error}). Copy or download it again."
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if verify and found != MD5[path.name]:
        raise ValueError(
            f"{path} is not the published file of MNIST: unpacked it has {len(content):,} bytes "
            f"and md5 {found}, expected {MD5[path.name]}. Copy or download it again, or set "
            "--data.verify false to train on files of your own in the same format."
        )
    return content


def parse_idx(content: bytes, path: Path) -> Tensor:
    """The array in a file of the idx format: uint8, with the shape that stands in its header.

    The header is two zero bytes, the type (8 for unsigned bytes), the number of dimensions, and the
    size of each as a big-endian 32-bit number.

    Args:
        content: the file, unpacked.
        path: its name, for the error.

    Raises:
        ValueError: if the header is another one or does not agree with the number of bytes.
    """
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < start:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes: it begins with {content[:4]!r}, "
            "expected two zero bytes, 8, and the number of dimensions."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected, found = math.prod(shape), len(content) - start
    if found != expected or found == 0:
        raise ValueError(
            f"{path} should hold {expected:,} values by its header, it has {found:,}. Copy or "
            "download it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


# --- downloading -----------------------------------------------------------------------------


def download_mnist(folder: Path) -> None:
    """Fetch what a folder lacks of the four files, with a progress bar; unpacked bytes are checked.

    Raises:
        ModuleNotFoundError: without the extra `recipes`.
        RuntimeError: if a file cannot be fetched or is not the published one.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A download needs pooch and tqdm: pip install 'lightning-revflip[recipes]'."
        ) from error
    pooch.get_logger().setLevel("WARNING")  # it would advise to pin the hash of the packed file
    for name in MD5:
        url, path = URL.format(name=name), folder / name
        if path.exists():
            continue
        try:
            pooch.retrieve(url, known_hash=None, fname=name, path=folder, progressbar=True)
            unpack(path, verify=True)
        except (OSError, ValueError) as error:  # no network; another file behind the address
            path.unlink(missing_ok=True)
            raise RuntimeError(
                f"Could not fetch {url} ({error}). Copy {name} to {folder} by hand, or train on "
                "the digits of scikit-learn with --data.source digits."
            ) from error
