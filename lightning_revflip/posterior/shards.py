"""Files of samples: written once, read by mapping them into memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.posterior.files import write_file
from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.manifest import ShardRecord

_ROWS = "rows"
_BUFFER = "buffers."
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls the dtypes that can be stored."""


class DamagedShardError(ValueError):
    """A file of samples is not what its manifest says."""


def damaged(path: Path, record: ShardRecord, what: str) -> DamagedShardError:
    """The error for a file of which something is not as expected."""
    return DamagedShardError(
        f"{path} is damaged: it {what}. Its {len(record.live_rows)} samples are lost. Open the "
        f"others by SampleBank({str(path.parent.parent)!r}, skip_damaged=True), and call save() of "
        "that to have a sound bank again."
    )


@dataclass(frozen=True)
class Samples:
    """Some samples of a chain.

    Args:
        serials: their serial numbers.
        steps: training steps at which they were taken.
        rows: shape (n, P), in the dtype of storage.
        buffers: each of shape (n, *shape).
    """

    serials: list[int]
    steps: list[int]
    rows: Tensor
    buffers: Parameters = field(default_factory=dict)


def write_shard(path: Path, samples: Samples) -> ShardRecord:
    """Write samples into a new file.

    Raises:
        OSError: if that fails; there is no file then.
    """
    buffers = {_BUFFER + name: values for name, values in samples.buffers.items()}
    parts = _safetensors({_ROWS: samples.rows, **buffers})
    write_file(path, *parts)
    return ShardRecord(
        file=path.name,
        nbytes=sum(part.nbytes for part in parts),
        crc32=reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0),
        serials=tuple(samples.serials),
        steps=tuple(samples.steps),
    )


def _safetensors(tensors: Parameters) -> list[memoryview]:
    """The content of a safetensors file, in parts.

    The library's own function copies the tensors while other threads wait, which would hold up the
    training.
    """
    header: dict[str, Any] = {}
    parts, stop = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # alignment
        start, stop = stop, stop + tensor.nbytes
        shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        parts.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


class Shard:
    """A file of samples, mapped into memory: only what is used is read from the disk.

    A mapped file stays readable after its writer has removed it. Its checksum is compared when
    samples are first read.

    Args:
        folder: where the file is.
        record: what the manifest says of it.
        dtype: of the parameters.
        buffer_dtypes: of the buffers.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedShardError: if it has another size than the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        record: ShardRecord,
        dtype: torch.dtype,
        buffer_dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.path = folder / record.file
        self._record = record
        self._dtypes = {_ROWS: dtype}
        self._dtypes.update({_BUFFER + name: of for name, of in buffer_dtypes.items()})
        found = self.path.stat().st_size
        if found != record.nbytes:
            raise damaged(self.path, record, f"has {found:,} bytes, expected {record.nbytes:,}")
        try:
            self._bytes = torch.from_file(
                str(self.path), shared=False, size=record.nbytes, dtype=torch.uint8
            )
        except RuntimeError as error:
            if self.path.exists():
                raise
            raise FileNotFoundError(f"{self.path} has just been removed") from error

    @property
    def rows(self) -> Tensor:
        """Parameters, shape (n, P)."""
        return self._tensors[_ROWS]

    @property
    def buffers(self) -> Parameters:
        """Buffers, each of shape (n, *shape)."""
        tensors = self._tensors.items()
        return {name.removeprefix(_BUFFER): t for name, t in tensors if name != _ROWS}

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Views of the mapped bytes; the layout of the file is that of safetensors."""
        self.verify()
        start = 8 + int.from_bytes(self._bytes[:8].numpy().tobytes(), "little")
        header = json.loads(self._bytes[8:start].numpy().tobytes())
        body = self._bytes[start:]
        return {
            name: body[slice(*header[name]["data_offsets"])].view(dtype).view(header[name]["shape"])
            for name, dtype in self._dtypes.items()
        }

    def verify(self) -> None:
        """Compare the checksum.

        Raises:
            DamagedShardError: if it differs.
        """
        found = zlib.crc32(self._bytes.numpy().data)
        if found != self._record.crc32:
            expected = self._record.crc32
            raise damaged(
                self.path,
                self._record,
                f"has the checksum (CRC-32) {found:08x}, expected {expected:08x}",
            )
