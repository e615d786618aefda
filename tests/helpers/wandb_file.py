"""What an offline run of W&B wrote to its `.wandb` file.

The file is a log as LevelDB writes it: blocks of 32 KiB, and in them pieces of records, each behind
a header of 7 bytes: checksum, size and kind. Before the first one are 7 bytes of W&B's own.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

MAGIC = b":W&B"
BLOCK = 2**15
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file, in the order in which they were written."""
    content = path.read_bytes()
    assert content.startswith(MAGIC), f"{path} is no file of W&B"
    place, parts = HEADER.size, b""
    while place < len(content):
        if BLOCK - place % BLOCK < HEADER.size:  # no header fits there: the block is padded
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(content, place)
        place += HEADER.size
        piece, place = content[place : place + size], place + size
        assert len(piece) == size, f"{path} ends within a record"
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


@dataclass
class OfflineRun:
    """What a run recorded.

    Attributes:
        config: hyperparameters.
        history: rows, each what was logged in one call.
        summary: of each name the last value.
        artifacts: of each name its type and the paths of its files.
    """

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, set[str]]] = field(default_factory=dict)


def read_run(path: Path) -> OfflineRun:
    """Everything that a test may want to know of a run."""
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "artifact":
            artifact = record.artifact
            paths = {entry.path for entry in artifact.manifest.contents}
            run.artifacts[artifact.name] = (artifact.type, paths)
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
