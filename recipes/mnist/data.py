"""The data module: which images, in which split, which process reads what."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from recipes.common.folders import cache_folder
from recipes.mnist.batches import Batch, Batches, DividedSampler
from recipes.mnist.images import Images, Source, download_mnist, find_images
from recipes.mnist.networks import Shape
from recipes.mnist.outliers import KINDS, Kind, find_outliers
from recipes.mnist.splits import Rule, Split, check_balance, divide, draw

MNIST_VALIDATION = 10_000
DIGITS_VALIDATION = DIGITS_TEST = 300


class HandwrittenDigits(LightningDataModule):
    """MNIST, or the small digits of scikit-learn where there is no MNIST.

    MNIST is looked for in `root`, in `REVFLIP_DATA`, in the cache and, with `download`, on the
    network; what was found is logged. It is divided into 50,000 images for training, 10,000 for
    validation and its own 10,000 for the test; the 1,797 digits of scikit-learn into 1,197, 300 and
    300, drawn at random. A division in which some class is missing or out of proportion is an
    error.

    For the question of how uncertain a model is on images of none of the classes, `outlier_images`
    has some.

    All images are kept in memory. Those for training are shuffled anew in every epoch.

    Batch sizes are those of all processes together: each process reads its own images. A strategy
    whose `distributed_sampler_kwargs` name one replica lets every process read all of them.

    Args:
        source: `auto`, `mnist` (an error if it is not found) or `digits`.
        root: folder with the four files of MNIST, or with these in `mnist/`.
        batch_size: images of a training batch.
        eval_batch_size: images of a batch in validation, test and prediction.
        scale: pixels reach the model as numbers from 0 to this one.
        split: validate on the `last` 10,000 images of MNIST's training file, or on `random` ones.
            Digits of scikit-learn are always drawn.
        train_size: train on so many images, drawn from those for training; None takes all.
        seed: of the splits and of the shuffling.
        download: fetch MNIST into `root` or the cache if it is not found. Never done unasked.
        verify: compare the files of MNIST with the published ones; false accepts files of your own
            in the same format.
        outliers: images of none of the classes: `notmnist`, `omniglot`, `uniform` or `gaussian`
            noise, `inverted` test images, `none`; `auto`: notMNIST if it is found and has the size
            of the images, else inverted ones. Which ones they are is logged.
        num_outliers: so many outliers, drawn; None: as many as there are (of noise as many as test
            images).

    Raises:
        ValueError: for sizes below 1, a scale that is not positive, unknown outliers, a `root` or
            `download` that would have no effect; in `setup`, if a file differs from the published
            one or a split is not balanced; with the loaders, if a batch cannot be divided over the
            processes.
        FileNotFoundError: in `setup`, if MNIST was asked for and is not there.
    """

    def __init__(
        self,
        source: Source = "auto",
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        scale: float = 1.0,
        split: Rule = "last",
        train_size: int | None = None,
        seed: int = 1111,
        download: bool = False,
        verify: bool = True,
        outliers: Kind = "auto",
        num_outliers: int | None = 2000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "train_size": train_size,
            "num_outliers": num_outliers,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive number, got {scale}.")
        if split not in ("last", "random"):
            raise ValueError(f"split must be 'last' or 'random', got {split!r}.")
        if outliers not in KINDS:
            raise ValueError(f"outliers must be one of {', '.join(KINDS)}, got {outliers!r}.")
        if source == "digits" and (root is not None or download):
            raise ValueError(
                "root and download would have no effect: they belong to MNIST, but source is "
                "'digits'. Leave out the one or the other."
            )
        self.source: Source = source
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.scale = scale
        self.split: Rule = split
        self.train_size = train_size
        self.seed = seed
        self.download = download
        self.verify = verify
        self.outliers: Kind = outliers
        self.num_outliers = num_outliers

        self._found: Images | None = None
        self._places: Split | None = None
        self._images: dict[str, Tensor] = {}
        self._outliers: Tensor | None = None

    def prepare_data(self) -> None:
        if self.download:
            try:
                find_images("mnist", self.root, self.verify)
            except FileNotFoundError:
                download_mnist(Path(self.root).expanduser() if self.root else cache_folder("mnist"))

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",)}
        for part in needed.get(stage, ("test",)):
            self._prepare(part)

    def _prepare(self, part: str) -> Tensor:
        """The images of a part, scaled at first use."""
        if part not in self._images:
            pixels = self.found.pixels[getattr(self.places, part)]
            self._images[part] = pixels.float().div_(self.found.white).mul_(self.scale)
        return self._images[part]

    # --- images ------------------------------------------------------------------------------

    @property
    def found(self) -> Images:
        """All images, searched for at first use."""
        if self._found is None:
            self._found = find_images(self.source, self.root, self.verify)
            rank_zero_info(f"Images: {self._found.description}")
        return self._found

    @property
    def places(self) -> Split:
        """Which images are for training, validation and test."""
        if self._places is None:
            labels, first_test = self.found.labels, self.found.first_test
            val_size = DIGITS_VALIDATION if first_test is None else MNIST_VALIDATION
            split = divide(labels, first_test, val_size, DIGITS_TEST, self.split, self.seed)
            self._places = split._replace(train=self._some(split.train))
            sizes = ", ".join(
                f"{len(part):,} {name}" for name, part in self._places._asdict().items()
            )
            rank_zero_info(f"Split: {sizes}")
        return self._places

    def _some(self, train: Tensor) -> Tensor:
        """The images to train on: `train_size` of them."""
        if self.train_size is None:
            return train
        if self.train_size > len(train):
            raise ValueError(
                f"train_size is {self.train_size:,}, but there are {len(train):,} images for "
                f"training ({self.found.description}). Use a smaller one, or None for all."
            )
        generator = torch.Generator().manual_seed(self.seed)
        some, _ = draw(train, self.found.labels, self.train_size, generator)
        check_balance(self.found.labels, {"train": some})
        return some

    @property
    def image_shape(self) -> Shape:
        """Channels, height and width of an image."""
        _, channels, height, width = self.found.pixels.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.found.labels.max()) + 1

    @property
    def num_train(self) -> int:
        """Number of images for training: the N of a posterior over weights."""
        return len(self.places.train)

    def test_set(self) -> Batch:
        """All images of the test and their labels, in every process."""
        return Batch(self._prepare("test"), self.found.labels[self.places.test])

    def outlier_images(self) -> Tensor | None:
        """Images of none of the classes, in the shape and scale of the others; None for `none`.

        float32, shape (number of images, channels, height, width); the same in every process.

        Raises:
            FileNotFoundError, ValueError: if notMNIST was asked for and is not there, is damaged
                or has not the size of the images.
        """
        if self._outliers is None and self.outliers != "none":
            test = self._prepare("test")
            description, self._outliers = find_outliers(
                self.outliers, test, self.scale, self.num_outliers, self.seed, self.root
            )
            rank_zero_info(f"Outliers: {description}")
        return self._outliers

    # --- loaders -----------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        return self._batches("train", self.batch_size)

    def val_dataloader(self) -> Batches:
        return self._batches("val", self.eval_batch_size)

    def test_dataloader(self) -> Batches:
        return self._batches("test", self.eval_batch_size)

    def predict_dataloader(self) -> Batches:
        """The images of the test."""
        return self.test_dataloader()

    def _batches(self, part: str, batch_size: int) -> Batches:
        rank, world_size, overfit = 0, 1, False
        if self.trainer is not None:
            # None on one process. Independent chains name one replica, and each reads everything.
            share = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
            rank, world_size = share["rank"], share["num_replicas"]
            overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = DividedSampler(
            len(self._images[part]),
            batch_size,
            train=part == "train",
            seed=self.seed,
            reshuffle=not overfit,  # overfit_batches means the same batches again and again
            rank=rank,
            world_size=world_size,
        )
        labels = self.found.labels[getattr(self.places, part)]
        return Batches(self._images[part], labels, sampler)
