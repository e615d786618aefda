"""`ChainWriter`: adds the samples of one chain to a bank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_revflip.posterior.block import Block
from lightning_revflip.posterior.chain import ChainFiles
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.manifest import (
    ChainSettings,
    Manifest,
    chain_folder,
    chain_numbers,
    dtype_name,
)
from lightning_revflip.posterior.policies import make_policy
from lightning_revflip.posterior.shards import Samples

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In which parameters can be stored."""
_SHARD_BYTES = 8 * 2**20


@dataclass
class _Job:
    """What the thread writes: a block, which stays as it is until that has been done."""

    block: Block
    arguments: tuple[Samples | None, int, frozenset[int]]
    result: Future[None]


class ChainWriter:
    """Adds samples to one chain of a bank; `SampleBank` reads them, also at the same time.

    A sample is copied into memory that was allocated once, for `shard_samples` of them. When a half
    of it is full, a thread writes this to a file, a shard, while the other half is being filled. So
    a process that is killed loses at most the last `shard_samples` samples. `flush` writes what
    there is at once, for instance beside a checkpoint, and `rewind` goes back to a checkpoint. A
    writer that is neither flushed nor closed does not write its last samples.

    If a chain exists, the writer continues it. Every chain has one writer at a time, of whatever
    process; several chains of a bank can be written at once. Not thread-safe.

    Args:
        path: folder of the bank; made if need be.
        layout: parameters of a sample.
        chain: number of the chain.
        max_samples: how many samples the chain may hold; None: all.
        policy: which samples stay: "spread", "reservoir" or "latest", see `policies.py`.
        dtype: in which parameters are stored: float16, bfloat16 or float32.
        buffer_layout: buffers to store with each sample, in their own dtypes; None: none.
        shard_samples: samples in memory, the most that a crash can cost; None: about 8 MB of them,
            at most 100, and at most a tenth of `max_samples` where that is more than 4.
        seed: of the policy "reservoir".
        metadata: plain values to note with the chain, such as its temperature; added to those of
            an existing chain.

    Raises:
        ValueError: for settings out of range, and a bank of another layout or a chain of other
            settings, naming the first difference.
        RuntimeError: if another writer has the chain open.

    Examples:
        >>> network = torch.nn.Linear(4, 2)
        >>> layout = Layout.of_parameters(network)
        >>> with ChainWriter("bank", layout, max_samples=100) as writer:  # doctest: +SKIP
        ...     for step in range(1000):
        ...         train(network)
        ...         writer.append(step, dict(network.named_parameters()))
    """

    def __init__(
        self,
        path: str | PathLike[str],
        layout: Layout,
        *,
        chain: int = 0,
        max_samples: int | None,
        policy: str = "spread",
        dtype: torch.dtype = torch.float16,
        buffer_layout: Layout | None = None,
        shard_samples: int | None = None,
        seed: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        make_policy(policy, max_samples, seed)  # checks the arguments before files are made
        if dtype not in DTYPES:
            names = ", ".join(map(dtype_name, DTYPES))
            raise ValueError(f"dtype must be one of {names}, got {dtype_name(dtype)}.")
        if chain < 0:
            raise ValueError(f"chain must be at least 0, got {chain}.")
        if shard_samples is None:
            shard_samples = _default_shard_samples(layout.numel * dtype.itemsize, max_samples)
        elif shard_samples < 1:
            raise ValueError(f"shard_samples must be at least 1, got {shard_samples}.")
        if buffer_layout is not None and not buffer_layout.names:
            buffer_layout = None
        settings = ChainSettings(layout, buffer_layout, dtype, policy, max_samples, seed)
        self.path = Path(path)
        self.chain = chain
        _check_other_chains(self.path, chain, settings)
        self._files = ChainFiles(
            chain_folder(self.path, chain), settings, _plain(metadata or {}), shard_samples
        )
        manifest = self._files.manifest
        self._settings = settings
        self._seen = manifest.seen
        self._policy = make_policy(policy, max_samples, seed, manifest.seen)
        self._live = {record.serials[row] for record in manifest.shards for row in record.live_rows}
        self._dropped: set[int] = set()  # not in `_open`, and not noted on the disk yet
        self._open, self._other = (
            Block(max(1, size), layout, dtype, buffer_layout, manifest.buffer_dtypes)
            for size in ((shard_samples + 1) // 2, shard_samples // 2)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ChainWriter")
        self._job: _Job | None = None
        self.closed = False

    @property
    def seen(self) -> int:
        """Samples that were offered to the chain since it began, kept or not."""
        return self._seen

    def __len__(self) -> int:
        """Samples that the chain holds."""
        return len(self._live)

    def append(
        self,
        step: int,
        parameters: Mapping[str, Tensor] | Tensor,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Offer a sample.

        Args:
            step: training step at which it was taken.
            parameters: by name as in the layout, or one row of shape (P,).
            buffers: by name, if the bank stores buffers.

        Returns:
            Whether it was kept. One that the policy refuses is not looked at.

        Raises:
            ValueError: for NaN or infinite parameters and such that the dtype of storage cannot
                hold, naming step and parameter, and for other names, shapes or dtypes than
                expected. The sample does not count then, and the writer goes on.
            OSError: if earlier samples could not be written, for instance on a full disk. The new
                one is not taken then; nothing is lost, and the next call tries again.
        """
        self._check_open()
        serial = self._seen
        kept, leaving = self._policy.decide(serial)
        if kept:
            self._make_room()
            self._open.put(serial, step, parameters, buffers)
            self._live.add(serial)
        self._policy.accept(serial)
        self._seen += 1
        self._drop(leaving)
        if kept and not self._open.room:
            self._start_writing()
        return kept

    def flush(self) -> None:
        """Write all samples to the disk.

        Raises:
            OSError: if that fails; nothing is lost, and the next call tries again.
        """
        self._check_open()
        self._finish_writing()
        if len(self._open) or self._dropped or self._seen != self._files.manifest.seen:
            self._start_writing()
            self._finish_writing()

    def rewind(self, seen: int) -> None:
        """Go back to when so many samples had been offered, and write that to the disk.

        For a training that resumes from a checkpoint older than the bank. Samples that came later
        are dropped. Those that they had replaced are gone, so the chain may hold fewer than it did
        then; once as many samples have been offered as before the rewind, it holds exactly those
        that it would hold without the interruption.

        Args:
            seen: what the property `seen` was.

        Raises:
            ValueError: if fewer have been offered.
            OSError: if writing fails; the chain is as before then.
        """
        self._check_open()
        if not 0 <= seen <= self._seen:
            raise ValueError(
                f"cannot rewind chain {self.chain} of {self.path} to {seen} samples: "
                f"{self._seen} have been offered. Resume from the checkpoint that belongs to it, "
                "or begin a new chain."
            )
        self.flush()
        later = frozenset(serial for serial in self._live if serial >= seen)
        self._thread.submit(self._write, None, seen, later).result()
        self._live -= later
        self._seen = seen
        settings = self._settings
        self._policy = make_policy(settings.policy, settings.max_samples, settings.seed, seen)

    def close(self) -> None:
        """Write all samples and let others write the chain; harmless if closed already.

        Raises:
            OSError: if writing fails; the writer stays open then.
        """
        if self.closed:
            return
        self.flush()
        self.closed = True
        self._thread.shutdown()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (
            f"ChainWriter({str(self.path)!r}, chain {self.chain}: {len(self):,} of {self.seen:,} "
            f"samples{state})"
        )

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(
                f"the writer of chain {self.chain} of {self.path} is closed. Open another one to "
                "continue the chain."
            )

    def _drop(self, serials: Iterable[int]) -> None:
        for serial in serials:
            # After a rewind the policy may name samples that had left before.
            if serial in self._live:
                self._live.remove(serial)
                if serial in self._open:
                    self._open.drop(serial)
                else:
                    self._dropped.add(serial)

    def _make_room(self) -> None:
        """Let the last place of a block be taken only after the other block has been written."""
        if self._job is not None and (self._job.result.done() or self._open.room == 1):
            self._finish_writing()

    def _start_writing(self) -> None:
        """Let the thread write the open block, and open the other one, which must be empty.

        As all files are written there, an interrupt of the main thread does not stop half-way.
        """
        samples = self._open.samples() if len(self._open) else None
        arguments = samples, self._seen, frozenset(self._dropped)
        self._job = _Job(self._open, arguments, self._thread.submit(self._write, *arguments))
        self._open, self._other = self._other, self._open

    def _finish_writing(self) -> None:
        """Wait for the thread; what failed is tried once more, and then its error is raised."""
        job = self._job
        if job is None:
            return
        if job.result.exception() is not None:
            job.result = self._thread.submit(self._write, *job.arguments)
            job.result.result()
        self._job = None
        job.block.clear()
        self._dropped -= job.arguments[-1]

    def _write(self, samples: Samples | None, seen: int, dropped: frozenset[int]) -> None:
        try:
            self._files.commit(samples, seen=seen, dropped=dropped)
        except OSError as error:
            count = len(samples.serials) if samples else 0
            nbytes = samples.rows.nbytes if samples else 0
            raise OSError(
                error.errno,
                f"cannot write {count} samples ({nbytes:,} bytes) to {self._files.folder}: "
                f"{error.strerror}. They wait in memory and nothing is lost: free space, then call "
                "flush() or go on.",
            ) from error


def _default_shard_samples(sample_bytes: int, max_samples: int | None) -> int:
    size = min(100, _SHARD_BYTES // max(sample_bytes, 1))
    if max_samples is not None:
        size = min(size, max(4, max_samples // 10))
    return max(size, 1)


def _plain(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata, if JSON gives them back as they are."""
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            "metadata must be a dict of plain values (strings, finite numbers, booleans, None, "
            f"lists and dicts with names as keys), got {metadata!r}."
        )
    return metadata


def _check_other_chains(path: Path, chain: int, settings: ChainSettings) -> None:
    """A bank holds samples of one kind of module."""
    for other in chain_numbers(path):
        if other != chain:
            folder = chain_folder(path, other)
            Manifest.read(folder).settings.check_layouts(settings, f"the new chain in {path}")
