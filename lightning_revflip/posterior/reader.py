"""The samples of one chain at one moment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lightning_revflip.posterior.manifest import Manifest, ShardRecord
from lightning_revflip.posterior.shards import DamagedShardError, Shard, damaged


class Place(NamedTuple):
    """Where a sample is."""

    serial: int
    step: int
    shard: Shard
    row: int


class ChainSnapshot:
    """The samples that a chain held when it was opened; they stay readable.

    Args:
        folder: of the chain.
        known: shards that are open already, by path and checksum.
        skip_damaged: verify all shards and leave out those that are damaged, with a warning.

    Raises:
        FileNotFoundError: if there is no chain.
        DamagedShardError: for a shard that is missing or of another size than it had.
    """

    def __init__(
        self,
        folder: Path,
        known: Mapping[tuple[Path, int], Shard],
        *,
        skip_damaged: bool = False,
    ) -> None:
        self._folder = folder
        self._known = known
        self._skip_damaged = skip_damaged
        while True:
            self.manifest = Manifest.read(folder)
            with suppress(FileNotFoundError):  # the writer has just removed a shard
                opened = [(record, self._open(record)) for record in self.manifest.shards]
                break
        sound = [(record, shard) for record, shard in opened if shard is not None]
        self.shards = {(shard.path, record.crc32): shard for record, shard in sound}
        self.places = sorted(
            Place(record.serials[row], record.steps[row], shard, row)
            for record, shard in sound
            for row in record.live_rows
        )
        """The samples by serial number, of which no two are the same."""

    def _open(self, record: ShardRecord) -> Shard | None:
        """A shard; None for a damaged one that is left out."""
        try:
            shard = self._known.get((self._folder / record.file, record.crc32))
            if shard is None:
                shard = self._map(record)
            if self._skip_damaged:
                shard.verify()
            return shard
        except DamagedShardError as error:
            if not self._skip_damaged:
                raise
            warnings.warn(str(error), stacklevel=5)
            return None

    def _map(self, record: ShardRecord) -> Shard:
        settings, buffer_dtypes = self.manifest.settings, self.manifest.buffer_dtypes
        try:
            return Shard(self._folder, record, settings.dtype, buffer_dtypes)
        except FileNotFoundError:
            if record.file not in {other.file for other in Manifest.read(self._folder).shards}:
                raise
        raise damaged(self._folder / record.file, record, "is missing")
