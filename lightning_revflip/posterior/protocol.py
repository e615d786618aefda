"""`Posterior`: what a bank of samples, a fitted Gaussian and a generator have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_revflip.posterior.layout import Layout, Parameters
from lightning_revflip.posterior.predict import Transform, predict_chunks, softmax, streaming_size


class Posterior(ABC):
    """A distribution over the parameters of a module, from which samples can be had.

    Subclasses give `layout`, `sample`, `__len__`, `nbytes`, `save` and `load`; those that need
    not have all samples in memory at once also give `sample_chunks`.
    """

    layout: Layout
    """Names and shapes of the parameters of one sample."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Parameters:
        """Draw `n` samples.

        Args:
            n: number of samples.
            generator: to draw from; None: what the subclass says.

        Returns:
            Values by name, each of shape (n, *shape): parameters, and buffers where the posterior
            has them.
        """

    def sample_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Parameters]:
        """The samples of `sample(n, generator)`, at most `chunk_size` at a time.

        Args:
            n: number of samples.
            chunk_size: samples at a time.
            generator: see `sample`.

        Raises:
            ValueError: for a chunk_size below 1, and as `sample`.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        samples = self.sample(n, generator)
        for start in range(0, n, chunk_size):
            yield {name: value[start : start + chunk_size] for name, value in samples.items()}

    def predict(
        self,
        module: nn.Module,
        x: Any,
        n: int | None = None,
        *,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        transform: Transform | None = softmax,
    ) -> Tensor:
        """Predictions of `n` samples, by default probabilities of classes.

        Samples are read some 256 MiB at a time, where the posterior can (a bank, a Gaussian), so
        that there may be more of them than fit into memory.

        Args:
            module: computes with the samples; in eval mode meanwhile, otherwise left as it is.
            x: what the module takes: a tensor, or a tuple of its arguments.
            n: number of samples; None: `len(self)`.
            chunk_size: samples that are computed at a time; None: see `predict`.
            generator: to draw samples from, see `sample`.
            transform: of the module's outputs; None: the outputs as they are.

        Returns:
            Shape (n, batch, classes), on the device of the module's outputs.

        Raises:
            ValueError: for n or chunk_size below 1, and as for `check_module`.

        Examples:
            >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
            >>> bank.predict(network, images, n=20).shape  # doctest: +SKIP
            torch.Size([20, 128, 10])
        """
        n = len(self) if n is None else n
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        self.check_module(module)
        reading = max(chunk_size or 1, streaming_size(self.layout.numel))
        chunks = self.sample_chunks(n, reading, generator)
        return predict_chunks(module, chunks, x, chunk_size=chunk_size, transform=transform)

    def check_module(self, module: nn.Module) -> None:
        """Raise unless the samples fit a module and hold all of its parameters that are not frozen.

        Raises:
            ValueError: for a module of another architecture, naming the first difference.
        """
        self.layout.check_module(module)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples that it holds, or was fitted to."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that storing it takes."""

    @abstractmethod
    def save(self, path: str | PathLike[str]) -> None:
        """Write it into a folder, from which `load` reads it.

        Args:
            path: the folder.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Args:
            path: the folder.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: for a folder of something else, and damaged files.
        """
