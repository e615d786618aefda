"""`SampleBank`: the samples of one or several chains, on the disk."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_revflip.posterior.chain import ChainFiles
from lightning_revflip.posterior.layout import Layout, Parameters
from lightning_revflip.posterior.manifest import (
    ChainSettings,
    chain_folder,
    chain_numbers,
    dtype_name,
)
from lightning_revflip.posterior.protocol import Posterior
from lightning_revflip.posterior.reader import ChainSnapshot, Place
from lightning_revflip.posterior.shards import Samples
from lightning_revflip.posterior.spacing import evenly_spaced, shares


class SampleBank(Posterior):
    """Samples that `ChainWriter` wrote, opened for reading.

    A bank is a snapshot: it has the samples that were on the disk when it was opened, and keeps
    them readable, whatever is written meanwhile; `refresh` shows what has come since. Samples are
    numbered from 0 to `len(bank) - 1`, chain by chain, in each chain in the order in which they
    were taken. Files are mapped into memory, so that only samples in use are read, and each is
    checked against its checksum when it is first read.

    Args:
        path: folder of the bank.
        chains: numbers of the chains to open; None: all.
        cache_bytes: `sample_chunks`, and with it `predict`, keeps the samples it read last for the
            next call, if they take no more than this.
        skip_damaged: verify all files at once and leave damaged ones out, with a warning.

    Raises:
        FileNotFoundError: if there is no such folder, or no such chain in it.
        ValueError: for a folder that is no bank, chains of different layouts, a bank of a later
            format, and damaged files.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> bank  # doctest: +SKIP
        SampleBank('runs/mnist/bank': 80 samples of 79,510 parameters, 4 chains, float16)
        >>> bank.predict(network, images, n=20).mean(0)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        chains: Iterable[int] | None = None,
        cache_bytes: int = 2**30,
        skip_damaged: bool = False,
    ) -> None:
        self.path = Path(path)
        self.cache_bytes = cache_bytes
        self._wanted = None if chains is None else sorted(set(chains))
        self._skip_damaged = skip_damaged
        self._chains: dict[int, ChainSnapshot] = {}
        self._replaced: Parameters | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what has been written since the bank was opened.

        Raises:
            ValueError: if the buffers were replaced, as new samples would have none.
        """
        if self._replaced is not None:
            raise ValueError(
                f"the buffers of {self!r} were replaced, and new samples would have none. Refresh "
                "the bank before with_buffers()."
            )
        known = {}
        for chain in self._chains.values():
            known.update(chain.shards)
        chains = {
            number: ChainSnapshot(
                chain_folder(self.path, number), known, skip_damaged=self._skip_damaged
            )
            for number in self._find_chains()
        }
        self._check_chains(chains)
        self._chains = chains
        self.layout = self._settings.layout
        self.buffer_layout = self._settings.buffer_layout
        """Names and shapes of the buffers of a sample; None if it has none."""
        self._places = [place for chain in self._chains.values() for place in chain.places]
        self._cached: tuple[int, Tensor] | None = None

    @property
    def chains(self) -> tuple[int, ...]:
        """Numbers of the chains."""
        return tuple(self._chains)

    @property
    def steps(self) -> dict[int, list[int]]:
        """For each chain the training steps at which its samples were taken."""
        return {
            number: [place.step for place in chain.places] for number, chain in self._chains.items()
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """What was noted of the samples: the entries in which all chains agree."""
        first, *others = self.chain_metadata.values()
        return {
            key: value
            for key, value in first.items()
            if all(key in other and other[key] == value for other in others)
        }

    @property
    def chain_metadata(self) -> dict[int, dict[str, Any]]:
        """All that was noted, for each chain."""
        return {number: dict(chain.manifest.metadata) for number, chain in self._chains.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers of the samples, in the dtypes of storage.

        The files take more: by their headers, the manifests, and up to `max_samples` samples per
        chain that have left the bank but still share a file with others.
        """
        buffers = self.buffers(range(min(1, len(self)))).values()
        return len(self) * sum(values.nbytes for values in buffers) + sum(
            len(chain.places) * self.layout.numel * chain.manifest.settings.dtype.itemsize
            for chain in self._chains.values()
        )

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        chains = f"{len(self.chains)} chain{'s' if len(self.chains) > 1 else ''}"
        return (
            f"SampleBank({str(self.path)!r}: {len(self):,} samples of {self.layout.numel:,} "
            f"parameters, {chains}, {dtype_name(self._settings.dtype)})"
        )

    def rows(self, indices: Sequence[int] | None = None) -> Tensor:
        """Parameters of some samples, one row each.

        Args:
            indices: which samples; None: all.

        Returns:
            Shape (k, P), float32.

        Raises:
            IndexError: for a sample that there is not.
        """
        places = self._at(range(len(self)) if indices is None else indices)
        rows = torch.empty(len(places), self.layout.numel)
        for row, place in zip(rows, places, strict=True):
            row.copy_(place.shard.rows[place.row])
        return rows

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The rows of all samples, at most `size` at a time: for banks larger than the memory."""
        _check_chunk_size(size)
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))

    def buffers(self, indices: Sequence[int] | None = None) -> Parameters:
        """Buffers of some samples.

        Args:
            indices: which samples; None: all.

        Returns:
            Shapes (k, *shape), in their own dtypes; empty if the bank has no buffers.

        Raises:
            IndexError: for a sample that there is not.
        """
        indices = range(len(self)) if indices is None else indices
        places = self._at(indices)
        if self.buffer_layout is None or not places:
            return {}
        if self._replaced is not None:
            return {name: values[list(indices)] for name, values in self._replaced.items()}
        return {
            name: torch.stack([place.shard.buffers[name][place.row] for place in places])
            for name in self.buffer_layout.names
        }

    def sample(self, n: int, generator: torch.Generator | None = None) -> Parameters:
        """`n` different samples, parameters and buffers.

        Args:
            n: number of samples, at most `len(self)`.
            generator: to draw from, without replacement; None: spread evenly over the chains, and
                in each over the time.

        Returns:
            Shapes (n, *shape); parameters are float32, buffers as they were stored.

        Raises:
            ValueError: for fewer than 1 or more than `len(self)`.
        """
        indices = self._choose(n, generator)
        return {**self.layout.unflatten(self.rows(indices)), **self.buffers(indices)}

    def sample_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Parameters]:
        """The samples of `sample(n, generator)`, at most `chunk_size` at a time.

        Samples that fit into `cache_bytes` are kept for the next call: do not change them in place.
        """
        _check_chunk_size(chunk_size)
        indices = self._choose(n, generator)
        cached = None if generator is not None else self._cached_rows(n, indices)
        for start in range(0, n, chunk_size):
            part = indices[start : start + chunk_size]
            rows = self.rows(part) if cached is None else cached[start : start + chunk_size]
            yield {**self.layout.unflatten(rows), **self.buffers(part)}

    def with_buffers(self, buffers: Parameters) -> Self:
        """This bank with other buffers, for instance re-estimated ones.

        Args:
            buffers: stacked, each of shape (len(self), *shape).

        Returns:
            A bank on the same files; `save` writes it with its buffers.

        Raises:
            ValueError: for another number of samples.
        """
        if wrong := [name for name, values in buffers.items() if len(values) != len(self)]:
            raise ValueError(
                f"the buffers must have one value for each of {len(self)} samples, got "
                f"{len(buffers[wrong[0]])} of {wrong[0]!r}."
            )
        bank = copy.copy(self)
        bank._replaced = dict(buffers)
        shapes = tuple(tuple(values.shape[1:]) for values in buffers.values())
        bank.buffer_layout = Layout(tuple(buffers), shapes)
        return bank

    def check_module(self, module: nn.Module) -> None:
        super().check_module(module)
        if self.buffer_layout is not None:
            own = dict(module.named_buffers())
            known = {name: own[name] for name in self.buffer_layout.names if name in own}
            try:
                self.buffer_layout.check_tensors(known)
            except ValueError as error:
                raise ValueError(
                    f"{type(module).__name__} has other buffers than the samples: {error}"
                ) from None

    def verify(self) -> None:
        """Read all files and compare their checksums.

        Raises:
            ValueError: for the first damaged file, naming it.
        """
        for chain in self._chains.values():
            for shard in chain.shards.values():
                shard.verify()

    def save(self, path: str | PathLike[str]) -> None:
        """Write a copy that has no files of other samples, and that writers can continue.

        Args:
            path: a folder that does not exist, or is empty.

        Raises:
            FileExistsError: if there is something.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"cannot save the bank to {path}: there is something. Choose another folder."
            )
        unfinished = path.with_name(path.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        start = 0
        for number, chain in self._chains.items():
            stop = start + len(chain.places)
            self._save_chain(chain_folder(unfinished, number), chain, range(start, stop))
            start = stop
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Open a bank; the same as `SampleBank(path)`."""
        return cls(path)

    @property
    def _settings(self) -> ChainSettings:
        """Those of the first chain; the layouts are the same in all."""
        return self._chains[self.chains[0]].manifest.settings

    def _find_chains(self) -> list[int]:
        if not self.path.exists():
            raise FileNotFoundError(f"there is no sample bank at {self.path}.")
        found = chain_numbers(self.path)
        if not found:
            raise ValueError(
                f"{self.path} is no sample bank: it has no chain-0000/manifest.json or the like. "
                "Give the folder that ChainWriter or SGLDSampler was given."
            )
        if self._wanted is None:
            return found
        if missing := [number for number in self._wanted if number not in found]:
            raise FileNotFoundError(
                f"{self.path} has no chain {missing[0]}; it has {', '.join(map(str, found))}."
            )
        return self._wanted

    def _check_chains(self, chains: Mapping[int, ChainSnapshot]) -> None:
        """All chains must have samples of the same module."""
        smallest = min(chains)
        first = chains[smallest].manifest
        for number, chain in chains.items():
            what = f"chain {number} of {self.path}, unlike chain {smallest},"
            first.settings.check_layouts(chain.manifest.settings, what)
            dtypes = chain.manifest.buffer_dtypes
            if first.buffer_dtypes and dtypes and dtypes != first.buffer_dtypes:
                raise ValueError(
                    f"{what} has buffers of the dtypes {dtypes}, expected {first.buffer_dtypes}."
                )

    def _at(self, indices: Sequence[int]) -> list[Place]:
        if wrong := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(f"there is no sample {wrong[0]}: {self!r}.")
        return [self._places[index] for index in indices]

    def _choose(self, n: int, generator: torch.Generator | None) -> list[int]:
        """Numbers of the samples that `sample` returns."""
        if not 1 <= n <= len(self):
            raise ValueError(
                f"n must be from 1 to {len(self)}, the samples in {self!r}, got {n}."
                + ("" if len(self) else " Nothing has been written yet; see refresh().")
            )
        if generator is not None:
            drawn = torch.randperm(len(self), generator=generator, device=generator.device)
            return [int(index) for index in drawn[:n].tolist()]
        lengths = [len(chain.places) for chain in self._chains.values()]
        starts = accumulate(lengths, initial=0)
        return [
            start + index
            for share, length, start in zip(shares(n, lengths), lengths, starts, strict=False)
            for index in evenly_spaced(share, length)
        ]

    def _cached_rows(self, n: int, indices: list[int]) -> Tensor | None:
        """The rows of `n` evenly spread samples, read once; None if they are too large to keep."""
        if 4 * n * self.layout.numel > self.cache_bytes:
            return None
        if self._cached is None or self._cached[0] != n:
            self._cached = n, self.rows(indices)
        return self._cached[1]

    def _save_chain(self, folder: Path, chain: ChainSnapshot, indices: range) -> None:
        """Write the samples of a chain, each shard as large as the largest that it has."""
        manifest = chain.manifest
        settings = replace(manifest.settings, buffer_layout=self.buffer_layout)
        size = max((len(record.serials) for record in manifest.shards), default=1)
        files = ChainFiles(folder, settings, manifest.metadata, size)
        for start in range(0, len(indices), size):
            places = chain.places[start : start + size]
            samples = Samples(
                serials=[place.serial for place in places],
                steps=[place.step for place in places],
                rows=torch.stack([place.shard.rows[place.row] for place in places]),
                buffers=self.buffers(indices[start : start + size]),
            )
            files.commit(samples, seen=manifest.seen, dropped=())
        files.commit(None, seen=manifest.seen, dropped=())
        files.close()


def _check_chunk_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"the size of chunks must be at least 1, got {size}.")
