"""What a run wrote for TensorBoard.

An event file is a sequence of records as TFRecord writes them: size (8 bytes), its checksum (4),
the event, and its checksum (4).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE = struct.Struct("<QI")
CHECKSUM = 4


def events(path: Path) -> Iterator[Any]:
    """The events of a file, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    content, place = path.read_bytes(), 0
    while place < len(content):
        size, _ = SIZE.unpack_from(content, place)
        place += SIZE.size
        yield Event.FromString(content[place : place + size])
        place += size + CHECKSUM


def read_scalars(path: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of every number."""
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(path)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def read_names(path: Path, kind: str) -> set[str]:
    """Names of what was logged of a kind: `image`, or `tensor` for text."""
    values = (value for event in events(path) for value in event.summary.value)
    return {value.tag for value in values if value.WhichOneof("value") == kind}
