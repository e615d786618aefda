"""Images that are none of the classes: noise, and any folder or zip file of images."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff")


def uniform_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Numbers from 0 to 1, all equally likely.

    Args:
        shape: (number of images, channels, height, width), or any other.
        generator: a CPU generator to draw from; None: torch's global one.

    Returns:
        float32, of that shape.
    """
    return torch.rand(*shape, generator=generator)


def gaussian_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Normal numbers with mean 1/2 and standard deviation 1/4, clipped to 0 and 1.

    Args:
        shape: as for `uniform_noise`.
        generator: likewise.

    Returns:
        float32, of that shape.
    """
    return torch.randn(*shape, generator=generator).mul_(0.25).add_(0.5).clamp_(0, 1)


def read_images(
    path: str | PathLike[str],
    shape: Sequence[int],
    *,
    count: int | None = None,
    seed: int = 0,
    invert: bool = False,
) -> Tensor:
    """Images of a folder or a zip file, with all folders in it, in the shape of a model's input.

    They are resized by averaging over neighbours (bilinear), without regard to their proportions.
    Thin strokes become grey: a line of one pixel that shrinks to a quarter has a quarter of its
    brightness. Omniglot, for example, is drawn in black on white, 105x105; with `invert` it is as
    MNIST is, white on black.

    Args:
        path: folder or zip file. Files of other kinds in it, and hidden ones, are not read.
        shape: channels (1: grey, 3: colours), height and width.
        count: so many are drawn, in the order of their names; all if there are fewer, or None.
        seed: of what is drawn.
        invert: exchange black and white.

    Returns:
        float32 from 0 to 1, shape (number of images, channels, height, width).

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if there is no image in it, or a file cannot be read or has more than 8 bits;
            for other numbers of channels and a count below 1.
        ModuleNotFoundError: without Pillow.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"shape must be (channels, height, width), with 1 channel or 3, got {tuple(shape)}."
        )
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    source = Path(path).expanduser()
    if source.is_dir():
        files = {str(file.relative_to(source)): file for file in source.rglob("*")}
        names = [name for name in files if files[name].is_file()]
        return _read(
            source, names, lambda name: files[name].read_bytes(), shape, count, seed, invert
        )
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Give a folder or zip file of images.")
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{source} is neither a folder nor a zip file, or it is damaged.")
    with zipfile.ZipFile(source) as archive:
        return _read(source, archive.namelist(), archive.read, shape, count, seed, invert)


def _read(
    source: Path,
    names: list[str],
    read: Callable[[str], bytes],
    shape: Sequence[int],
    count: int | None,
    seed: int,
    invert: bool,
) -> Tensor:
    """Some of the images among named files."""
    names = sorted(name for name in names if _is_image(name))
    if not names:
        raise ValueError(f"{source} has no image: no file that ends in {', '.join(SUFFIXES)}.")
    if count is not None and count < len(names):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(names), generator=generator)[:count].sort().values
        names = [names[index] for index in chosen.tolist()]
    pixels = torch.stack([_decode(read(name), f"{source}/{name}", shape) for name in names])
    images = pixels.float().div_(255)
    return 1 - images if invert else images


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


def _decode(data: bytes, name: str, shape: Sequence[int]) -> Tensor:
    """uint8, in the shape."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Reading images needs Pillow: pip install pillow.") from error
    channels, height, width = shape
    try:
        with Image.open(BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has pixels of the kind {image.mode}, not of 8 bits")
            fitting = image.convert("L" if channels == 1 else "RGB").resize(
                (width, height), Image.Resampling.BILINEAR
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Remove or repair it.") from error
    pixels = torch.frombuffer(bytearray(fitting.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1)
