"""The files of one chain, as their only writer sees them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_revflip.posterior.files import (
    FileLock,
    remove_file,
    remove_leftovers,
    sync_folder,
    write_file,
)
from lightning_revflip.posterior.manifest import MANIFEST, ChainSettings, Manifest, ShardRecord
from lightning_revflip.posterior.shards import Samples, Shard, write_shard


class ChainFiles:
    """Manifest and shards of a chain; every change of them is all or nothing.

    A shard is written before the manifest names it and removed after the manifest has ceased to,
    so a manifest names complete files only, whenever the process is killed.

    Args:
        folder: of the chain; made if need be. Files that a killed writer left are removed.
        settings: of the chain; those of an existing one must be the same.
        metadata: is noted in the manifest, beside what an existing one has.
        shard_samples: most samples in a shard that is made when sparse ones are merged.

    Raises:
        RuntimeError: if another writer has the chain open.
        ValueError: if there is a chain with other settings.
    """

    def __init__(
        self, folder: Path, settings: ChainSettings, metadata: Mapping[str, Any], shard_samples: int
    ) -> None:
        self.folder = folder
        self._shard_samples = shard_samples
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        try:
            self._lock = FileLock(folder / "lock")
        except BlockingIOError as error:
            raise RuntimeError(
                f"{folder} is being written by another process, or by a writer of this one that is "
                "not closed. Give every process a chain of its own, or close the other first."
            ) from error
        try:
            self.manifest = self._open(settings, metadata)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: ChainSettings, metadata: Mapping[str, Any]) -> Manifest:
        try:
            manifest = Manifest.read(self.folder)
        except FileNotFoundError:
            manifest = Manifest(settings)
        settings.check(manifest.settings, f"the existing chain in {self.folder}")
        remove_leftovers(
            self.folder, "shard-*.safetensors", {record.file for record in manifest.shards}
        )
        manifest = replace(manifest, metadata={**manifest.metadata, **metadata})
        write_file(self.folder / MANIFEST, manifest.encode())
        return manifest

    def commit(self, samples: Samples | None, *, seen: int, dropped: Collection[int]) -> None:
        """Bring the files up to date.

        Args:
            samples: new ones, for a shard of their own.
            seen: samples that were offered to the chain until now.
            dropped: serial numbers of samples in older shards that have left.

        Raises:
            OSError: if something cannot be written; the chain is as before then.
            DamagedShardError: for a damaged shard among those to be merged.
        """
        while self._is_sparse():
            self._merge_sparse_shards()
        records = [record.without(dropped) for record in self.manifest.shards]
        self._replace(records, samples, seen)

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _replace(self, records: list[ShardRecord], new: Samples | None, seen: int) -> None:
        """Name some shards and a new one, and remove the others."""
        manifest = self.manifest
        records = [record for record in records if record.live_rows]
        if new is not None:
            path = self.folder / f"shard-{manifest.next_shard:06d}.safetensors"
            records.append(write_shard(path, new))
            manifest = replace(
                manifest,
                next_shard=manifest.next_shard + 1,
                buffer_dtypes={name: values.dtype for name, values in new.buffers.items()},
            )
        manifest = replace(manifest, shards=tuple(records), seen=seen)
        try:
            write_file(self.folder / MANIFEST, manifest.encode())
        except OSError:
            if new is not None:
                remove_file(path)  # a full disk should not hold what nothing names
            raise
        kept = {record.file for record in records}
        for record in self.manifest.shards:
            if record.file not in kept:
                remove_file(self.folder / record.file)
        self.manifest = manifest

    def _is_sparse(self) -> bool:
        """Whether more samples have left than the bank may hold, but still take space."""
        limit = self.manifest.settings.max_samples
        dead = sum(len(record.dropped) for record in self.manifest.shards)
        return limit is not None and dead > limit

    def _merge_sparse_shards(self) -> None:
        """Make one shard of the living samples of the sparsest ones."""
        records = sorted(
            self.manifest.shards, key=lambda record: len(record.live_rows) / len(record.serials)
        )
        chosen = [records.pop(0)]
        size = len(chosen[0].live_rows)
        while records and size + len(records[0].live_rows) <= self._shard_samples:
            size += len(records[0].live_rows)
            chosen.append(records.pop(0))
        self._replace(records, self._living(chosen), self.manifest.seen)

    def _living(self, records: list[ShardRecord]) -> Samples:
        """The samples of some shards that have not left, by serial number."""
        dtype, buffer_dtypes = self.manifest.settings.dtype, self.manifest.buffer_dtypes
        shards = [Shard(self.folder, record, dtype, buffer_dtypes) for record in records]
        places = sorted(
            (record.serials[row], record.steps[row], shard, row)
            for shard, record in enumerate(records)
            for row in record.live_rows
        )
        serials, steps, *_ = zip(*places, strict=True)
        return Samples(
            list(serials),
            list(steps),
            torch.stack([shards[shard].rows[row] for *_, shard, row in places]),
            {
                name: torch.stack([shards[shard].buffers[name][row] for *_, shard, row in places])
                for name in buffer_dtypes
            },
        )
