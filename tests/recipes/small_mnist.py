"""A small MNIST of 2x3 pixels, whose files pass for the published ones."""

import gzip
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from recipes.mnist import data as data_module
from recipes.mnist import images as images_module

SMALL = {  # of a small MNIST: images are of 2x3 pixels
    "train-images-idx3-ubyte.gz": (torch.arange(40 * 6) % 256).view(40, 2, 3),
    "train-labels-idx1-ubyte.gz": torch.arange(40) % 4,
    "t10k-images-idx3-ubyte.gz": (torch.arange(12 * 6) + 16 + 7).view(12, 2, 3),
    "t10k-labels-idx1-ubyte.gz": torch.arange(12) % 4,
}


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


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Write the files into `folder`, and take them for the published ones."""
    for name, values in SMALL.items():
        digest = hashlib.md5(idx(values), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(images_module.MD5, name, digest)
    monkeypatch.setattr(data_module, "MNIST_VALIDATION", 8)
    return write(folder)


def counts(labels: torch.Tensor) -> list[int]:
    """How many images of each digit there are."""
    return labels.bincount(minlength=10).tolist()
