"""The manifest of a chain: what was sampled and how, and which files hold it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_revflip.posterior.layout import Layout

MANIFEST = "manifest.json"
_FORMAT = "lightning_revflip.SampleBank"
_VERSION = 1


@dataclass(frozen=True)
class ChainSettings:
    """What stays the same as long as a chain lives.

    Args:
        layout: parameters of a sample.
        buffer_layout: its buffers.
        dtype: in which the parameters are stored.
        policy: see `policies.py`.
        max_samples: how many samples may be kept; None: all.
        seed: of the policy.
    """

    layout: Layout
    buffer_layout: Layout | None
    dtype: torch.dtype
    policy: str
    max_samples: int | None
    seed: int

    def check(self, other: ChainSettings, what: str) -> None:
        """Raise a ValueError that names the first difference of other settings to these."""
        self.check_layouts(other, what)
        for entry in fields(self):
            ours, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if ours != theirs:
                raise ValueError(f"{what} has {entry.name}={theirs!r}, expected {ours!r}.")

    def check_layouts(self, other: ChainSettings, what: str) -> None:
        """The same for the layouts alone, which all chains of a bank share."""
        self.layout.check(other.layout, what)
        nothing = Layout((), ())
        (self.buffer_layout or nothing).check(
            other.buffer_layout or nothing, f"{what}, in its buffers,"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {
            "layout": self.layout.to_json(),
            "buffer_layout": self.buffer_layout.to_json() if self.buffer_layout else None,
            "dtype": dtype_name(self.dtype),
            "policy": self.policy,
            "max_samples": self.max_samples,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ChainSettings:
        """The inverse of `to_json`."""
        buffers = values["buffer_layout"]
        return cls(
            layout=Layout.from_json(values["layout"]),
            buffer_layout=None if buffers is None else Layout.from_json(buffers),
            dtype=getattr(torch, values["dtype"]),
            policy=values["policy"],
            max_samples=values["max_samples"],
            seed=values["seed"],
        )


@dataclass(frozen=True)
class ShardRecord:
    """A file of samples.

    Args:
        file: its name.
        nbytes: its size.
        crc32: its checksum.
        serials: serial number of the sample in each row.
        steps: training step of the sample in each row.
        dropped: serial numbers of samples that are in the file but no longer in the bank.
    """

    file: str
    nbytes: int
    crc32: int
    serials: tuple[int, ...]
    steps: tuple[int, ...]
    dropped: frozenset[int] = frozenset()

    @cached_property
    def live_rows(self) -> tuple[int, ...]:
        """Rows of samples that are in the bank."""
        return tuple(i for i, serial in enumerate(self.serials) if serial not in self.dropped)

    def without(self, serials: Collection[int]) -> ShardRecord:
        """This file after some samples, of whatever file, have left the bank."""
        leaving = self.dropped.union(serial for serial in self.serials if serial in serials)
        return self if leaving == self.dropped else replace(self, dropped=leaving)

    @cached_property
    def line(self) -> str:
        """As JSON, kept because a manifest is written often and most of its files stay."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return json.dumps({**values, "dropped": sorted(self.dropped)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardRecord:
        """The inverse of `line`.

        Raises:
            ValueError: if the file is in another folder: a writer removes files that it merges.
        """
        if Path(values["file"]).name != values["file"]:
            raise ValueError(
                f"the manifest of a sample bank names {values['file']!r}, and may only name files "
                "beside it. It was not written by lightning_revflip: do not use this bank."
            )
        return cls(
            file=values["file"],
            nbytes=values["nbytes"],
            crc32=values["crc32"],
            serials=tuple(values["serials"]),
            steps=tuple(values["steps"]),
            dropped=frozenset(values["dropped"]),
        )


@dataclass(frozen=True)
class Manifest:
    """All there is to know of a chain besides the samples themselves.

    Args:
        settings: layout, storage and policy.
        metadata: what the user noted, plain values.
        buffer_dtypes: dtype of each buffer; empty until samples with buffers came.
        seen: samples that were offered.
        next_shard: number of the next file; numbers are not used twice.
        shards: the files.
    """

    settings: ChainSettings
    metadata: Mapping[str, Any] = field(default_factory=dict)
    buffer_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    seen: int = 0
    next_shard: int = 0
    shards: tuple[ShardRecord, ...] = ()

    def encode(self) -> bytes:
        """As JSON, one line for each file."""
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self.settings.to_json(),
            "metadata": self.metadata,
            "buffer_dtypes": {k: dtype_name(dtype) for k, dtype in self.buffer_dtypes.items()},
            "seen": self.seen,
            "next_shard": self.next_shard,
        }
        lines = ",\n".join(record.line for record in self.shards)
        return f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n'.encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest in the folder of a chain.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is that of something else, or of a later version.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            found = values["format"], values["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the manifest of a sample bank: {error!r}.") from error
        if found != (_FORMAT, _VERSION):
            raise ValueError(
                f"{path} is of format {found[0]!r}, version {found[1]!r}; this version of "
                f"lightning_revflip reads {_FORMAT!r}, version {_VERSION}. Update the package."
            )
        return cls(
            settings=ChainSettings.from_json(values["settings"]),
            metadata=values["metadata"],
            buffer_dtypes={k: getattr(torch, v) for k, v in values["buffer_dtypes"].items()},
            seen=values["seen"],
            next_shard=values["next_shard"],
            shards=tuple(map(ShardRecord.from_json, values["shards"])),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def chain_folder(path: Path, chain: int) -> Path:
    """The folder of a chain in that of its bank."""
    return path / f"chain-{chain:04d}"


def chain_numbers(path: Path) -> list[int]:
    """The chains of a bank, in order."""
    names = (folder.parent.name for folder in path.glob(f"chain-[0-9]*/{MANIFEST}"))
    return sorted(int(name.removeprefix("chain-")) for name in names)
