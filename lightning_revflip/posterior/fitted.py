"""`FittedPosterior`: what some tensors define, fitted to samples and in their place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.protocol import Posterior
from lightning_revflip.posterior.tensor_folder import save_tensors


class FittedPosterior(Posterior):
    """A posterior that draws new samples, and is saved as some tensors and settings.

    Subclasses give `layout`, `num_samples`, `draw_chunks`, `to_tensors`, `settings` and `load`.
    """

    num_samples: int
    """How many samples it was fitted to."""

    @abstractmethod
    def draw_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None
    ) -> Iterator[Parameters]:
        """Draw `n` samples, at most `chunk_size` at a time, on which they do not depend.

        Args:
            n: number of samples, at least 1.
            chunk_size: at least 1.
            generator: a CPU generator to draw from; None: torch's global one.

        Returns:
            Values by name, shape (k, *shape), float32, on the CPU.
        """

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What else defines it, as plain values."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Parameters:
        """Draw `n` samples.

        They hold parameters only. Buffers, such as the statistics of batch normalization, belong
        to one sample: re-estimate them, see `reestimate_buffers`.

        Args:
            n: number of samples.
            generator: a CPU generator to draw from; None: torch's global one.

        Returns:
            Values by name, shape (n, *shape), float32, on the CPU.

        Raises:
            ValueError: for n below 1.
        """
        return next(self.sample_chunks(n, max(1, n), generator))

    def sample_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Parameters]:
        for name, value in {"n": n, "chunk_size": chunk_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        yield from self.draw_chunks(n, chunk_size, generator)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that `save` writes, without the names and headers beside them."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    def save(self, path: str | PathLike[str]) -> None:
        """Write it into a folder: `config.json` and a safetensors file.

        What an earlier call wrote there is replaced, at once and only if all could be written.

        Args:
            path: the folder.

        Raises:
            FileExistsError: if the folder holds other files.
            OSError: if writing fails; what was saved before stays valid then.
        """
        save_tensors(path, type(self).__name__, self.settings(), self.to_tensors())


def normal_rows(n: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, the same for a row however many rows are drawn at a time.

    Args:
        n: number of rows.
        size: numbers of a row.
        generator: a CPU generator to draw from; None: torch's global one.

    Returns:
        Shape (n, size), float32, on the CPU.
    """
    rows = torch.empty(n, size)
    for row in rows:
        row.normal_(generator=generator)
    return rows
